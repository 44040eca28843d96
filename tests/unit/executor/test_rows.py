"""Batches of several sequences: padding on either side, one cache a row, all or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.executor.batch_handle import BatchCacheHandle
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput
from ferrum_ref.types.parity_mode import ParityMode

PAST = ([1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0])


@pytest.fixture
def bench(judge7: Any) -> Any:
    executor, manager = judge7.loaded.new_executor(60, 4)
    return executor, manager


def padded_rows(judge7: Any, fill: int) -> tuple[list[list[int]], Any]:
    """Rows of the text from different beginnings, at the columns of PAST's ones, other ids elsewhere."""
    rows, table = [], np.full((4, 5), fill)
    for index, mask in enumerate(PAST):
        rows.append(judge7.ids[7 * index : 7 * index + sum(mask)])
        table[index, np.array(mask) == 1] = rows[-1]
    return rows, table


@pytest.mark.clause("MX-PREFILL-6", "MX-PREFILL-7", "MX-OUTPUT-1", "MX-OUTPUT-2", "MX-OUTPUT-6", "MX-INPUT-3")
@pytest.mark.parametrize("fill", [0, 41])
def test_padded_rows_are_as_if_alone(judge7: Any, bench: Any, run: Any, tensor: Any, fill: int) -> None:
    executor, manager = bench
    rows, table = padded_rows(judge7, fill)
    request = PrefillInput.new(tensor(table)).with_attention_mask(tensor(PAST))
    output = run(executor.prefill(request))
    assert output.logits.shape() == (4, 5, 97)
    for index, (row, mask) in enumerate(zip(rows, PAST, strict=True)):
        found = output.logits.to_numpy()[index]
        assert (found[np.array(mask) == 0] == 0).all()
        for at, column in enumerate(np.flatnonzero(mask)):
            assert judge7.right(found[column], row, at)
        assert judge7.right(output.last_token_logits().to_numpy()[index], row)
        assert output.kv_cache.rows[index].num_tokens() == len(row)
    assert output.last_token_logits().shape() == (4, 97)
    old = output.last_token_logits(ParityMode.UPSTREAM)  # the last column, whatever it holds (D-11)
    assert old.shape() == (4, 1, 97)
    assert (old.to_numpy()[0] == 0).all()
    last = run(executor.prefill(request.with_last_only()))
    assert last.logits.shape() == (4, 1, 97)
    np.testing.assert_array_equal(last.logits.to_numpy()[:, 0], last.last_token_logits().to_numpy())
    assert judge7.right(last.logits.to_numpy()[0], rows[0])
    assert manager.stats().active_caches == 8


@pytest.mark.clause("MX-PREFILL-7", "MX-DECODE-4", "MX-OUTPUT-3", "MX-HANDLE-5")
def test_a_batch_goes_on_row_by_row(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    """Prefill, a padded second chunk, then decodes; every row at its own length."""
    executor, manager = bench
    rows, table = padded_rows(judge7, 3)
    handle = run(executor.prefill(PrefillInput.new(tensor(table)).with_attention_mask(tensor(PAST)))).kv_cache
    more, mask = [[11, 12], [13, 0], [0, 14], [15, 16]], [[1, 1], [1, 0], [0, 1], [1, 1]]
    positions = [[3, 4], [5, 0], [77, 2], [3, 4]]
    chunk = PrefillInput.new(tensor(more)).with_attention_mask(tensor(mask)).with_position_ids(tensor(positions))
    output = run(executor.prefill(chunk.with_kv_cache(handle)))
    assert output.kv_cache is handle
    for row, extra, real in zip(rows, more, mask, strict=True):
        row += [token for token, is_real in zip(extra, real, strict=True) if is_real]
    for index, row in enumerate(rows):
        assert judge7.right(output.last_token_logits().to_numpy()[index], row)
    for step in range(3):
        tokens = [[20 + step], [30 + step], [40 + step], [50 + step]]
        places = [[len(row)] for row in rows]
        decoded = run(executor.decode(DecodeInput.new(tensor(tokens), handle).with_position_ids(tensor(places))))
        assert decoded.logits.shape() == (4, 97)
        for index, row in enumerate(rows):
            row += tokens[index]
            assert judge7.right(decoded.logits.to_numpy()[index], row)
    assert [part.num_tokens() for part in handle.rows] == [len(row) for row in rows]
    executor.release_cache(handle.cache_id())
    assert not handle.is_valid()
    assert manager.stats().free_blocks == 60


@pytest.mark.clause("MX-HANDLE-5")
def test_a_batch_handle_is_the_sum_of_its_rows(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    request = PrefillInput.new(tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])).with_attention_mask(
        tensor([[1] * 5, [1, 1, 0, 0, 0]])
    )
    handle = run(executor.prefill(request)).kv_cache
    first, second = handle.rows
    assert handle.cache_id() == f"{first.cache_id()}+{second.cache_id()}"
    assert handle.num_tokens() == 5
    assert (handle.num_layers(), handle.num_heads(), handle.head_dim()) == (3, 2, 8)
    assert handle.device() == first.device()
    assert handle.as_any() is handle
    stats = handle.stats()
    assert (stats.blocks_allocated, stats.tokens_stored) == (3, 7)
    assert stats.memory_bytes == 3 * 4 * 2 * 3 * 2 * 8 * 4
    assert stats.utilization == pytest.approx(7 / 12)
    for call in (
        handle.block_table,
        handle.block_table_mut,
        lambda: handle.key_cache(0),
        lambda: handle.value_cache(0),
    ):
        with pytest.raises(UnsupportedError, match="rows"):
            call()
    single = BatchCacheHandle([first])
    np.testing.assert_array_equal(single.key_cache(1).to_numpy(), first.key_cache(1).to_numpy())
    clone = handle.clone_handle()
    run(executor.decode(DecodeInput.new(tensor([[9], [9]]), clone)))
    assert [row.num_tokens() for row in clone.rows] == [6, 3]
    assert [row.num_tokens() for row in handle.rows] == [5, 2]
    for bad in ([], [first, first]):
        with pytest.raises(InvalidParameterError, match="BatchCacheHandle"):
            BatchCacheHandle(bad)


@pytest.mark.clause("MX-PREFILL-7", "MX-DECODE-4")
def test_rows_and_caches_must_be_as_many(bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    handle = run(executor.prefill(PrefillInput.new(tensor([[1, 2], [3, 4]])))).kv_cache
    for given in (handle.rows[0], BatchCacheHandle(handle.rows[:1])):
        with pytest.raises(UnsupportedError, match="batch of 2 with 1 cache"):
            run(executor.prefill(PrefillInput.new(tensor([[1], [2]])).with_kv_cache(given)))
        with pytest.raises(UnsupportedError, match="batch of 2 with 1 cache"):
            run(executor.decode(DecodeInput.new(tensor([[1], [2]]), given)))
    with pytest.raises(UnsupportedError, match="batch of 1 with 2 cache"):
        run(executor.decode(DecodeInput.new(tensor([1]), handle)))
    single = run(executor.prefill(PrefillInput.new(tensor([[5], [6]])).with_kv_cache(handle)))
    assert single.kv_cache is handle


REFUSALS: list[tuple[Any, type[Exception], str]] = [
    ({"ids": [[1, 2], [3, 97]]}, InvalidParameterError, "token id"),
    ({"ids": [[1, 2], [3, 4]], "positions": [[4, 5], [4, 5]]}, ModelError, "must be 2, 3"),
    ({"ids": [[1] * 60, [3] * 60]}, ResourceExhaustedError, "blocks"),
    ({"ids": [[1] * 93, [3] * 93]}, ResourceExhaustedError, "context"),
]


@pytest.mark.clause("MX-PREFILL-7", "MX-HANDLE-4", "MX-BATCH-3")
@pytest.mark.parametrize(("request_", "error", "text"), REFUSALS)
def test_a_refused_batch_changes_no_row(
    judge7: Any, run: Any, tensor: Any, request_: Any, error: type[Exception], text: str
) -> None:
    executor, manager = judge7.loaded.new_executor(20, 4)
    first = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:4])))).kv_cache
    second = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:2])))).kv_cache
    keys = executor._storage.keys[0].to_numpy().copy()
    before = [first.num_tokens(), second.num_tokens(), manager.stats().free_blocks]
    chunk = PrefillInput.new(tensor(request_["ids"])).with_kv_cache(BatchCacheHandle([first, second]))
    if "positions" in request_:
        chunk = chunk.with_position_ids(tensor(request_["positions"]))
    with pytest.raises(error, match=text):
        run(executor.prefill(chunk))
    assert [first.num_tokens(), second.num_tokens(), manager.stats().free_blocks] == before
    np.testing.assert_array_equal(executor._storage.keys[0].to_numpy(), keys)
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[4]]), first)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:5])


@pytest.mark.clause("MX-BATCH-3", "MX-HANDLE-4")
def test_several_prompts_in_one_forward_keep_their_order(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, manager = bench
    texts = [judge7.ids[:9], judge7.ids[20:21], judge7.ids[30:45]]
    outputs = run(executor.batch_prefill([PrefillInput.new(tensor(text)) for text in texts]))
    assert [output.logits.shape() for output in outputs] == [(1, 9, 97), (1, 1, 97), (1, 15, 97)]
    for text, output in zip(texts, outputs, strict=True):
        for row in range(len(text)):
            assert judge7.right(output.logits.to_numpy()[0, row], text, row)
    assert executor.status().prefill_operations == 3
    free = manager.stats().free_blocks
    good, bad = PrefillInput.new(tensor([1, 2])), PrefillInput.new(tensor([97]))
    with pytest.raises(InvalidParameterError):
        run(executor.batch_prefill([good, bad, good]))
    assert manager.stats().free_blocks == free  # the good ones took nothing either
    assert executor.status().prefill_operations == 3
    assert run(executor.batch_prefill([])) == run(executor.batch_decode([])) == []


@pytest.mark.clause("MX-BATCH-3", "MX-HANDLE-4")
def test_one_bad_decode_runs_none(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    handles = [run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:4])))).kv_cache for _ in range(3)]
    steps = [DecodeInput.new(tensor([judge7.ids[4]]), handle) for handle in handles]
    bad = [*steps[:2], DecodeInput.new(tensor([97]), handles[2])]
    with pytest.raises(InvalidParameterError):
        run(executor.batch_decode(bad))
    assert [handle.num_tokens() for handle in handles] == [4, 4, 4]
    for step in run(executor.batch_decode(steps)):
        assert judge7.right(step.logits.to_numpy(), judge7.ids[:5])
    twice = [DecodeInput.new(tensor([judge7.ids[5]]), handles[0]), DecodeInput.new(tensor([97]), handles[0])]
    with pytest.raises(InvalidParameterError):  # one cache twice: one after the other, the first has been run
        run(executor.batch_decode(twice))
    assert handles[0].num_tokens() == 6
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[6]]), handles[0])))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:7])
    same = [PrefillInput.new(tensor(judge7.ids[7:9])).with_kv_cache(handles[0]), PrefillInput.new(tensor([97]))]
    with pytest.raises(InvalidParameterError):
        run(executor.batch_prefill([same[0], same[1].with_kv_cache(handles[0])]))
    assert handles[0].num_tokens() == 9


@pytest.mark.clause("MX-HANDLE-4", "MX-BATCH-3")
def test_the_third_of_three_finds_no_block(judge7: Any, run: Any, tensor: Any) -> None:
    """Blocks of 4: three full caches, one free block, three to grow."""
    executor, manager = judge7.loaded.new_executor(5, 4)
    handles = [run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:4])))).kv_cache for _ in range(3)]
    steps = [DecodeInput.new(tensor([judge7.ids[4]]), handle) for handle in handles]
    with pytest.raises(ResourceExhaustedError):
        run(executor.batch_decode(steps))
    assert [handle.num_tokens() for handle in handles] == [4, 4, 4]
    assert [handle.block_table().num_blocks() for handle in handles] == [1, 1, 1]
    assert manager.stats().free_blocks == 2
    for step in run(executor.batch_decode(steps[:2])):
        assert judge7.right(step.logits.to_numpy(), judge7.ids[:5])


@pytest.mark.clause("MX-HANDLE-4")
def test_a_failing_forward_leaves_the_accounting(
    judge7: Any, bench: Any, run: Any, tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, manager = bench
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:4])))).kv_cache
    free = manager.stats().free_blocks

    class Failing:
        max_tokens = 96

        def check(self, batch: Any) -> None: ...

        def forward(self, *_: Any) -> Any:
            raise BackendError("forward: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(executor._forwarder, "_decoder", Failing())
        for call in (
            executor.decode(DecodeInput.new(tensor([1]), handle)),
            executor.prefill(PrefillInput.new(tensor([[1] * 9, [2] * 9]))),
            executor.prefill(PrefillInput.new(tensor([1] * 9)).with_kv_cache(handle)),
        ):
            with pytest.raises(BackendError, match="out of memory"):
                run(call)
    assert (handle.num_tokens(), manager.stats().free_blocks) == (4, free)
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[4]]), handle)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:5])


@pytest.mark.clause("MX-INPUT-6")
def test_metadata_changes_nothing(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    request = PrefillInput.new(tensor(judge7.ids[:6])).with_metadata({"adapter": "x"})
    assert judge7.right(run(executor.prefill(request)).last_token_logits().to_numpy(), judge7.ids[:6])


@pytest.mark.clause("MX-OUTPUT-1")
def test_upstreams_mode_gives_the_last_position_alone(judge7: Any, run: Any, tensor: Any) -> None:
    executor, _ = judge7.loaded.new_executor(20, 4, parity_mode=ParityMode.UPSTREAM)
    output = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6]))))
    assert output.logits.shape() == (1, 1, 97)
    assert judge7.right(output.logits.to_numpy(), judge7.ids[:6])


@pytest.mark.clause("MX-OUTPUT-6", "MX-PREFILL-6", "MX-INPUT-4")
def test_left_padding_is_what_transformers_makes_of_it(
    judge7: Any, bench: Any, run: Any, tensor: Any, transformers_7: Any
) -> None:
    """transformers in float64 on the padded batch itself, with the mask and positions that generation uses."""
    import torch

    executor, _ = bench
    _, table = padded_rows(judge7, 5)
    mask = np.array([PAST[1], PAST[2]])
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    model = transformers_7("sdpa")  # its eager attention makes NaN of rows that see nothing, and spreads them
    with torch.no_grad():
        exact = model(
            torch.tensor(table[1:3]), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()
    request = PrefillInput.new(tensor(table[1:3])).with_attention_mask(tensor(mask))
    output = run(executor.prefill(request.with_position_ids(tensor(positions))))
    assert np.abs(output.logits.to_numpy() - exact)[mask == 1].max() <= judge7.bound


@pytest.mark.clause("MX-DECODE-4", "MX-HANDLE-1")
def test_a_freed_row_refuses_the_whole_batch(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    handle = run(executor.prefill(PrefillInput.new(tensor([[1, 2], [3, 4]])))).kv_cache
    executor.release_cache(handle.rows[1].cache_id())
    with pytest.raises(NotFoundError, match="freed"):
        run(executor.decode(DecodeInput.new(tensor([[5], [6]]), handle)))
    assert handle.rows[0].num_tokens() == 2
