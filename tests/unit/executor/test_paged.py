"""The paged executor against transformers in float64, and its accounting against the manager's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.interfaces.model_executor import (
    AttentionType,
    DecodeInput,
    ExecutorCapabilities,
    ExecutorState,
    MemoryRequirements,
    PrefillInput,
    UnifiedBatch,
    UnifiedBatchItem,
    UnifiedExecutor,
)
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.kv_cache.storage_contiguous import KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import ModelId, RequestId
from ferrum_ref.types.models import ModelInfo, ModelType
from ferrum_ref.types.sampling import Priority

IDS = np.random.default_rng(3).integers(0, 97, 60).tolist()
BLOCK_SIZE = 4
BACKEND = make_backend()
FACTORY = BACKEND.tensor_factory()


class Bench:
    """A tiny model behind an executor, with blocks for a few sequences, and the right answers."""

    def __init__(self, judge: Any, num_blocks: int = 60, with_lender: bool = True) -> None:
        tiny, self.exact, self.bound = judge
        config = tiny.config
        self.decoder = Decoder(config, read_decoder_weights(tiny, BACKEND), BACKEND)
        shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim)
        self.storage = PagedKvStorage(BACKEND, shape, num_blocks, BLOCK_SIZE)
        self.manager = PagedKvCacheManager(num_blocks, BLOCK_SIZE, storage=self.storage)
        info = ModelInfo(
            ModelId("tiny"), ModelType.Llama, 1, 32, 3, 4, 2, 97, 96, DataType.FP32, Device.CPU, None, None, {}
        )  # fmt: skip
        capabilities = ExecutorCapabilities(
            8, 96, [AttentionType.Paged], True, True, False, False, False, [DataType.FP32], [Device.CPU],
            MemoryRequirements(1, 1, 1, 1),
        )  # fmt: skip
        clock = itertools.count().__next__
        self.executor = PagedModelExecutor(
            self.decoder,
            self.storage,
            FACTORY,
            info,
            capabilities,
            lender=self.manager if with_lender else None,
            head_dim=8,
            clock=lambda: float(clock()),
        )

    def handle(self, num_tokens: int) -> Any:
        request = AllocationRequest(
            RequestId.new(), num_tokens, 96, 3, 2, 8, Device.CPU, DataType.FP32, Priority.Normal
        )  # fmt: skip
        return self.manager.allocate_now(request)

    def right(self, logits: Any, row: int) -> bool:
        assert logits.shape == (97,)
        return bool(np.abs(logits - self.exact[row]).max() <= self.bound)

    def num_free(self) -> int:
        return self.manager.stats().free_blocks


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(call)


def ids(values: list[int], rank: int = 1) -> Any:
    tensor = FACTORY.from_ids(values)
    return tensor if rank == 1 else tensor.reshape((1, len(values)))


@pytest.fixture(scope="module")
def judge(tiny_llama: Any) -> Any:
    tiny = tiny_llama(7)
    exact = tiny.logits(IDS, True)
    return tiny, exact, 2 * np.abs(tiny.logits(IDS, False) - exact).max()


@pytest.fixture
def bench(judge: Any) -> Bench:
    return Bench(judge)


@pytest.mark.clause("MX-UNIFIED-1", "MX-UNIFIED-3")
@given(data=st.data())
def test_mixed_batches_in_any_order(judge: Any, data: st.DataObject) -> None:
    """Several sequences, each a prefix of one text, advance by random chunks in random company."""
    bench = Bench(judge)
    done = [0, 0, 0, 0]
    handles = [bench.handle(60) for _ in done]
    for _ in range(data.draw(st.integers(1, 6))):
        order = data.draw(st.permutations(range(4)).map(lambda order: list(order)[: data.draw(st.integers(0, 4))]))
        items, rows = [], []
        for i in order:
            size = data.draw(st.one_of(st.just(1), st.integers(1, 17)))
            size = min(size, 60 - done[i])
            if size:
                final = data.draw(st.booleans())
                items.append(UnifiedBatchItem(str(i), IDS[done[i] : done[i] + size], handles[i], done[i], final))
                done[i] += size
                rows.append(done[i] - 1 if final else None)
        results = bench.executor.execute_unified(UnifiedBatch(items))
        assert len(results) == len(rows)
        for logits, row in zip(results, rows, strict=True):
            assert (logits is None) == (row is None)
            assert row is None or bench.right(logits, row)


@pytest.mark.clause("MX-UNIFIED-2", "MX-UNIFIED-4")
def test_running_a_batch_again_changes_nothing(bench: Bench) -> None:
    assert isinstance(bench.executor, UnifiedExecutor)
    assert bench.executor.supports_native_unified_decode()
    batch = UnifiedBatch([UnifiedBatchItem("a", IDS[:9], bench.handle(10), 0, True)])
    first = bench.executor.execute_unified(batch)
    keys = bench.storage.keys[2].to_numpy().copy()
    again = run(bench.executor.unified_decode(batch))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(bench.storage.keys[2].to_numpy(), keys)
    assert bench.executor.execute_unified(UnifiedBatch()) == []


@pytest.mark.clause("MX-UNIFIED-3")
@pytest.mark.parametrize(
    ("second", "error", "text"),
    [
        (("b", [97], 0), InvalidParameterError, "token id"),
        (("b", [1] * 9, 0), ResourceExhaustedError, "2 blocks of 4 tokens"),
        (("b", [1], 96), ResourceExhaustedError, "context of 96"),
        (("b", [1], -1), ModelError, "positions"),
        (("b", [], 0), ModelError, "no tokens"),
        (("a", [1], 0), ModelError, "'a' occurs twice"),
    ],
)
def test_a_bad_item_fails_the_batch_before_anything_is_written(
    bench: Bench, second: tuple[str, list[int], int], error: type[Exception], text: str
) -> None:
    handles = [bench.handle(8), bench.handle(8)]
    before = bench.storage.keys[0].to_numpy().copy()
    name, tokens, start = second
    items = [
        UnifiedBatchItem("a", [1, 2], handles[0], 0, True),
        UnifiedBatchItem(name, tokens, handles[1], start, True),
    ]
    with pytest.raises(error, match=text):
        bench.executor.execute_unified(UnifiedBatch(items))
    np.testing.assert_array_equal(bench.storage.keys[0].to_numpy(), before)


@pytest.mark.clause("MX-PREFILL-1", "MX-DECODE-1", "MX-OUTPUT-1", "MX-OUTPUT-3")
@pytest.mark.parametrize("rank", [1, 2])
def test_prefill_and_decode_into_a_given_handle(bench: Bench, rank: int) -> None:
    handle = bench.handle(10)
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:10], rank)).with_kv_cache(handle)))
    assert output.kv_cache is handle
    assert output.logits.shape() == (1, 10, 97)
    for row in range(10):
        assert bench.right(output.logits.to_numpy()[0, row], row)
    assert bench.right(output.last_token_logits().to_numpy()[0], 9)
    for pos in range(10, 20):
        step = run(bench.executor.decode(DecodeInput.new(ids([IDS[pos]], rank), output.kv_cache)))
        assert step.logits.shape() == (1, 97)
        assert bench.right(step.logits.to_numpy()[0], pos)
        assert step.kv_cache.num_tokens() == pos + 1
    assert handle.block_table().num_blocks() == 5
    assert bench.num_free() == 55
    key = handle.key_cache(2)
    assert key.shape() == (20, 2, 8)  # what is accounted is what is stored
    assert (np.abs(key.to_numpy()).max(axis=(1, 2)) > 0).all()


@pytest.mark.clause("MX-PREFILL-1", "MX-OUTPUT-1")
def test_last_only_runs_the_head_once(bench: Bench) -> None:
    request = PrefillInput.new(ids(IDS[:10])).with_kv_cache(bench.handle(10)).with_last_only()
    output = run(bench.executor.prefill(request))
    assert output.logits.shape() == (1, 1, 97)
    assert bench.right(output.logits.to_numpy()[0, 0], 9)


@pytest.mark.clause("MX-PREFILL-3")
def test_later_chunks_continue_the_cache(bench: Bench) -> None:
    handle = bench.handle(30)
    start = 0
    for size in (7, 1, 12, 10):
        request = PrefillInput.new(ids(IDS[start : start + size])).with_kv_cache(handle)
        if start:
            request = request.with_position_ids(ids(list(range(start, start + size)), 2))
        output = run(bench.executor.prefill(request))
        for row in range(size):
            assert bench.right(output.logits.to_numpy()[0, row], start + row)
        start += size
    assert handle.num_tokens() == 30
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[30:35])).with_kv_cache(handle)))  # positions implied
    assert bench.right(output.last_token_logits().to_numpy()[0], 34)
    assert handle.num_tokens() == 35


@pytest.mark.clause("MX-PREFILL-6")
def test_padding_on_the_right_is_not_run(bench: Bench) -> None:
    handle = bench.handle(1)
    padded = PrefillInput.new(ids([*IDS[:6], 0, 0], 2)).with_attention_mask(ids([1] * 6 + [0] * 2, 2))
    output = run(bench.executor.prefill(padded.with_kv_cache(handle)))
    assert output.logits.shape() == (1, 8, 97)
    assert bench.right(output.last_token_logits().to_numpy()[0], 5)
    assert bench.right(output.logits.to_numpy()[0, 5], 5)
    assert (output.logits.to_numpy()[0, 6:] == 0).all()
    assert handle.num_tokens() == 6
    assert bench.right(run(bench.executor.decode(DecodeInput.new(ids([IDS[6]]), handle))).logits.to_numpy()[0], 6)


@pytest.mark.clause("MX-PREFILL-5")
def test_a_prefill_without_a_handle_borrows_and_returns_blocks(bench: Bench) -> None:
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:9]))))
    assert bench.num_free() == 57
    run(bench.executor.decode(DecodeInput.new(ids([IDS[9]]), output.kv_cache)))
    bench.executor.release_cache("nobody")
    bench.executor.release_cache(output.kv_cache.cache_id())
    bench.executor.release_cache(output.kv_cache.cache_id())
    assert bench.num_free() == 60
    with pytest.raises(NotFoundError, match="freed"):
        run(bench.executor.decode(DecodeInput.new(ids([1]), output.kv_cache)))


@pytest.mark.clause("MX-DECODE-4", "MX-DECODE-3")
def test_decodes_share_one_forward(bench: Bench) -> None:
    lengths = (3, 17, 8)
    outputs = [run(bench.executor.prefill(PrefillInput.new(ids(IDS[:n])))) for n in lengths]
    inputs = [DecodeInput.new(ids([IDS[n]]), out.kv_cache) for n, out in zip(lengths, outputs, strict=True)]
    inputs[1] = inputs[1].with_position_ids(ids([17], 2))
    steps = run(bench.executor.batch_decode(inputs))
    for n, step in zip(lengths, steps, strict=True):
        assert bench.right(step.logits.to_numpy()[0], n)
    same = DecodeInput.new(ids([IDS[4]]), outputs[0].kv_cache)  # twice the same cache: one after the other
    follower = DecodeInput.new(ids([IDS[5]]), outputs[0].kv_cache)
    first, second = run(bench.executor.batch_decode([same, follower]))
    assert bench.right(first.logits.to_numpy()[0], 4)
    assert bench.right(second.logits.to_numpy()[0], 5)
    verified = run(bench.executor.forward_verify([DecodeInput.new(ids([IDS[6 + i]]), second.kv_cache) for i in (0, 1)]))
    assert bench.right(verified[-1].logits.to_numpy()[0], 7)
    assert run(bench.executor.batch_decode([])) == []


@pytest.mark.clause("MX-DECODE-3")
def test_a_fork_decodes_apart_from_its_source(bench: Bench) -> None:
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:6]))))
    fork = output.kv_cache.clone_handle()
    other = run(bench.executor.decode(DecodeInput.new(ids([(IDS[6] + 1) % 97]), fork)))
    assert not bench.right(other.logits.to_numpy()[0], 6)
    for pos in (6, 7):
        step = run(bench.executor.decode(DecodeInput.new(ids([IDS[pos]]), output.kv_cache)))
        assert bench.right(step.logits.to_numpy()[0], pos)
    second = output.kv_cache.clone_handle()
    chunk = PrefillInput.new(ids(IDS[8:12])).with_kv_cache(second).with_position_ids(ids([8, 9, 10, 11]))
    assert bench.right(run(bench.executor.prefill(chunk)).last_token_logits().to_numpy()[0], 11)


REFUSALS = {
    "two sequences": (
        lambda h: PrefillInput.new(FACTORY.from_ids([1, 2]).reshape((2, 1))).with_kv_cache(h),
        UnsupportedError,
        "batch of 2",
    ),
    "no tokens": (lambda h: PrefillInput.new(ids([])), ModelError, "empty"),
    "all padding": (lambda h: PrefillInput.new(ids([1, 2])).with_attention_mask(ids([0, 0])), ModelError, "empty"),
    "gap in positions": (
        lambda h: PrefillInput.new(ids([1, 2])).with_kv_cache(h).with_position_ids(ids([0, 2])),
        ModelError,
        "position_ids",
    ),
    "positions ahead": (
        lambda h: PrefillInput.new(ids([1, 2])).with_kv_cache(h).with_position_ids(ids([3, 4])),
        ModelError,
        "position_ids",
    ),
    "unknown token": (lambda h: PrefillInput.new(ids([97])).with_kv_cache(h), InvalidParameterError, "token id"),
    "beyond the context": (
        lambda h: PrefillInput.new(ids([1] * 97)).with_kv_cache(h),
        ResourceExhaustedError,
        "context",
    ),
    "beyond the blocks": (lambda h: PrefillInput.new(ids([1] * 90)).with_kv_cache(h), ResourceExhaustedError, "blocks"),
    "no handle and no blocks": (lambda h: PrefillInput.new(ids([1] * 90)), ResourceExhaustedError, "blocks"),
    "no handle and a bad token": (lambda h: PrefillInput.new(ids([97])), InvalidParameterError, "token id"),
}


@pytest.mark.clause("MX-PREFILL-7", "MX-PREFILL-4")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_prefill_takes_and_writes_nothing(judge: Any, name: str) -> None:
    bench = Bench(judge, num_blocks=10)
    handle = bench.handle(5)
    make, error, text = REFUSALS[name]
    with pytest.raises(error, match=text):
        run(bench.executor.prefill(make(handle)))
    assert (bench.num_free(), handle.num_tokens()) == (8, 5)
    assert (bench.storage.keys[0].to_numpy() == 0).all()
    assert bench.executor.status().prefill_operations == 0


@pytest.mark.clause("MX-PREFILL-4", "MX-PREFILL-5")
def test_blocks_borrowed_for_a_failing_forward_go_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise BackendError("forward: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench.decoder, "forward", fail)
        with pytest.raises(BackendError, match="out of memory"):
            run(bench.executor.prefill(PrefillInput.new(ids(IDS[:5]))))
    assert bench.num_free() == 60
    assert bench.executor.status().prefill_operations == 0
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:5]))))
    assert bench.right(output.last_token_logits().to_numpy()[0], 4)


@pytest.mark.clause("MX-DECODE-4", "MX-PREFILL-4")
def test_what_decode_refuses(bench: Bench) -> None:
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:5]))))
    calls = [
        (DecodeInput.new(ids([1, 2]), output.kv_cache), ModelError, "one token"),
        (DecodeInput.new(FACTORY.from_ids([1, 2]).reshape((2, 1)), output.kv_cache), UnsupportedError, "batch of 2"),
        (DecodeInput.new(ids([1]), output.kv_cache).with_position_ids(ids([4])), ModelError, "position_ids"),
        (DecodeInput.new(ids([99]), output.kv_cache), InvalidParameterError, "token id"),
    ]
    for request, error, text in calls:
        with pytest.raises(error, match=text):
            run(bench.executor.decode(request))
    step = run(bench.executor.decode(DecodeInput.new(ids([IDS[5]]), output.kv_cache)))
    assert bench.right(step.logits.to_numpy()[0], 5)


@pytest.mark.clause("MX-PREFILL-5")
def test_without_a_lender_only_unified_batches_run(judge: Any) -> None:
    bench = Bench(judge, with_lender=False)
    with pytest.raises(UnsupportedError, match="no KV-cache manager"):
        run(bench.executor.prefill(PrefillInput.new(ids(IDS[:5]))))
    handle = bench.handle(5)  # room enough: nothing to extend
    output = run(bench.executor.prefill(PrefillInput.new(ids(IDS[:5])).with_kv_cache(handle)))
    assert bench.right(output.last_token_logits().to_numpy()[0], 4)
    with pytest.raises(UnsupportedError, match="no KV-cache manager"):
        run(bench.executor.decode(DecodeInput.new(ids([1]), handle)))


@pytest.mark.clause("MX-STATUS-2", "MX-STATUS-3")
def test_counters_tell_what_ran(bench: Bench) -> None:
    executor = bench.executor
    assert executor.info().model_id == ModelId("tiny")
    assert executor.capabilities().max_batch_size == 8
    fresh = executor.status()
    assert (fresh.state, fresh.is_ready, fresh.last_operation) == (ExecutorState.Ready, True, None)
    output = run(executor.prefill(PrefillInput.new(ids(IDS[:5]))))
    run(executor.decode(DecodeInput.new(ids([IDS[5]]), output.kv_cache)))
    run(executor.decode(DecodeInput.new(ids([IDS[6]]), output.kv_cache)))
    status = executor.status()
    assert (status.prefill_operations, status.decode_operations) == (1, 2)
    assert (status.avg_prefill_time_ms, status.avg_decode_time_ms) == (1000.0, 1000.0)  # one tick of the clock each
    mixed = [
        UnifiedBatchItem("a", IDS[:3], bench.handle(3), 0, True),
        UnifiedBatchItem("b", [1], bench.handle(1), 0, True),
    ]
    executor.execute_unified(UnifiedBatch(mixed))  # one tick, half of it each
    assert executor.status().prefill_operations == 2
    assert executor.status().avg_prefill_time_ms == pytest.approx(750.0)
    assert executor.status().avg_decode_time_ms == pytest.approx(2500 / 3)
    for request_id, handle in bench.manager.list_handles():
        if handle is not output.kv_cache:
            bench.manager.deallocate_now(request_id)
    block_bytes = BLOCK_SIZE * 2 * 3 * 2 * 8 * 4
    usage = status.memory_usage
    assert (usage.allocated_bytes, usage.used_bytes) == (60 * block_bytes, 2 * block_bytes)
    assert usage.utilization_percent == pytest.approx(100 * 2 / 60)
    executor.release_cache(output.kv_cache.cache_id())
    assert executor.status().memory_usage.used_bytes == 0
    assert executor.status().memory_usage.peak_bytes == 4 * block_bytes
    run(executor.shutdown())
    assert (executor.status().state, executor.status().is_ready) == (ExecutorState.Shutdown, False)
    with pytest.raises(BackendError, match="shut down"):
        run(executor.prefill(PrefillInput.new(ids(IDS[:5]))))
