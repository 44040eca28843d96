"""Steps and their order, several sequences, threads, and what a refused call leaves behind."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from ferrum_ref.errors import BackendError, FerrumError, NotFoundError, ResourceExhaustedError
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionOps

IDS = np.random.default_rng(3).integers(0, 97, 90).tolist()


@pytest.mark.clause("DB-STEP-3", "DB-STEP-4", "DB-STEP-5")
def test_refused_steps_change_nothing(tiny_llama: Any, make_bench: Any) -> None:
    bench = make_bench(tiny_llama(7), max_tokens=6)
    decode = bench.decode
    with pytest.raises(NotFoundError, match="'a' is unknown; hand a prefill over first"):
        decode.decode_step(1, 0, "a")
    decode.init_kv_cache("a", bench.no_kv(), 0)
    expected = make_bench(tiny_llama(7))
    expected.decode.init_kv_cache("a", expected.no_kv(), 0)
    right = expected.steps("a", IDS[:6])
    for i in range(6):
        for position in (i + 1, i - 1, -1, 2**40):
            with pytest.raises(BackendError, match=f"position: got {position}, expected {i}"):
                decode.decode_step(IDS[i], position, "a")
        for token in (-1, 97, 2**32):
            with pytest.raises(BackendError, match=rf"token_id: got {token}, expected \[0, 97\)"):
                decode.decode_step(token, i, "a")
        np.testing.assert_array_equal(decode.decode_step(IDS[i], i, "a").to_numpy()[0, 0], right[i])
    with pytest.raises(ResourceExhaustedError, match="'a' holds 6 tokens, the whole context of 6"):
        decode.decode_step(1, 6, "a")
    assert decode.cached_tokens("a") == decode.max_tokens == 6
    assert TransformerDecodeBackend(bench.weights, bench.compute, max_tokens=500).max_tokens == 96


@pytest.mark.clause("DB-STEP-5")
def test_a_kernel_that_fails_leaves_the_sequence_as_it_was(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, make_bench: Any
) -> None:
    bench = make_bench(tiny_llama(7))
    bench.decode.init_kv_cache("a", bench.no_kv(), 0)
    right = bench.steps("a", IDS[:3])
    bench.decode.init_kv_cache("a", bench.no_kv(), 0)
    bench.steps("a", IDS[:2])
    attention, calls = bench.decode._attention, []

    class Failing(AttentionOps):
        def attention(self, q: Any, k: Any, v: Any, params: Any) -> Any:
            calls.append(k.shape())
            if len(calls) == 2:
                raise BackendError("attention: out of order")
            return attention.attention(q, k, v, params)

    monkeypatch.setattr(bench.decode, "_attention", Failing())
    with pytest.raises(BackendError, match="out of order"):
        bench.decode.decode_step(IDS[2], 2, "a")
    monkeypatch.undo()
    assert bench.decode.cached_tokens("a") == 2
    np.testing.assert_array_equal(bench.decode.decode_step(IDS[2], 2, "a").to_numpy()[0, 0], right[2])


class Sequences(RuleBasedStateMachine):
    """Any interleaving of steps, hand-overs and releases gives each sequence what it would get alone."""

    bench: Any
    right: Any  # logits of each of four texts, alone
    texts: Any

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, tuple[int, int]] = {}  # key -> (text, tokens cached)

    @initialize()
    def release_all(self) -> None:
        for key in "abcd":
            self.bench.decode.release_kv_cache(key)

    @rule(target=keys, key=st.sampled_from("abcd"), text=st.integers(0, 3))
    def start(self, key: str, text: int) -> str:
        self.bench.decode.init_kv_cache(key, self.bench.no_kv(), 0)
        self.model[key] = (text, 0)
        return key

    @precondition(lambda self: self.model)
    @rule(key=keys, num_steps=st.integers(1, 3))
    def step(self, key: str, num_steps: int) -> None:
        for _ in range(num_steps):
            if key not in self.model:
                with pytest.raises(NotFoundError):
                    self.bench.decode.decode_step(0, 0, key)
                return
            text, cached = self.model[key]
            if cached == len(self.texts[text]):
                return
            found = self.bench.decode.decode_step(self.texts[text][cached], cached, key).to_numpy()[0, 0]
            np.testing.assert_array_equal(found, self.right[text][cached])
            self.model[key] = (text, cached + 1)

    @rule(key=consumes(keys))
    def release(self, key: str) -> None:
        self.bench.decode.release_kv_cache(key)
        self.model.pop(key, None)

    @invariant()
    def the_same_keys_and_lengths(self) -> None:
        for key in "abcd":
            assert self.bench.decode.has_kv_cache(key) == (key in self.model)
            if key in self.model:
                assert self.bench.decode.cached_tokens(key) == self.model[key][1]


@pytest.mark.clause("DB-CACHE-1", "DB-CACHE-3", "DB-INIT-3")
def test_interleaved_sequences(tiny_llama: Any, make_bench: Any) -> None:
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test

    bench = make_bench(tiny_llama(7))
    Sequences.bench = bench
    Sequences.texts = [IDS[start : start + 15] for start in (0, 20, 40, 60)]
    Sequences.right = []
    for i, text in enumerate(Sequences.texts):
        bench.decode.init_kv_cache(f"alone {i}", bench.no_kv(), 0)
        Sequences.right.append(bench.steps(f"alone {i}", text))
    run_state_machine_as_test(Sequences, settings=settings(max_examples=20, stateful_step_count=25))


@pytest.mark.clause("DB-CACHE-3", "DB-CACHE-2")
def test_bookkeeping(tiny_llama: Any, make_bench: Any) -> None:
    bench = make_bench(tiny_llama(7))
    decode: Any = bench.decode
    assert isinstance(decode, DecodeBackend)
    assert decode.name() == "transformer on numpy"
    assert not decode.has_kv_cache("x")
    decode.release_kv_cache("x")
    decode.init_kv_cache("x", bench.no_kv(), 0)
    token_bytes = bench.shape.bytes_per_token()
    assert decode.size_bytes() == 64 * token_bytes
    bench.steps("x", IDS[:65])
    assert decode.size_bytes() == 96 * token_bytes  # doubled, and cut at the context
    decode.release_kv_cache("x")
    assert decode.size_bytes() == 0
    with pytest.raises(NotFoundError):
        decode.cached_tokens("x")


@pytest.mark.clause("DB-CACHE-4")
def test_threads_take_turns(bench: Any) -> None:
    bench.decode.init_kv_cache("one", bench.no_kv(), 0)
    right = bench.steps("one", IDS[:20])
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            bench.decode.init_kv_cache(f"thread {number}", bench.no_kv(), 0)
            results[number] = bench.steps(f"thread {number}", IDS[:20])
        except FerrumError as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(results[number], right)


@pytest.mark.clause("DB-CACHE-4")
def test_of_threads_that_take_one_step_one_succeeds(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, make_bench: Any
) -> None:
    bench = make_bench(tiny_llama(7))
    bench.decode.init_kv_cache("one", bench.no_kv(), 0)
    attention, others, outcomes = bench.decode._attention, threading.Semaphore(0), []

    class Patient(AttentionOps):
        """Gives another thread time to come in, which it must not."""

        def attention(self, q: Any, k: Any, v: Any, params: Any) -> Any:
            others.release()
            others.acquire(timeout=0.02)
            others.acquire(timeout=0.02)
            return attention.attention(q, k, v, params)

        def write_kv(self, cache: Any, rows: Any, slots: Any) -> None:
            attention.write_kv(cache, rows, slots)

    monkeypatch.setattr(bench.decode, "_attention", Patient())

    def work() -> None:
        try:
            outcomes.append(bench.decode.decode_step(IDS[0], 0, "one").shape())
        except BackendError as error:
            outcomes.append("position: got 0, expected 1" in str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [(1, 1, 97), True, True]
    assert bench.decode.cached_tokens("one") == 1
