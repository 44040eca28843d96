"""The batch contract: one method, a measured batch size, a limit that is held."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_ref.executor.batch import PagedBatchExecutor
from ferrum_ref.interfaces.model_executor import BatchModelExecutor, DecodeInput, ModelExecutor, PrefillInput


@pytest.mark.clause("MX-BATCH-4", "MX-ASSEMBLY-1")
def test_batch_decode_is_one_method(judge7: Any, run: Any, tensor: Any) -> None:
    executor, manager = judge7.loaded.new_batch_executor(40, 4, max_batch_size=4)
    assert isinstance(executor, BatchModelExecutor)
    assert isinstance(executor, ModelExecutor)
    assert manager.stats().total_blocks == 40
    assert "batch_decode" in BatchModelExecutor.__abstractmethods__
    handles = [run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:n])))).kv_cache for n in (3, 5)]
    steps = [DecodeInput.new(tensor([judge7.ids[n]]), h) for n, h in zip((3, 5), handles, strict=True)]
    first = run(executor.batch_decode(steps))
    for handle in handles:
        run(executor.truncate_kv(handle, handle.num_tokens() - 1))
    second = run(ModelExecutor.batch_decode(executor, steps))  # the provided one: one after the other
    for n, here, there in zip((3, 5), first, second, strict=True):
        assert judge7.right(here.logits.to_numpy(), judge7.ids[: n + 1])
        assert judge7.right(there.logits.to_numpy(), judge7.ids[: n + 1])


@pytest.mark.clause("MX-BATCH-6")
def test_the_limit_is_held(judge7: Any, run: Any, tensor: Any) -> None:
    executor, manager = judge7.loaded.new_batch_executor(40, 4, max_batch_size=2)
    assert [executor.supports_batch_size(n) for n in (0, 1, 2, 3)] == [False, True, True, False]
    prompts = [PrefillInput.new(tensor([1, 2]))] * 2
    with pytest.raises(ResourceExhaustedError, match="3 sequences, but at most 2"):
        run(executor.batch_prefill([PrefillInput.new(tensor([[1], [2]])), prompts[0]]))
    assert manager.stats().free_blocks == 40
    outputs = run(executor.batch_prefill(prompts))
    steps = [DecodeInput.new(tensor([1]), output.kv_cache) for output in outputs]
    with pytest.raises(ResourceExhaustedError, match="3 sequences"):
        run(executor.batch_decode([*steps, steps[0]]))
    assert [output.kv_cache.num_tokens() for output in outputs] == [2, 2]
    assert len(run(executor.batch_decode(steps))) == 2


class Timed:
    """A decoder whose forward takes as long as `costs` says for the number of sequences."""

    def __init__(self, decoder: Any, costs: dict[int, float]) -> None:
        self.decoder, self.costs, self.now_s = decoder, costs, 0.0
        self.max_tokens = decoder.max_tokens
        self.check = decoder.check

    def forward(self, batch: Any, *rest: Any) -> Any:
        self.now_s += self.costs[len(batch.lengths)]
        return self.decoder.forward(batch, *rest)


@pytest.mark.clause("MX-BATCH-5")
@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0, 6: 6.0}, 4),  # 1, 1.33, 2, 1 tokens/s
        ({1: 1.0, 2: 2.0, 4: 4.0, 6: 6.0}, 1),  # all alike: the smallest
        ({1: 1.0, 2: 1.0, 4: 1.0, 6: 1.0}, 6),
    ],
)
def test_the_best_size_is_the_fastest_measured(judge7: Any, run: Any, costs: dict[int, float], best: int) -> None:
    timed = Timed(judge7.loaded.decoder, costs)
    executor, manager = judge7.loaded.new_batch_executor(40, 4, max_batch_size=6, clock=lambda: timed.now_s)
    executor._forwarder._decoder = timed
    assert executor.optimal_batch_size() == 6  # nothing measured
    run(executor.warmup())
    assert executor.optimal_batch_size() == best
    assert manager.stats().free_blocks == 40
    assert executor.status().decode_operations == 2 * (1 + 2 + 4 + 6)


@pytest.mark.clause("MX-BATCH-5")
def test_warming_up_goes_as_far_as_the_blocks(judge7: Any, run: Any) -> None:
    ticks = itertools.count()
    executor, manager = judge7.loaded.new_batch_executor(3, 4, max_batch_size=8, clock=lambda: float(next(ticks)))
    run(executor.warmup())
    assert executor.optimal_batch_size() == 2  # 4 sequences find no fourth block
    assert manager.stats().free_blocks == 3
    assert isinstance(executor, PagedBatchExecutor)
