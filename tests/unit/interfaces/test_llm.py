"""The trait's own bodies, on a decoder with only what it must have: its logits name the last token and its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    FerrumError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.llm import DecoderOnlyLLM, LlmRuntimeConfig, Logits

VOCAB, CONTEXT = 10, 8


class Recorder(DecoderOnlyLLM):
    """Caches are lists of tokens; logits `[V]`: token * 100 + position everywhere."""

    def __init__(self) -> None:
        self.caches: dict[str, list[int]] = {}

    def config(self) -> LlmRuntimeConfig:
        return LlmRuntimeConfig(4, 1, 1, 4, VOCAB, CONTEXT)

    def prefill(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        self.caches[cache_id] = list(tokens)
        return np.full(VOCAB, tokens[-1] * 100 + len(tokens) - 1, np.float32)

    def decode(self, cache_id: str, token: int, pos: int) -> Logits:
        self.caches[cache_id].append(token)
        return np.full(VOCAB, token * 100 + pos, np.float32)

    def release(self, cache_id: str) -> None:
        self.caches.pop(cache_id, None)


class Telling(Recorder):
    """Tells the lengths too."""

    def cache_length(self, cache_id: str) -> int:
        if cache_id not in self.caches:
            raise NotFoundError(f"no cache {cache_id!r}")
        return len(self.caches[cache_id])


@pytest.fixture
def llm() -> Telling:
    model = Telling()
    model.prefill("a", [1, 2, 3])
    model.prefill("full", [1] * CONTEXT)
    return model


@pytest.mark.clause("LM-LLM-5", "LM-LLM-11")
def test_verify_appends_at_the_end(llm: Telling) -> None:
    rows = llm.forward_verify("a", [7, 8]).reshape(2, VOCAB)
    assert rows[:, 0].tolist() == [703, 804]  # upstream: positions 0 and 1, that is 700 and 801
    assert llm.caches["a"] == [1, 2, 3, 7, 8]
    assert llm.forward_verify("a", []).shape == (0,)


Call = tuple[Callable[[DecoderOnlyLLM], Any], type[FerrumError]]
REFUSED: dict[str, Call] = {
    "unknown second": (lambda m: m.decode_batch([("a", 1, 3), ("x", 1, 0)]), NotFoundError),
    "wrong second position": (lambda m: m.decode_batch([("a", 1, 3), ("full", 1, 2)]), ModelError),
    "full second": (lambda m: m.decode_batch([("a", 1, 3), ("full", 1, CONTEXT)]), ResourceExhaustedError),
    "bad second token": (lambda m: m.decode_batch([("a", 1, 3), ("a2", VOCAB, 0)]), FerrumError),
    "twice": (lambda m: m.decode_batch([("a", 1, 3), ("a", 1, 4)]), ModelError),
    "bad verify token": (lambda m: m.forward_verify("a", [1, VOCAB]), InvalidParameterError),
    "too much to verify": (lambda m: m.forward_verify("a", [1] * 6), ResourceExhaustedError),
    "verify unknown": (lambda m: m.forward_verify("x", [1]), NotFoundError),
}


@pytest.mark.clause("LM-LLM-11", "LM-LLM-3")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_token_runs(llm: Telling, name: str) -> None:
    call, error = REFUSED[name]
    with pytest.raises(error):
        call(llm)
    assert llm.caches == {"a": [1, 2, 3], "full": [1] * CONTEXT}


@pytest.mark.clause("LM-LLM-11")
def test_what_is_not_told_cannot_be_checked() -> None:
    model = Recorder()
    model.prefill("a", [1])
    assert model.decode_batch([("a", 5, 1)])[0][0] == 501
    for call in (
        lambda: model.cache_length("a"),
        lambda: model.forward_verify("a", [1]),
        lambda: model.truncate_kv("a", 0),
        lambda: model.unified_forward([("a", [1], 1, True)]),
    ):
        with pytest.raises(UnsupportedError, match="Recorder"):
            call()


@pytest.mark.clause("LM-LLM-7", "LM-LLM-8", "LM-LLM-9", "LM-LLM-10")
def test_the_quiet_defaults(llm: Telling) -> None:
    assert llm.kv_capacity() == CONTEXT
    assert llm.cache_metrics_snapshot() is None
    assert llm.lora_metrics_snapshot() is None
    llm.prepare("a", 5)
    llm.reset()
    llm.set_lora_adapter_for_cache("never seen", None)
    with pytest.raises(UnsupportedError, match="'style'"):
        llm.set_lora_adapter_for_cache("a", "style")
    assert llm.caches["a"] == [1, 2, 3]
    for forced in (True, False):
        (row,) = llm.decode_batch_with_full_logits([("a", 4, len(llm.caches["a"]))], forced)
        assert row.shape == (VOCAB,)


@pytest.mark.clause("LM-LLM-11")
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("wrong", [-1, 2**64, 1.0])
def test_runtime_config_holds_unsigned_numbers(index: int, wrong: Any) -> None:
    values: list[Any] = [1] * 6
    values[index] = wrong
    with pytest.raises(InvalidParameterError, match="LlmRuntimeConfig"):
        LlmRuntimeConfig(*values)
