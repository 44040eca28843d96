"""The bookkeeping that decode backends share, over a backend whose logits tell what it was given."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.decode_sequences import SequenceDecodeBackend, check_max_tokens, doubled_capacity
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig
from ferrum_ref.numpy_backend.tensor import NumpyTensor
from ferrum_ref.types.devices import DataType

CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=8,
    vocab_size=11,
    max_seq_len=9,
    rms_norm_eps=1e-5,
    has_qk_norm=False,
)


class Tokens:
    """The tokens seen, in place of keys and values."""

    def __init__(self, tokens: list[int]) -> None:
        self.num_tokens, self.tokens = len(tokens), tokens

    def size_bytes(self) -> int:
        return 10 * len(self.tokens)


class Recorder(SequenceDecodeBackend[Tokens]):
    """Logits `[token, position, token seen first]`; token 7 fails after it has been written down."""

    inside = 0
    most_inside = 0

    def name(self) -> str:
        return "recorder"

    def _begun(self, kv_data: Sequence[tuple[TensorRef, TensorRef]], prefill_len: int) -> Tokens:
        if prefill_len == 5:
            raise BackendError("no memory")
        return Tokens([int(value) for value in kv_data[0][0].to_numpy()[:prefill_len, 0, 0]])

    def _stepped(self, sequence: Tokens, token_id: int, position: int) -> TensorRef:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        threading.Event().wait(0.001)
        self.inside -= 1
        sequence.tokens[position:] = [token_id]
        if token_id == 7:
            raise BackendError("a kernel failed")
        return NumpyTensor(np.array([[[token_id, position, sequence.tokens[0]]]], np.float32))


def made(max_tokens: int | None = None) -> Recorder:
    return Recorder(CONFIG, DataType.FP32, max_tokens)


def kv(*tokens: int, dtype: Any = np.float32) -> list[Any]:
    rows = np.repeat(np.array(tokens, dtype).reshape(-1, 1, 1), 4, axis=2)
    return [(NumpyTensor(rows), NumpyTensor(rows))] * 2


def told(tensor: TensorRef) -> list[float]:
    return list(tensor.to_numpy()[0, 0])


@pytest.mark.clause("DB-BASE-1", "DB-CACHE-3", "DB-STEP-4", "DB-INIT-1", "DB-INIT-3")
def test_keys_and_lengths_are_kept() -> None:
    decode = made()
    decode.init_kv_cache("a", kv(3, 4), 2)
    decode.init_kv_cache("b", kv(5, 6, 9), 1)
    assert told(decode.decode_step(1, 2, "a")) == [1, 2, 3]
    assert told(decode.decode_step(2, 1, "b")) == [2, 1, 5]
    assert [decode.cached_tokens(key) for key in "ab"] == [3, 2]
    assert decode.size_bytes() == 50
    decode.init_kv_cache("a", kv(8), 1)
    assert told(decode.decode_step(1, 1, "a")) == [1, 1, 8]
    decode.release_kv_cache("a")
    decode.release_kv_cache("a")
    assert [decode.has_kv_cache(key) for key in "abc"] == [False, True, False]
    with pytest.raises(NotFoundError, match="'a' is unknown; hand a prefill over first"):
        decode.decode_step(1, 0, "a")
    with pytest.raises(NotFoundError):
        decode.cached_tokens("a")


@pytest.mark.clause("DB-BASE-1", "DB-STEP-3", "DB-STEP-4", "DB-STEP-5")
@pytest.mark.parametrize(
    ("token", "position", "kind", "complaint"),
    [
        (1, 1, BackendError, "position: got 1, expected 2, the number of tokens cached of 'a'"),
        (1, 3, BackendError, "position: got 3, expected 2"),
        (11, 2, BackendError, r"token_id: got 11, expected \[0, 11\)"),
        (-1, 2, BackendError, "token_id: got -1"),
        (7, 2, BackendError, "a kernel failed"),
    ],
)
def test_a_refused_step_changes_nothing(token: int, position: int, kind: type[Exception], complaint: str) -> None:
    decode = made(max_tokens=4)
    decode.init_kv_cache("a", kv(3, 4), 2)
    with pytest.raises(kind, match=complaint):
        decode.decode_step(token, position, "a")
    assert decode.cached_tokens("a") == 2
    assert told(decode.decode_step(10, 2, "a")) == [10, 2, 3]
    assert told(decode.decode_step(0, 3, "a")) == [0, 3, 3]
    with pytest.raises(ResourceExhaustedError, match="'a' holds 4 tokens, the whole context of 4; release it"):
        decode.decode_step(0, 4, "a")


@pytest.mark.clause("DB-BASE-1", "DB-INIT-4")
@pytest.mark.parametrize(
    ("data", "length", "kind", "complaint"),
    [
        (kv(1, 2)[:1], 1, BackendError, "got 1 layers and prefill_len 1, expected 2 pairs"),
        (kv(1, 2), -1, BackendError, "prefill_len -1"),
        (kv(1, 2), 3, BackendError, r"K of layer 0 has shape \(2, 1, 4\), expected \[at least 3, 1, 4\]"),
        (kv(*range(9)), 7, ResourceExhaustedError, "7 tokens exceed the context of 6"),
        (kv(1, 2, dtype=np.float16), 2, BackendError, "K of layer 0 is fp16, expected fp32 like the weights"),
        ([kv(1)[0], (kv(1)[0][0], NumpyTensor(np.zeros((1, 4), np.float32)))], 1, BackendError, "V of layer 1 has"),
        (kv(*range(5)), 5, BackendError, "no memory"),
    ],
)
def test_a_refused_hand_over_leaves_what_was_there(
    data: list[Any], length: int, kind: type[Exception], complaint: str
) -> None:
    decode = made(max_tokens=6)
    decode.init_kv_cache("a", kv(3), 1)
    for key in ("a", "never"):
        with pytest.raises(kind, match=complaint):
            decode.init_kv_cache(key, data, length)
    assert told(decode.decode_step(1, 1, "a")) == [1, 1, 3]
    assert not decode.has_kv_cache("never")


@pytest.mark.clause("DB-BASE-1", "DB-CACHE-4")
def test_steps_of_several_threads_take_turns() -> None:
    decode = made()
    for key in "abcd":
        decode.init_kv_cache(key, kv(), 0)

    def work(key: str) -> None:
        for position in range(9):
            decode.decode_step(position, position, key) if position != 7 else decode.decode_step(1, 7, key)

    threads = [threading.Thread(target=work, args=(key,)) for key in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decode.most_inside == 1
    assert [decode.cached_tokens(key) for key in "abcd"] == [9] * 4


@pytest.mark.clause("DB-BASE-1")
def test_the_context_is_the_smaller_bound() -> None:
    assert [made(limit).max_tokens for limit in (None, 3, 9, 500)] == [9, 3, 9, 9]


@pytest.mark.clause("DB-BASE-2")
@given(first=st.integers(1, 100), num_tokens=st.integers(0, 5000), most=st.integers(1, 5000))
def test_capacities_double_up_to_the_context(first: int, num_tokens: int, most: int) -> None:
    capacity = doubled_capacity(num_tokens, most, first)
    assert min(num_tokens, most) <= capacity <= most
    assert capacity == most or (capacity % first == 0 and (capacity // first).bit_count() == 1)
    assert capacity in (first, most) or capacity < 2 * num_tokens  # no step too many
    assert (doubled_capacity(65, 1000), doubled_capacity(65, 100)) == (128, 100)


@pytest.mark.clause("DB-BASE-2")
@pytest.mark.parametrize("bad", [0, -3])
def test_a_bound_below_one_is_refused(bad: int) -> None:
    check_max_tokens("X", None)
    check_max_tokens("X", 1)
    with pytest.raises(InvalidParameterError, match=f"X: max_tokens is {bad}, expected at least 1"):
        check_max_tokens("X", bad)
