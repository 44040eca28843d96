"""Which tensor of which family is cut how: complete, of the shapes a rank's decoder wants, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.parallel import rules as rules_module
from ferrum_ref.parallel.rules import ExpertSharding, check_ranks, rank_config, tensor_rules
from ferrum_ref.parallel.shards import Copied, Once, Owned, Part, Split
from ferrum_ref.parallel.source import ShardedSource

BY_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")
PLAIN: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_layers": 1,
    "num_heads": 12,
    "num_kv_heads": 6,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.clause("TP-RULE-1", "TP-RULE-7", "TP-SOURCE-1")
@pytest.mark.parametrize("experts", ExpertSharding)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_tensor_has_a_rule_and_shards_are_what_a_ranks_configuration_calls_for(
    num_ranks: int, experts: ExpertSharding, each_family: Any
) -> None:
    with open_checkpoint(each_family.path) as checkpoint:
        sources = [ShardedSource(checkpoint, rank, num_ranks, experts) for rank in range(num_ranks)]
        rules = tensor_rules(checkpoint.config, experts)
        assert list(rules) == list(checkpoint.tensors)
        wanted = [dict(expected_tensors(source.config)) for source in sources]
        for name, rule in rules.items():
            found = [source.read(name) for source in sources]
            assert np.array_equal(rule.unshard(found), checkpoint.read(name)), name
            by_experts = experts is ExpertSharding.WHOLE and ".experts." in name
            if not name.endswith(BY_VOCABULARY) and not by_experts:
                assert [each.shape for each in found] == [each[name] for each in wanted], name
            out = np.empty_like(found[-1])
            assert sources[-1].read(name, out=out) is out
            assert np.array_equal(out, found[-1])


@pytest.mark.clause("TP-RULE-2", "TP-RULE-3", "TP-RULE-4")
def test_what_is_cut_and_what_is_not(family_model: Callable[[str], Any]) -> None:
    def rules_of(name: str) -> dict[str, Any]:
        with open_checkpoint(family_model(name).path) as checkpoint:
            return dict(tensor_rules(checkpoint.config))

    llama = rules_of("llama")
    layer = "model.layers.1."
    assert llama["model.embed_tokens.weight"] == llama["lm_head.weight"] == Split(0, (Part(67),))
    assert llama[f"{layer}self_attn.q_proj.weight"] == llama[f"{layer}self_attn.q_proj.bias"] == Split(0, (Part(4, 8),))
    assert llama[f"{layer}self_attn.v_proj.weight"] == Split(0, (Part(2, 8),))
    assert llama[f"{layer}self_attn.o_proj.weight"] == Split(1, (Part(4, 8),))
    assert llama[f"{layer}mlp.down_proj.weight"] == Split(1, (Part(42),))
    assert llama[f"{layer}self_attn.o_proj.bias"] == llama[f"{layer}mlp.down_proj.bias"] == Once()
    assert llama[f"{layer}input_layernorm.weight"] == llama["model.norm.weight"] == Copied()
    assert rules_of("qwen3")[f"{layer}self_attn.k_norm.weight"] == Copied()
    phi3 = rules_of("phi 3")
    assert phi3[f"{layer}self_attn.qkv_proj.weight"] == Split(0, (Part(4, 8), Part(2, 8), Part(2, 8)))
    assert phi3[f"{layer}mlp.gate_up_proj.weight"] == Split(0, (Part(42), Part(42)))
    gpt2 = rules_of("gpt 2")
    assert gpt2["transformer.wpe.weight"] == Copied()
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == Split(1, (Part(4, 8),) * 3)
    assert gpt2["transformer.h.0.attn.c_attn.bias"] == Split(0, (Part(4, 8),) * 3)
    assert gpt2["transformer.h.0.mlp.c_proj.weight"] == Split(0, (Part(42),))
    neox = rules_of("gpt-neox")
    assert neox["gpt_neox.layers.0.attention.query_key_value.weight"] == Split(0, (Part(4, 24),))
    assert rules_of("gpt-oss")[f"{layer}self_attn.sinks"] == Split(0, (Part(4),))
    with open_checkpoint(family_model("gpt-oss").path) as checkpoint:
        whole = tensor_rules(checkpoint.config, ExpertSharding.WHOLE)
    expert = f"{layer}mlp.experts.4."
    assert whole[f"{expert}up_proj.weight"] == whole[f"{expert}gate_proj.bias"] == Owned(0, 4, 6)
    assert whole[f"{expert}down_proj.weight"] == Owned(1, 4, 6)
    assert whole[f"{expert}down_proj.bias"] == Once(4, 6)
    deepseek = rules_of("deepseek-v3")
    for part in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"):
        assert deepseek[f"{layer}self_attn.{part}.weight"] == Copied()
    assert deepseek[f"{layer}self_attn.q_b_proj.weight"] == Split(0, (Part(4, 14),))
    assert deepseek[f"{layer}self_attn.kv_b_proj.weight"] == Split(0, (Part(4, 16),))
    assert deepseek[f"{layer}mlp.gate.e_score_correction_bias"] == Copied()


@pytest.mark.clause("TP-RULE-6")
@pytest.mark.parametrize(
    ("changes", "num_ranks", "message"),
    [
        ({}, 0, r"got 0, expected at least 1"),
        ({}, 5, r"got 5 for 12 query heads, expected a divisor of 12"),
        ({}, 4, r"got 4 for 6 key/value heads, expected a divisor or a multiple of 6"),
        ({"vocab_size": 3}, 6, r"got 6 for 3 vocabulary rows, expected at most 3"),
        ({"intermediate_size": 5}, 6, r"got 6 for 5 features of the feed-forward, expected at most 5"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_named(changes: dict[str, Any], num_ranks: int, message: str) -> None:
    config = DecoderConfig(**{**PLAIN, **changes})
    with pytest.raises(InvalidParameterError, match=message):
        check_ranks(config, num_ranks)
    with pytest.raises(InvalidParameterError, match=message):
        rank_config(config, 0, num_ranks)


@pytest.mark.clause("TP-RULE-6", "TP-RULE-5")
def test_experts_that_are_whole_may_be_fewer_than_ranks(family_model: Callable[[str], Any]) -> None:
    with open_checkpoint(family_model("deepseek-v3").path) as checkpoint:
        config = checkpoint.config
    assert config.moe is not None
    small = replace(config, moe=replace(config.moe, feed_forward_size=2, shared_size=3))
    with pytest.raises(InvalidParameterError, match="got 4 for 2 features of an expert, expected at most 2"):
        check_ranks(small, 4)
    with pytest.raises(InvalidParameterError, match="got 4 for 3 features of the shared expert, expected at most 3"):
        check_ranks(small, 4, ExpertSharding.WHOLE)
    check_ranks(replace(small, moe=replace(config.moe, feed_forward_size=2, shared_size=4)), 4, ExpertSharding.WHOLE)


@pytest.mark.clause("TP-RULE-7")
def test_a_ranks_configuration() -> None:
    config = DecoderConfig(**PLAIN)
    quarter = rank_config(config, 1, 3)
    assert (quarter.num_heads, quarter.num_kv_heads, quarter.intermediate_size, quarter.vocab_size) == (4, 2, 13, 64)
    shared = rank_config(config, 11, 12)
    assert (shared.num_heads, shared.num_kv_heads, shared.head_dim, shared.hidden_size) == (1, 1, 4, 32)
    sizes = [rank_config(config, rank, 3).intermediate_size for rank in range(3)]
    assert sum(sizes) == 40
    with pytest.raises(InvalidParameterError, match="got 3 of 3 ranks"):
        rank_config(config, 3, 3)


@pytest.mark.clause("TP-RULE-1", "TP-SOURCE-1")
def test_what_nobody_said_how_to_shard_is_refused(
    family_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherPart:
        """A part of a family that came later."""

    with open_checkpoint(family_model("deepseek-v3").path) as checkpoint:
        with pytest.raises(NotFoundError, match=r"read shard 'model\.nothing'"):
            ShardedSource(checkpoint, 0, 2).read("model.nothing")
        with monkeypatch.context() as patch:
            patch.setattr(rules_module, "LatentPart", OtherPart)
            with pytest.raises(UnsupportedError, match="attention of deepseek_v3: no rule says how to shard it"):
                tensor_rules(checkpoint.config)
        monkeypatch.setattr(rules_module, "MoePart", OtherPart)
        with pytest.raises(UnsupportedError, match="feed-forward of deepseek_v3: no rule says how to shard it"):
            tensor_rules(checkpoint.config)
