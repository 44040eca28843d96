"""`SteppedLlm`: everything `DecoderLlm` promises, while single tokens go through a decode backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    FerrumError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models import stepped_llm
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.stepped_llm import SteppedLlm
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.plugins import load_backend

IDS = np.random.default_rng(3).integers(0, 97, 40).tolist()


class Spy:
    """A decode backend that counts, and fails when told."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.handed_over: list[tuple[str, int]] = []
        self.steps: list[tuple[str, int]] = []
        self.fails_at: int | None = None  # this many steps from now
        self.fails_late = False

    def decode_step(self, token_id: int, position: int, cache_key: str) -> Any:
        fails = self.fails_at == 0
        self.fails_at = None if self.fails_at in (None, 0) else self.fails_at - 1
        if fails and not self.fails_late:
            raise BackendError("decode_step: told to fail")
        found = self.inner.decode_step(token_id, position, cache_key)
        self.steps.append((cache_key, position))
        if fails:  # the step was taken, and its logits cannot be had
            raise BackendError("decode_step: told to fail late")
        return found

    def init_kv_cache(self, cache_key: str, kv_data: Any, prefill_len: int) -> None:
        self.inner.init_kv_cache(cache_key, kv_data, prefill_len)
        self.handed_over.append((cache_key, prefill_len))

    def has_kv_cache(self, cache_key: str) -> bool:
        return bool(self.inner.has_kv_cache(cache_key))

    def release_kv_cache(self, cache_key: str) -> None:
        self.inner.release_kv_cache(cache_key)


class Pair:
    """The same tiny model as a `DecoderLlm` and as a `SteppedLlm`, and how many rows each forward of the latter ran."""

    def __init__(self, tiny: Any, backend: Any, make: Callable[[Any], Any] | None = None) -> None:
        decoder = Decoder(tiny.config, read_decoder_weights(tiny, backend), backend)
        caches = ContiguousKvFactory(backend, KvShape(3, 2, 8), 96)
        self.plain: DecoderLlm[Any] = DecoderLlm(decoder, caches)
        weights = DecoderTransformerWeights.of_decoder(decoder)
        self.spy = Spy(make(weights) if make else TransformerDecodeBackend(weights, backend))
        self.forwards: list[int] = []

        class Counting(SteppedLlm[Any]):
            def _run(this, caches: Any, batch: Any, inputs: Any = None) -> Any:
                self.forwards.append(batch.num_tokens)
                return super()._run(caches, batch, inputs)

        self.llm: SteppedLlm[Any] = Counting(decoder, caches, self.spy)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def judge(tiny_llama: Any) -> Any:
    tiny = tiny_llama(7)
    exact = tiny.logits(IDS, True)
    return tiny, exact, 2 * np.abs(tiny.logits(IDS, False) - exact).max()


@pytest.fixture
def pair(judge: Any) -> Pair:
    return Pair(judge[0], load_backend("numpy"))


def near(judge: Any, logits: Any, row: int) -> bool:
    assert logits.shape == (97,)
    assert logits.dtype == np.float32
    return bool(np.abs(logits - judge[1][row]).max() <= judge[2])


@pytest.mark.clause("LM-LLM-12")
def test_a_prompt_and_its_decodes_are_those_of_the_decoder_to_the_bit(pair: Pair) -> None:
    for llm in (pair.plain, pair.llm):
        llm.prefill("a", IDS[:30])
    assert pair.spy.handed_over == []
    for pos in range(30, 40):
        assert pair.llm.cache_length("a") == pos
        found = pair.llm.decode("a", IDS[pos], pos)
        np.testing.assert_array_equal(found, pair.plain.decode("a", IDS[pos], pos), strict=True)
    assert pair.spy.handed_over == [("a", 30)]
    assert pair.spy.steps == [("a", pos) for pos in range(30, 40)]
    assert pair.forwards == [30]


@pytest.mark.clause("LM-LLM-12")
@pytest.mark.parametrize("name", ["torch", "numba-cpu"])
def test_a_backends_own_step_decodes(judge: Any, name: str) -> None:
    if name == "numba-cpu":
        pytest.importorskip("numba")
    backend: Any = load_backend(name)
    pair = Pair(judge[0], backend, backend.make_decode_backend)
    assert near(judge, pair.llm.prefill("a", IDS[:7]), 6)
    assert all(near(judge, pair.llm.decode("a", IDS[pos], pos), pos) for pos in range(7, 20))
    assert near(judge, pair.llm.unified_forward([("a", IDS[20:29], 20, True)])[0], 28)
    pair.llm.truncate_kv("a", 15)
    assert all(near(judge, pair.llm.decode("a", IDS[pos], pos), pos) for pos in range(15, 19))
    pair.llm.truncate_kv("a", 0)
    assert near(judge, pair.llm.decode("a", IDS[0], 0), 0)
    assert pair.spy.handed_over == [("a", 7), ("a", 15), ("a", 0)]


@pytest.mark.clause("LM-LLM-3", "LM-LLM-12", "LM-LLM-14")
def test_a_batch_is_a_step_of_each_member_in_order(judge: Any, pair: Pair) -> None:
    for cache_id, length in (("a", 10), ("b", 1), ("c", 25)):
        pair.llm.prefill(cache_id, IDS[:length])
    batch = [("c", IDS[25], 25), ("a", IDS[10], 10), ("b", IDS[1], 1)]
    assert all(near(judge, row, pos) for row, (_, _, pos) in zip(pair.llm.decode_batch(batch), batch, strict=True))
    assert pair.spy.steps == [("c", 25), ("a", 10), ("b", 1)]
    assert pair.llm.decode_batch([]) == []
    pair.llm.release("a")
    assert [pair.spy.has_kv_cache(cache_id) for cache_id in "abc"] == [False, True, True]
    assert near(judge, pair.llm.decode("b", IDS[2], 2), 2)
    pair.llm.prefill("a", IDS[:3])
    assert near(judge, pair.llm.decode("a", IDS[3], 3), 3)
    pair.llm.reset()
    assert not any(pair.spy.has_kv_cache(cache_id) for cache_id in "abc")
    with pytest.raises(NotFoundError):
        pair.llm.cache_length("c")
    assert near(judge, pair.llm.prefill("b", IDS[:4]), 3)
    assert pair.llm.cache_length("b") == 4


@pytest.mark.clause("LM-LLM-13")
def test_a_chunk_after_steps_runs_them_once(judge: Any, pair: Pair) -> None:
    pair.llm.prefill("a", IDS[:5])
    for pos in range(5, 8):
        pair.llm.decode("a", IDS[pos], pos)
    assert near(judge, pair.llm.unified_forward([("a", IDS[8:12], 8, True)])[0], 11)
    assert pair.forwards == [5, 3, 4]
    assert near(judge, pair.llm.forward_verify("a", IDS[12:15])[-97:], 14)
    assert pair.forwards == [5, 3, 4, 3]
    assert near(judge, pair.llm.decode("a", IDS[15], 15), 15)
    assert pair.spy.handed_over == [("a", 5), ("a", 15)]
    assert pair.llm.cache_length("a") == 16


@pytest.mark.clause("LM-LLM-13")
def test_many_steps_are_run_in_several_forwards(judge: Any, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepped_llm, "CATCH_UP_TOKENS", 4)
    pair.llm.prefill("a", IDS[:2])
    for pos in range(2, 11):
        pair.llm.decode("a", IDS[pos], pos)
    rows = pair.llm.forward_verify("a", IDS[11:13]).reshape(2, 97)
    assert all(near(judge, row, 11 + i) for i, row in enumerate(rows))
    assert pair.forwards == [2, 4, 4, 1, 2]


@pytest.mark.clause("LM-LLM-5", "LM-LLM-13")
@pytest.mark.parametrize("kept", [12, 11, 10, 4, 0])
def test_truncated_tokens_are_gone(judge: Any, pair: Pair, kept: int) -> None:
    """10 of the prompt, 2 decoded and wrong from `kept` on: what follows is as if they had never been."""
    pair.llm.prefill("a", [*IDS[:kept], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10][:10])
    for pos in (10, 11):
        pair.llm.decode("a", IDS[pos] if pos < kept else 96 - IDS[pos], pos)
    pair.llm.truncate_kv("a", kept)
    assert pair.llm.cache_length("a") == kept
    assert near(judge, pair.llm.decode("a", IDS[kept], kept), kept)
    assert pair.spy.handed_over == [("a", 10)] if kept == 12 else [("a", 10), ("a", kept)]


@pytest.mark.clause("LM-LLM-6", "LM-LLM-13")
def test_a_mixed_batch_steps_single_final_tokens_of_live_ids(judge: Any, pair: Pair) -> None:
    pair.llm.prefill("a", IDS[:9])
    pair.llm.prefill("b", IDS[:2])
    first = pair.llm.unified_forward(
        [("new", IDS[:5], 0, False), ("a", [IDS[9]], 9, True), ("one", [IDS[0]], 0, True), ("b", [IDS[2]], 2, False)]
    )
    assert first[0] is None
    assert first[3] is None
    assert near(judge, first[1], 9)
    assert near(judge, first[2], 0)
    assert pair.spy.steps == [("a", 9)]
    second = pair.llm.unified_forward(
        [("a", [IDS[10]], 10, False), ("new", IDS[5:33], 5, True), ("b", [IDS[3]], 3, True)]
    )
    assert second[0] is None
    assert near(judge, second[1], 32)
    assert near(judge, second[2], 3)
    assert pair.llm.unified_forward([]) == []


@pytest.mark.clause("LM-LLM-13")
@pytest.mark.parametrize("late", [False, True])
def test_a_failing_step_takes_back_what_came_before_it(judge: Any, pair: Pair, late: bool) -> None:
    lengths = {"a": 10, "b": 4, "c": 7}
    for cache_id, length in lengths.items():
        pair.llm.prefill(cache_id, IDS[:length])
        if cache_id != "c":
            pair.llm.decode(cache_id, IDS[length], length)
            lengths[cache_id] += 1
    pair.spy.fails_late = late

    def refused(call: Callable[[], Any]) -> None:
        pair.spy.fails_at = 1
        with pytest.raises(BackendError, match="told to fail"):
            call()
        assert {cache_id: pair.llm.cache_length(cache_id) for cache_id in lengths} == lengths

    steps = [(cache_id, IDS[lengths[cache_id]], lengths[cache_id]) for cache_id in "ab"]
    refused(lambda: pair.llm.decode_batch(steps))
    items = [
        ("new", IDS[:3], 0, True),
        ("c", IDS[7:9], 7, True),
        *[(name, [token], pos, True) for name, token, pos in steps],
    ]
    refused(lambda: pair.llm.unified_forward(items))
    with pytest.raises(NotFoundError):
        pair.llm.cache_length("new")
    for found, row in zip(pair.llm.unified_forward(items), (2, 8, 11, 5), strict=True):
        assert near(judge, found, row)


@pytest.mark.clause("LM-LLM-12", "LM-LLM-13")
def test_refusals_come_before_any_change(judge: Any, pair: Pair) -> None:
    llm = pair.llm
    llm.prefill("a", IDS[:9])
    llm.decode("a", IDS[9], 9)
    calls: list[tuple[Callable[[], Any], type[FerrumError]]] = [
        (lambda: llm.prefill("a", IDS[:3]), AlreadyExistsError),
        (lambda: llm.decode("a", 1, 9), ModelError),
        (lambda: llm.decode("b", 1, 0), NotFoundError),
        (lambda: llm.decode("a", 97, 10), InvalidParameterError),
        (lambda: llm.decode_batch([("a", 1, 10), ("a", 1, 10)]), ModelError),
        (lambda: llm.decode_batch([("a", 1, 10), ("b", 1, 0)]), NotFoundError),
        (lambda: llm.unified_forward([("a", [1], 10, True), ("b", [1, 97], 0, True)]), InvalidParameterError),
        (lambda: llm.unified_forward([("a", [97], 10, True), ("b", [1, 2], 0, True)]), InvalidParameterError),
        (lambda: llm.unified_forward([("a", [1, 2], 9, True)]), ModelError),
        (lambda: llm.unified_forward([("a", [1], 9, True)]), ModelError),
        (lambda: llm.unified_forward([("b", [1, 2], 4, True)]), NotFoundError),
        (lambda: llm.forward_verify("a", [1] * 90), ResourceExhaustedError),
        (lambda: llm.forward_verify("b", [1]), NotFoundError),
        (lambda: llm.truncate_kv("a", 11), InvalidParameterError),
        (lambda: llm.truncate_kv("a", -1), InvalidParameterError),
        (lambda: llm.truncate_kv("b", 0), NotFoundError),
    ]
    for call, kind in calls:
        with pytest.raises(kind):
            call()
        assert llm.cache_length("a") == 10
    assert llm.forward_verify("a", []).size == 0
    assert near(judge, llm.decode("a", IDS[10], 10), 10)
    llm.forward_verify("a", [1] * 84)
    llm.decode("a", 1, 95)
    with pytest.raises(ResourceExhaustedError):
        llm.decode("a", 1, 96)


@pytest.mark.clause("LM-LLM-8", "LM-LLM-14")
def test_both_copies_are_counted(pair: Pair) -> None:
    pair.llm.prefill("a", IDS[:9])
    before = pair.llm.cache_metrics_snapshot()
    pair.llm.step = pair.spy.inner  # which tells its bytes; the spy does not
    pair.llm.decode("a", IDS[9], 9)
    after = pair.llm.cache_metrics_snapshot()
    assert before is not None
    assert before["num_tokens"] == 9
    held = pair.spy.inner.size_bytes()
    assert held == 64 * 2 * 3 * 2 * 8 * 4  # capacity, K and V, layers, heads, size, float32
    assert after == {"num_caches": 1, "num_tokens": 10, "size_bytes": before["size_bytes"] + held}


CALLS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(1, 9)),
    st.tuples(st.just("decode"), st.integers(1, 5)),
    st.tuples(st.just("chunk"), st.integers(1, 5)),
    st.tuples(st.just("verify"), st.integers(0, 4)),
    st.tuples(st.just("truncate"), st.integers(0, 12)),
    st.tuples(st.just("release"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


def called(llm: Any, call: str, number: int, cache_id: str, tokens: list[int]) -> Any:
    """Logits `[n, V]`, or the kind of error."""
    try:
        if call == "prefill":
            return llm.prefill(cache_id, tokens[:number])[None]
        if call == "release":
            return llm.release(cache_id)
        if call == "reset":
            return llm.reset()
        length = llm.cache_length(cache_id)
        if call == "decode":
            return np.stack([llm.decode(cache_id, tokens[i], length + i) for i in range(number)])
        if call == "chunk":
            return llm.unified_forward([(cache_id, tokens[:number], length, True)])[0][None]
        if call == "verify":
            return llm.forward_verify(cache_id, tokens[:number]).reshape(number, 97)
        return llm.truncate_kv(cache_id, number)
    except FerrumError as error:
        return type(error)


@pytest.mark.clause("LM-LLM-12", "LM-LLM-13", "LM-LLM-14")
@settings(max_examples=40)
@given(st.lists(st.tuples(CALLS, st.sampled_from("ab"), st.integers(0, 2**31)), max_size=14))
def test_any_history_is_that_of_the_decoder(judge: Any, history: list[Any]) -> None:
    """Two engines within the bound of the truth differ by at most twice it; ten times, as every text has its own."""
    pair = Pair(judge[0], load_backend("numpy"))
    for (call, number), cache_id, seed in history:
        tokens = np.random.default_rng(seed).integers(0, 97, 10).tolist()
        wanted, found = (called(llm, call, number, cache_id, tokens) for llm in (pair.plain, pair.llm))
        if not isinstance(wanted, np.ndarray):
            assert found == wanted
            continue
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max(initial=0) <= 10 * judge[2]
        assert pair.llm.cache_length(cache_id) == pair.plain.cache_length(cache_id)
