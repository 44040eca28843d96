"""`LlmExecutor`: an engine's step over an LLM that keeps its own caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    FerrumError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.executor.llm_executor import LlmExecutor
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.stepped_llm import SteppedLlm
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority

IDS = np.random.default_rng(3).integers(0, 97, 40).tolist()


@pytest.fixture(scope="module")
def judge(tiny_llama: Any) -> Any:
    tiny = tiny_llama(7)
    exact = tiny.logits(IDS, True)
    return tiny, exact, 2 * np.abs(tiny.logits(IDS, False) - exact).max()


class Bench:
    """An executor over an LLM, and the manager of its blocks."""

    def __init__(self, tiny: Any, stepped: bool) -> None:
        backend = make_backend()
        decoder = Decoder(tiny.config, read_decoder_weights(tiny, backend), backend)
        caches = ContiguousKvFactory(backend, KvShape(3, 2, 8), 96)
        self.llm: DecoderLlm[Any] = DecoderLlm(decoder, caches)
        if stepped:
            weights = DecoderTransformerWeights.of_decoder(decoder)
            self.llm = SteppedLlm(decoder, caches, TransformerDecodeBackend(weights, backend))
        self.executor = LlmExecutor(self.llm)
        self.manager = PagedKvCacheManager(40, 4, enable_prefix_caching=False)

    def handle(self, num_tokens: int) -> Any:
        request = AllocationRequest(
            RequestId.new(), num_tokens, 96, 3, 2, 8, Device.CPU, DataType.FP32, Priority.Normal
        )
        return self.manager.allocate_now(request)

    def run(self, *items: tuple[str, list[int], Any, int, bool]) -> list[Any]:
        return self.executor.execute_unified(UnifiedBatch([UnifiedBatchItem(*item) for item in items]))


@pytest.fixture(params=[False, True], ids=["decoder", "stepped"])
def bench(judge: Any, request: pytest.FixtureRequest) -> Bench:
    return Bench(judge[0], request.param)


def near(judge: Any, logits: Any, row: int) -> bool:
    assert logits.shape == (97,)
    return bool(np.abs(logits - judge[1][row]).max() <= judge[2])


@pytest.mark.clause("LM-LLM-15")
def test_chunks_and_decodes_of_two_sequences(judge: Any, bench: Bench) -> None:
    first, second = bench.handle(40), bench.handle(40)
    assert bench.run(("a", IDS[:7], first, 0, False)) == [None]
    found = bench.run(("b", IDS[:3], second, 0, True), ("a", IDS[7:20], first, 7, True))
    assert near(judge, found[0], 2)
    assert near(judge, found[1], 19)
    for step in range(5):
        items = [("a", [IDS[20 + step]], first, 20 + step, True), ("b", [IDS[3 + step]], second, 3 + step, True)]
        found = bench.run(*items)
        assert near(judge, found[0], 20 + step)
        assert near(judge, found[1], 3 + step)
    assert bench.run() == []


@pytest.mark.clause("LM-LLM-15")
def test_an_item_runs_again_where_it_ran(judge: Any, bench: Bench) -> None:
    handle = bench.handle(40)
    bench.run(("a", IDS[:9], handle, 0, True))
    for token in (5, IDS[9], IDS[9]):
        found = bench.run(("a", [token], handle, 9, True))
    assert near(judge, found[0], 9)
    bench.run(("a", [1], handle, 10, True))
    assert near(judge, bench.run(("a", IDS[4:12], handle, 4, True))[0], 11)
    assert near(judge, bench.run(("a", IDS[:2], handle, 0, True))[0], 1)


@pytest.mark.clause("LM-LLM-15")
def test_a_freed_handle_takes_its_cache_along(judge: Any, bench: Bench) -> None:
    handles = [bench.handle(12), bench.handle(12)]
    bench.run(*(("ab"[i], IDS[:9], handle, 0, True) for i, handle in enumerate(handles)))
    assert bench.executor.num_caches == 2
    bench.manager.deallocate_now(handles[0].request_id)
    with pytest.raises(NotFoundError, match="was freed"):
        bench.run(("a", [1], handles[0], 9, True))
    assert bench.executor.num_caches == 1
    assert (bench.llm.cache_metrics_snapshot() or {})["num_caches"] == 1
    again = bench.handle(12)
    with pytest.raises(NotFoundError, match="keeps 0 tokens"):
        bench.run(("a", [IDS[9]], again, 9, True))
    assert near(judge, bench.run(("a", IDS[:10], again, 0, True))[0], 9)
    assert near(judge, bench.run(("b", [IDS[9]], handles[1], 9, True))[0], 9)


@pytest.mark.clause("LM-LLM-15")
def test_the_whole_batch_is_checked_first(judge: Any, bench: Bench) -> None:
    good, other = bench.handle(12), bench.handle(12)
    bench.run(("a", IDS[:9], good, 0, True), ("b", IDS[:9], other, 0, True))
    item = ("a", [IDS[9]], good, 9, True)
    for bad, kind in (
        (("a", [1], other, 9, True), ModelError),
        (("b", [1], good, 9, True), ModelError),
        (("b", [], other, 9, True), ModelError),
        (("b", [1], other, -1, True), ModelError),
        (("b", [1], other, 10, True), NotFoundError),
        (("b", [97], other, 9, True), InvalidParameterError),
        (("b", [1, 97], other, 9, True), InvalidParameterError),
        (("b", [1, 2, 3, 4], other, 9, True), ResourceExhaustedError),
    ):
        refuses(bench, kind, item, bad)
        assert [bench.llm.cache_length(handle.cache_id()) for handle in (good, other)] == [9, 9]
    assert near(judge, bench.run(item)[0], 9)


def refuses(bench: Bench, kind: type[FerrumError], *items: Any) -> None:
    with pytest.raises(kind):
        bench.run(*items)
