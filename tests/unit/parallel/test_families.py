"""Every family over ranks of one process: the logits are those of the model, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import transformers

from ferrum_ref.parallel.rules import ExpertSharding
from ferrum_ref.types.devices import DataType

MANY = ("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss")


@pytest.mark.clause("TP-RUN-1", "TP-RUN-4", "TP-RUN-6", "TP-RULE-1")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_logits_are_within_the_models_own_bound(
    num_ranks: int, each_family: Any, sharded_logits: Callable[..., Any], single_logits: Callable[..., Any]
) -> None:
    tiny = each_family
    found = sharded_logits(tiny.path, num_ranks, tiny.ids)
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0] - tiny.exact).max() <= tiny.bound
    assert np.abs(found[0] - single_logits(tiny.path, tiny.ids)).max() <= 2 * tiny.bound


@pytest.mark.clause("TP-RULE-5")
@pytest.mark.parametrize("name", MANY)
def test_whole_experts_on_their_ranks(
    name: str, family_model: Callable[..., Any], sharded_logits: Callable[..., Any]
) -> None:
    tiny = family_model(name)
    found = sharded_logits(tiny.path, 4, tiny.ids, ExpertSharding.WHOLE)
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0] - tiny.exact).max() <= tiny.bound


@pytest.mark.clause("TP-RUN-1")
def test_one_rank_is_the_undivided_decoder(
    family_model: Callable[..., Any], sharded_logits: Callable[..., Any], single_logits: Callable[..., Any]
) -> None:
    tiny = family_model("llama")
    assert np.array_equal(sharded_logits(tiny.path, 1, tiny.ids)[0], single_logits(tiny.path, tiny.ids))


@pytest.mark.clause("TP-RUN-1", "TP-RUN-4", "TP-RULE-6")
@pytest.mark.parametrize("num_ranks", [3, 6])
def test_numbers_that_leave_remainders(
    num_ranks: int, tiny_model: Callable[..., Any], sharded_logits: Callable[..., Any]
) -> None:
    """41 features and 67 vocabulary rows over 3 and 6 ranks; 3 key/value heads, each on 1 or on 2 of them."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36, "intermediate_size": 41}
    tiny = tiny_model(transformers.LlamaConfig, **sizes, tie_word_embeddings=True, mlp_bias=True)
    ids = np.random.default_rng(9).integers(3, 67, 40).tolist()
    exact = tiny.exact_logits(ids)
    own_error = np.abs(tiny.single_logits(ids) - exact).max()
    found = sharded_logits(tiny.path, num_ranks, ids)
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0] - exact).max() <= 4 * own_error


@pytest.mark.clause("TP-RUN-1", "TP-RUN-6")
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_another_backend(name: str, family_model: Callable[..., Any], sharded_logits: Callable[..., Any]) -> None:
    tiny = family_model(name)
    found = sharded_logits(tiny.path, 2, tiny.ids, backend="torch")
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0] - tiny.exact).max() <= tiny.bound


@pytest.mark.clause("TP-RUN-2")
def test_a_narrow_type_stays_near_the_undivided_decoders_own_error(
    family_model: Callable[..., Any], sharded_logits: Callable[..., Any], single_logits: Callable[..., Any]
) -> None:
    """In bfloat16 the undivided decoder's distance from float64 says what the type costs; shards cost no more."""
    tiny = family_model("gemma 3")
    found = sharded_logits(tiny.path, 4, tiny.ids, dtype=DataType.BF16)
    floor = np.abs(single_logits(tiny.path, tiny.ids, dtype=DataType.BF16).astype(np.float64) - tiny.exact).max()
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0].astype(np.float64) - tiny.exact).max() <= 4 * floor
