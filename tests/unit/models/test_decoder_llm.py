"""`DecoderOnlyLLM` over the decoder: what each call gives, refuses, and leaves untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    AlreadyExistsError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.llm import DecoderOnlyLLM, LlmRuntimeConfig
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend

IDS = np.random.default_rng(3).integers(0, 97, 40).tolist()


@pytest.fixture(scope="module")
def judge(tiny_llama: Any) -> Any:
    tiny = tiny_llama(7)
    exact = tiny.logits(IDS, True)
    bound = 2 * np.abs(tiny.logits(IDS, False) - exact).max()
    return tiny, exact, bound


@pytest.fixture
def llm(judge: Any) -> DecoderLlm[Any]:
    tiny, backend = judge[0], make_backend()
    decoder = Decoder(tiny.config, read_decoder_weights(tiny, backend), backend)
    return DecoderLlm(decoder, ContiguousKvFactory(backend, KvShape(3, 2, 8), 96))


def near(judge: Any, logits: Any, row: int) -> bool:
    assert logits.shape == (97,)
    assert logits.dtype == np.float32
    return bool(np.abs(logits - judge[1][row]).max() <= judge[2])


@pytest.mark.clause("LM-LLM-1", "LM-LLM-2")
def test_prefill_then_decode(judge: Any, llm: DecoderLlm[Any]) -> None:
    assert near(judge, llm.prefill("a", IDS[:30]), 29)
    for pos in range(30, 40):
        assert llm.cache_length("a") == pos
        assert near(judge, llm.decode("a", IDS[pos], pos), pos)


@pytest.mark.clause("LM-LLM-3")
def test_a_batch_is_each_of_its_members(judge: Any, llm: DecoderLlm[Any]) -> None:
    for cache_id, length in (("a", 10), ("b", 1), ("c", 25)):
        llm.prefill(cache_id, IDS[:length])
    for step in range(5):
        batch = [("c", IDS[25 + step], 25 + step), ("a", IDS[10 + step], 10 + step), ("b", IDS[1 + step], 1 + step)]
        rows = llm.decode_batch_with_full_logits(batch, True) if step else llm.decode_batch(batch)
        assert all(near(judge, row, pos) for row, (_, _, pos) in zip(rows, batch, strict=True))
    assert llm.decode_batch([]) == []


@pytest.mark.clause("LM-LLM-6")
def test_mixed_forward_of_chunks_and_decodes(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prefill("a", IDS[:9])
    first = llm.unified_forward([("new", IDS[:5], 0, False), ("a", [IDS[9]], 9, True), ("one", [IDS[0]], 0, True)])
    assert first[0] is None
    assert near(judge, first[1], 9)
    assert near(judge, first[2], 0)
    second = llm.unified_forward([("a", [IDS[10]], 10, False), ("new", IDS[5:33], 5, True)])
    assert second[0] is None
    assert near(judge, second[1], 32)


@pytest.mark.clause("LM-LLM-5")
def test_verify_starts_where_the_cache_ends(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prefill("a", IDS[:20])
    rows = llm.forward_verify("a", IDS[20:26]).reshape(6, 97)
    assert all(near(judge, row, 20 + i) for i, row in enumerate(rows))
    assert llm.cache_length("a") == 26
    llm.truncate_kv("a", 22)  # four drafts rejected
    assert near(judge, llm.decode("a", IDS[22], 22), 22)
    assert llm.forward_verify("a", []).shape == (0,)


@pytest.mark.clause("LM-LLM-5")
def test_the_default_verify_starts_there_too(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prefill("a", IDS[:20])
    rows = DecoderOnlyLLM.forward_verify(llm, "a", IDS[20:23]).reshape(3, 97)
    assert all(near(judge, row, 20 + i) for i, row in enumerate(rows))
    assert DecoderOnlyLLM.forward_verify(llm, "a", []).shape == (0,)


Refusal = tuple[Callable[[DecoderLlm[Any]], object], type[Exception], str]
REFUSALS: dict[str, Refusal] = {
    "live id": (lambda llm: llm.prefill("a", [1]), AlreadyExistsError, "live"),
    "empty prompt": (lambda llm: llm.prefill("x", []), ModelError, "empty"),
    "long prompt": (lambda llm: llm.prefill("x", [1] * 97), ResourceExhaustedError, "context"),
    "bad id in prompt": (lambda llm: llm.prefill("x", [1, 97]), InvalidParameterError, "token id"),
    "unknown cache": (lambda llm: llm.decode("x", 1, 0), NotFoundError, "'x'"),
    "position behind": (lambda llm: llm.decode("a", 1, 9), ModelError, "position 9"),
    "position ahead": (lambda llm: llm.decode("a", 1, 11), ModelError, "position 11"),
    "bad id": (lambda llm: llm.decode("a", -1, 10), InvalidParameterError, "token id"),
    "twice in a batch": (lambda llm: llm.decode_batch([("a", 1, 10), ("a", 2, 11)]), ModelError, "twice"),
    "one bad of two": (
        lambda llm: llm.decode_batch([("a", 1, 10), ("full", 2, 96)]),
        ResourceExhaustedError,
        "context",
    ),
    "chunk of unknown": (lambda llm: llm.unified_forward([("x", [1], 4, True)]), NotFoundError, "'x'"),
    "verify unknown": (lambda llm: llm.forward_verify("x", [1]), NotFoundError, "'x'"),
    "verify too many": (lambda llm: llm.forward_verify("a", [1] * 87), ResourceExhaustedError, "context"),
    "truncate beyond": (lambda llm: llm.truncate_kv("a", 11), InvalidParameterError, "truncate"),
    "truncate unknown": (lambda llm: llm.truncate_kv("x", 0), NotFoundError, "'x'"),
    "prepare less than nothing": (lambda llm: llm.prepare("a", -1), InvalidParameterError, "max_tokens"),
    "prepare too much": (lambda llm: llm.prepare("a", 97), ResourceExhaustedError, "context"),
    "adapter": (lambda llm: llm.set_lora_adapter_for_cache("a", "x"), UnsupportedError, "adapter"),
}


@pytest.mark.clause("LM-LLM-1", "LM-LLM-2", "LM-LLM-3")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_call_changes_nothing(judge: Any, llm: DecoderLlm[Any], name: str) -> None:
    call, error, text = REFUSALS[name]
    llm.prefill("a", IDS[:10])
    llm.prefill("full", [1] * 96)
    before = llm.cache_metrics_snapshot()
    with pytest.raises(error, match=text):
        call(llm)
    after = llm.cache_metrics_snapshot()
    assert before is not None
    assert after is not None
    assert (after["num_caches"], after["num_tokens"]) == (2, 106) == (before["num_caches"], before["num_tokens"])
    assert near(judge, llm.decode("a", IDS[10], 10), 10)


@pytest.mark.clause("LM-LLM-4")
def test_release_and_reset(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prefill("a", IDS[:3])
    llm.prefill("b", IDS[:3])
    llm.release("nobody")
    llm.release("a")
    with pytest.raises(NotFoundError):
        llm.cache_length("a")
    assert llm.cache_length("b") == 3
    assert near(judge, llm.prefill("a", IDS[:12]), 11)  # the id is free again
    llm.reset()
    assert llm.cache_metrics_snapshot() == {"num_caches": 0, "num_tokens": 0, "size_bytes": 0}


@pytest.mark.clause("LM-LLM-4")
def test_prepared_room_is_not_used_room(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prepare("nobody", 10)
    llm.release("nobody")
    llm.prefill("a", IDS[:20])
    llm.prepare("a", 96)
    assert llm.cache_metrics_snapshot() == {"num_caches": 1, "num_tokens": 20, "size_bytes": 96 * 2 * 3 * 2 * 8 * 4}
    assert near(judge, llm.decode("a", IDS[20], 20), 20)


@pytest.mark.clause("LM-LLM-1")
def test_config_tells_the_sizes(llm: DecoderLlm[Any]) -> None:
    assert llm.config() == LlmRuntimeConfig(32, 3, 2, 8, 97, 96)
    assert llm.kv_capacity() == 96
    llm.set_lora_adapter_for_cache("a", None)
    assert llm.lora_metrics_snapshot() is None


@pytest.mark.clause("LM-LLM-7", "LM-LLM-8")
def test_prepare_before_prefill(judge: Any, llm: DecoderLlm[Any]) -> None:
    token_bytes = 2 * 3 * 2 * 8 * 4
    llm.prepare("a", 90)
    assert llm.cache_metrics_snapshot() == {"num_caches": 0, "num_tokens": 0, "size_bytes": 96 * token_bytes}
    with pytest.raises(NotFoundError):
        llm.cache_length("a")
    assert near(judge, llm.prefill("a", IDS[:30]), 29)
    assert llm.cache_metrics_snapshot() == {"num_caches": 1, "num_tokens": 30, "size_bytes": 96 * token_bytes}
    llm.prepare("b", 10)
    (row,) = llm.unified_forward([("b", IDS[:4], 0, True)])
    assert near(judge, row, 3)
    llm.prepare("c", 1)
    llm.release("c")
    llm.prepare("d", 1)
    llm.reset()
    assert llm.cache_metrics_snapshot() == {"num_caches": 0, "num_tokens": 0, "size_bytes": 0}
    for wrong, error in ((-1, InvalidParameterError), (97, ResourceExhaustedError)):
        with pytest.raises(error):
            llm.prepare("e", wrong)
    assert llm.cache_metrics_snapshot() == {"num_caches": 0, "num_tokens": 0, "size_bytes": 0}


@pytest.mark.clause("LM-LLM-7", "LM-LLM-1")
def test_a_refused_prefill_keeps_what_was_prepared(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prepare("a", 5)
    before = llm.cache_metrics_snapshot()
    with pytest.raises(InvalidParameterError):
        llm.prefill("a", [1, 97])
    assert llm.cache_metrics_snapshot() == before
    assert near(judge, llm.prefill("a", IDS[:3]), 2)


@pytest.mark.clause("LM-LLM-9", "LM-LLM-10")
def test_adapters_and_capacity(judge: Any, llm: DecoderLlm[Any]) -> None:
    llm.prefill("a", IDS[:96] if len(IDS) > 96 else IDS)
    with pytest.raises(UnsupportedError, match="'style'"):
        llm.set_lora_adapter_for_cache("a", "style")
    assert llm.lora_metrics_snapshot() is None
    assert llm.kv_capacity() == 96
    llm.prefill("b", [1] * 96)
    with pytest.raises(ResourceExhaustedError):
        llm.decode("b", 1, 96)
