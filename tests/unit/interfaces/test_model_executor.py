"""Executor inputs, outputs, unified batches, the memory model, and what the contract provides by default."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.interfaces.model_executor import (
    AttentionType,
    DecodeInput,
    DecodeOutput,
    ExecutorState,
    MemoryRequirements,
    ModelExecutor,
    PrefillInput,
    PrefillOutput,
    UnifiedBatch,
    UnifiedBatchItem,
)
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.parity_mode import ParityMode

FACTORY = make_backend().tensor_factory()


def ids(*shape: int) -> Any:
    return FACTORY.from_numpy(np.zeros(shape, dtype=np.uint32))


@pytest.mark.clause("MX-INPUT-1")
@pytest.mark.parametrize(("shape", "batch", "length"), [((7,), 1, 7), ((1, 7), 1, 7), ((3, 5), 3, 5), ((0,), 1, 0)])
def test_a_vector_of_ids_is_one_sequence(shape: tuple[int, ...], batch: int, length: int) -> None:
    prefill = PrefillInput.new(ids(*shape))
    assert (prefill.batch_size(), prefill.sequence_length()) == (batch, length)
    assert DecodeInput.new(ids(*shape), None).batch_size() == batch  # type: ignore[arg-type]


@pytest.mark.clause("MX-INPUT-1")
def test_upstreams_reading_is_there_to_compare_with() -> None:
    """D-44: `[7]` reads as 7 sequences of one token; a scalar crashes upstream and stays an error."""
    mode = ParityMode.UPSTREAM
    for shape, batch, length in (((7,), 7, 1), ((3, 5), 3, 5), ((2, 4, 6), 2, 4)):
        prefill = PrefillInput.new(ids(*shape))
        assert (prefill.batch_size(mode), prefill.sequence_length(mode)) == (batch, length)
        assert DecodeInput.new(ids(*shape), None).batch_size(mode) == batch  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="input_ids"):
        PrefillInput.new(ids()).batch_size(mode)


@pytest.mark.clause("MX-INPUT-1")
@pytest.mark.parametrize("shape", [(), (1, 2, 3)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    prefill = PrefillInput.new(ids(*shape))
    for call in (prefill.batch_size, prefill.sequence_length, DecodeInput.new(ids(*shape), None).batch_size):  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="input_ids"):
            call()


@pytest.mark.clause("MX-INPUT-2")
def test_builders_return_changed_copies() -> None:
    handle: Any = object()
    first = PrefillInput.new(ids(4))
    assert dataclasses.asdict(first)["metadata"] == {}
    assert (first.attention_mask, first.position_ids, first.kv_cache, first.last_only) == (None, None, None, False)
    full = first.with_kv_cache(handle).with_attention_mask(ids(1, 4)).with_position_ids(ids(1, 4)).with_last_only()
    full = full.with_metadata({"a": 1}).with_metadata({"b": 2})
    assert full.kv_cache is handle
    assert full.metadata == {"b": 2}
    assert full.last_only
    assert full.attention_mask is not None
    assert full.position_ids is not None
    assert first == PrefillInput(first.input_ids)
    step = DecodeInput.new(ids(1), handle)
    assert (step.position_ids, step.metadata) == (None, {})
    assert step.with_position_ids(ids(1, 1)).with_metadata({"c": 3}).metadata == {"c": 3}
    for plain in (first, step):
        assert (plain.wants_hidden_states, plain.wants_attention_weights) == (False, False)
        asked = plain.with_hidden_states().with_attention_weights()
        assert (asked.wants_hidden_states, asked.wants_attention_weights) == (True, True)


@pytest.mark.clause("MX-OUTPUT-2")
def test_last_token_logits_drop_the_sequence_axis() -> None:
    values = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    output = PrefillOutput.new(FACTORY.from_numpy(values), None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(output.last_token_logits().to_numpy(), values[:, -1, :])
    assert (output.hidden_states, output.attention_weights, output.last_logits) == (None, None, None)
    own = FACTORY.from_numpy(np.stack([values[0, 0], values[1, 1]]))  # rows of a padded batch end early
    padded = dataclasses.replace(output, last_logits=own)
    assert padded.last_token_logits() is own
    for given in (output, padded):  # D-11
        np.testing.assert_array_equal(given.last_token_logits(ParityMode.UPSTREAM).to_numpy(), values[:, -1:, :])


@pytest.mark.clause("MX-OUTPUT-2")
@pytest.mark.parametrize("shape", [(3, 5), (1, 0, 5), (5,), (1, 1, 1, 5)])
def test_last_token_logits_need_a_last_token(shape: tuple[int, ...]) -> None:
    output = PrefillOutput.new(FACTORY.from_numpy(np.zeros(shape, np.float32)), None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="last_token_logits"):
        output.last_token_logits()


@pytest.mark.clause("MX-UNIFIED-1")
def test_a_unified_batch_counts_tokens_and_final_items() -> None:
    handle: Any = object()
    chunk = UnifiedBatchItem("a", [1, 2, 3], handle, 0, False)
    batch = UnifiedBatch([chunk, UnifiedBatchItem("b", [4], handle, 9, True, {"lora": "x"})])
    assert (batch.total_q_tokens(), batch.num_sampled_items()) == (4, 1)
    assert (UnifiedBatch().total_q_tokens(), UnifiedBatch().num_sampled_items()) == (0, 0)
    assert chunk.metadata == {}


@pytest.mark.clause("MX-STATUS-1")
def test_the_memory_model_is_linear() -> None:
    """A model of 1,000 bytes, 10 a token, 3 a token and layer, 7 besides: 1000 + 8*(10 + 3*5) + 7."""
    memory = MemoryRequirements(1000, 10, 3, 7)
    assert memory.calculate_total_memory(2, 4, 5) == 1207
    assert memory.calculate_total_memory(0, 4, 5) == 1007
    assert MemoryRequirements(0, 0, 2**40, 0).calculate_total_memory(2**20, 2**20, 1) == 2**80
    for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        with pytest.raises(InvalidParameterError, match="must be >= 0"):
            memory.calculate_total_memory(*sizes)


@pytest.mark.clause("MX-STATUS-1")
def test_enumerations_have_upstreams_variants() -> None:
    kinds = ["MultiHead", "MultiQuery", "GroupedQuery", "Flash", "Paged", "SlidingWindow"]
    assert [kind.name for kind in AttentionType] == kinds
    assert [state.name for state in ExecutorState] == ["Initializing", "Ready", "Busy", "Error", "Shutdown"]


class Handle:
    """As much of a cache handle as the defaults look at."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def num_tokens(self) -> int:
        return self._num_tokens

    def cache_id(self) -> str:
        return "kv-0"


class Counting(ModelExecutor):
    """Each decode returns a handle one token longer, as upstream's do; the third call fails if asked to."""

    def __init__(self, fails_at: int = 99) -> None:
        self.seen: list[int] = []
        self.fails_at = fails_at

    def info(self) -> Any: ...

    def capabilities(self) -> Any: ...

    def status(self) -> Any: ...

    async def prefill(self, input: PrefillInput) -> PrefillOutput:
        self.seen.append(input.sequence_length())
        return PrefillOutput(input.input_ids, Handle(0))  # type: ignore[arg-type]

    async def decode(self, input: DecodeInput) -> DecodeOutput:
        if len(self.seen) == self.fails_at:
            raise BackendError("decode: boom")
        self.seen.append(input.kv_cache.num_tokens())
        return DecodeOutput.new(input.input_ids, Handle(input.kv_cache.num_tokens() + 1))  # type: ignore[arg-type]


@pytest.mark.clause("MX-BATCH-1")
def test_default_batches_keep_order_and_stop_at_the_first_error() -> None:
    executor = Counting()
    inputs = [DecodeInput.new(ids(1), Handle(n)) for n in (5, 3, 8)]  # type: ignore[arg-type]
    outputs = asyncio.run(executor.batch_decode(inputs))
    assert [output.kv_cache.num_tokens() for output in outputs] == [6, 4, 9]
    asyncio.run(executor.batch_prefill([PrefillInput.new(ids(4)), PrefillInput.new(ids(2))]))
    assert executor.seen == [5, 3, 8, 4, 2]
    failing = Counting(fails_at=1)
    with pytest.raises(BackendError, match="boom"):
        asyncio.run(failing.batch_decode(inputs))
    assert failing.seen == [5]


@pytest.mark.clause("MX-BATCH-2")
def test_default_verification_hands_the_cache_on() -> None:
    executor = Counting()
    handle: Any = Handle(5)
    outputs = asyncio.run(executor.forward_verify([DecodeInput.new(ids(1), handle)] * 3))
    assert executor.seen == [5, 6, 7]
    assert outputs[-1].kv_cache.num_tokens() == 8
    assert asyncio.run(executor.forward_verify([])) == []


@pytest.mark.clause("MX-TRUNCATE-1")
def test_default_truncation_never_pretends() -> None:
    executor = Counting()
    handle: Any = Handle(5)
    asyncio.run(executor.truncate_kv(handle, 5))
    with pytest.raises(UnsupportedError, match="cut kv-0 from 5 to 4"):
        asyncio.run(executor.truncate_kv(handle, 4))


@pytest.mark.clause("MX-UNIFIED-2")
def test_what_is_not_offered_says_so() -> None:
    executor = Counting()
    for call in (executor.unified_decode(UnifiedBatch()), executor.forward(ids(1))):
        with pytest.raises(UnsupportedError):
            asyncio.run(call)
    assert not executor.supports_native_unified_decode()
    assert executor.kv_capacity() is executor.cache_metrics_snapshot() is executor.lora_metrics_snapshot() is None
    executor.release_cache("nobody")
    asyncio.run(executor.warmup())
    asyncio.run(executor.shutdown())
