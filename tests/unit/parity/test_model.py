"""A whole decoder against its float64 run: the yardstick itself, and what it finds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ferrum_ref.cli.parity_model import forward_of
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_rope import rope_tables
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.parity.model import FLOOR_FACTOR, GrowingKv, ModelVerdict, judge_model
from ferrum_ref.parity.model_report import model_as_json, model_lines, model_table
from ferrum_ref.parity.model_trace import FLOOR, WIDE, Arithmetic, trace_model

Array = np.ndarray[Any, Any]
CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


class Tensors:
    """Weights in memory, in the place of an opened checkpoint."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Array]) -> None:
        self.config, self.tensors = config, dict(tensors)

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        values = self.tensors[name].astype(dtype)
        if out is not None:
            out[...] = values
            return out
        return values


def random_weights(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(CONFIG):
        drawn = rng.standard_normal(shape) * (0.15 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        tensors[name] = drawn.astype(np.float32)
    tensors["model.embed_tokens.weight"] *= np.float32(4.0)
    return Tensors(CONFIG, tensors)


def verdict_on(decoded: Tensors, backend: ComputeBackend | None = None, num_generated: int = 6) -> ModelVerdict:
    """The judge holds the true weights, the decoder those of `decoded`."""
    chosen = backend or make_backend()
    decoder = Decoder(CONFIG, read_decoder_weights(decoded, chosen, num_threads=1), chosen)
    tables = rope_tables(CONFIG.head_dim, len(PROMPT) + num_generated, CONFIG.rope_theta)
    return judge_model(random_weights(), tables, forward_of(decoder), lambda: GrowingKv(chosen), PROMPT, num_generated)


def wide_rms_norm(module: Any, x: Any) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


@pytest.mark.clause("PA-MODEL-1", "PA-MODEL-2")
def test_the_float64_run_is_the_one_of_transformers() -> None:
    """Layer by layer, to the float64 noise: the float32 floor scaled by the ratio of the units."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = random_weights()
    settings = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
        max_position_embeddings=64,
        rms_norm_eps=CONFIG.rms_norm_eps,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(settings).double().eval()
    missing = model.load_state_dict(
        {name: torch.from_numpy(tensor).double() for name, tensor in weights.tensors.items()}, strict=False
    )
    assert missing.missing_keys in ([], ["lm_head.weight"])
    for module in model.modules():  # theirs goes through float32 even in a float64 model
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(wide_rms_norm, module)
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1, dtype=torch.float64), torch.arange(len(PROMPT))[None])
        out = model(ids, output_hidden_states=True)
    half = CONFIG.head_dim // 2
    tables = tuple(table[0, :, :half].double().numpy() for table in (cos, sin))
    traced = dict(trace_model(weights, PROMPT, tables, (WIDE, *FLOOR)))
    wanted = {"embedding": out.hidden_states[0], "layers.0.hidden": out.hidden_states[1]}
    wanted |= {"layers.1.hidden": out.hidden_states[2], "final_norm": out.hidden_states[3], "logits": out.logits}
    for name, tensor in wanted.items():
        theirs, (ours, *floors) = tensor[0].numpy(), traced[name]
        floor = max(np.linalg.norm(one - ours) for one in floors) * 2.0**-29
        assert np.linalg.norm(theirs - ours) <= 2 * FLOOR_FACTOR * floor, name


@pytest.mark.clause("PA-MODEL-1", "PA-MODEL-2", "PA-MODEL-3", "PA-MODEL-4", "PA-MODEL-5")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_an_honest_backend_stays_on_the_floor(name: str) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    from ferrum_ref.plugins import load_backend

    verdict = verdict_on(random_weights(), load_backend(name))
    assert verdict.passed, verdict.faults
    assert [point.name for point in verdict.layers] == [f"layers.{index}.hidden" for index in range(3)]
    assert all(0 < point.error <= FLOOR_FACTOR * point.floor for point in verdict.layers)
    assert verdict.greedy_prefix == verdict.num_generated == 6
    assert verdict.kl_max < 1e-9
    assert verdict.text_token_ids[: len(PROMPT)] == tuple(PROMPT)


@pytest.mark.clause("PA-MODEL-3")
@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layers.1.qkv"),
        ("model.layers.1.self_attn.o_proj.weight", "layers.1.after_attention"),
        ("model.layers.2.mlp.up_proj.weight", "layers.2.gated"),
        ("model.layers.0.mlp.down_proj.weight", "layers.0.hidden"),
        ("model.layers.2.input_layernorm.weight", "layers.2.attention_norm"),
    ],
)
def test_the_first_place_that_goes_wrong_is_named(damaged: str, expected: str) -> None:
    """One row of one weight is off by a part in ten thousand: bits that only the third decimal of a logit shows."""
    weights = random_weights()
    weights.tensors[damaged][0] *= np.float32(1.0001)
    verdict = verdict_on(weights)
    assert verdict.first_outside == expected
    assert any(expected in fault for fault in verdict.faults)


@pytest.mark.clause("PA-MODEL-4", "PA-MODEL-5", "PA-REPORT-5")
def test_a_wrong_head_fails_by_its_logits_and_a_wrong_answer_by_its_tokens() -> None:
    weights = random_weights()
    weights.tensors["model.norm.weight"] = np.flip(weights.tensors["model.norm.weight"]).copy()
    verdict = verdict_on(weights)
    assert verdict.first_outside is None
    assert any("logits err by" in fault for fault in verdict.faults)
    rng = np.random.default_rng(5)
    weights.tensors["model.norm.weight"] = rng.standard_normal(CONFIG.hidden_size).astype(np.float32)
    verdict = verdict_on(weights)
    assert verdict.greedy_prefix < verdict.num_generated
    assert verdict.margin is not None
    assert verdict.margin > 0
    assert any("greedy tokens differ" in fault for fault in verdict.faults)
    text = "\n".join(model_lines(verdict))
    assert "FAILED: " in text
    assert "at the first difference float64 decides by" in text


@pytest.mark.clause("PA-REPORT-5", "PA-REPORT-4")
def test_the_report_names_first_worst_and_last_layer_and_is_json() -> None:
    import json

    verdict = verdict_on(random_weights())
    table = model_table(verdict, "a title")
    assert 2 <= table.row_count <= 3
    document = model_as_json(verdict)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["status"] == "passed"
    assert len(document["layers"]) == 3


@pytest.mark.clause("PA-MODEL-2")
def test_the_second_floor_run_adds_up_the_other_way_round() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((4, 300)).astype(np.float32), rng.standard_normal((5, 300)).astype(np.float32)
    forwards, backwards = Arithmetic(np.float32), Arithmetic(np.float32, reversed_sums=True)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    errors = [np.abs(one.linear(x, weight) - exact).max() for one in (forwards, backwards)]
    assert all(0 < error < 1e-4 for error in errors)
    assert (forwards.linear(x, weight) != backwards.linear(x, weight)).any()


def test_what_the_float64_run_does_not_offer_is_said() -> None:
    weights = random_weights()
    weights.config = DecoderConfig(**{**{f: getattr(CONFIG, f) for f in CONFIG.__slots__}, "attention_bias": True})
    tables = rope_tables(CONFIG.head_dim, 8, CONFIG.rope_theta)
    with pytest.raises(UnsupportedError, match="biases"):
        next(trace_model(weights, PROMPT, tables, (WIDE,)))
