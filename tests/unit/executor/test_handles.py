"""The handle that is given is the cache that is used: foreign and freed ones, forks, and rollback."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ModelError, NotFoundError, UnsupportedError
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.interfaces.kv_cache import AllocationRequest
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput, UnifiedBatch, UnifiedBatchItem
from ferrum_ref.kv_cache.audit import check_cache
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.ids import RequestId
from ferrum_ref.types.sampling import Priority


@pytest.fixture
def bench(judge7: Any) -> Any:
    return judge7.loaded.new_executor(60, 4)


def allocate(manager: Any, num_tokens: int) -> Any:
    return manager.allocate_now(
        AllocationRequest(RequestId.new(), num_tokens, 96, 3, 2, 8, Device.CPU, DataType.FP32, Priority.Normal)
    )


def audit(manager: Any) -> None:
    """Raises InternalError unless references, free list and tables agree."""
    handles = [manager.find_cache(handle.cache_id()) for _, handle in manager.list_handles()]
    forks = [table for _, table in manager._forks.values()]
    owned = [handle for handle in handles if handle.cache_id() not in manager._forks]
    check_cache(manager.pool, owned, forks, [])


@pytest.mark.clause("MX-HANDLE-1")
def test_another_managers_handle_is_unknown_even_under_a_live_id(
    judge7: Any, bench: Any, run: Any, tensor: Any
) -> None:
    executor, _ = bench
    theirs = judge7.loaded.new_executor(60, 4)[0]
    own = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:5])))).kv_cache
    foreign = run(theirs.prefill(PrefillInput.new(tensor(judge7.ids[:5])))).kv_cache
    assert own.cache_id() == foreign.cache_id()
    calls = [
        executor.decode(DecodeInput.new(tensor([1]), foreign)),
        executor.prefill(PrefillInput.new(tensor([1])).with_kv_cache(foreign)),
        executor.forward_verify([DecodeInput.new(tensor([1]), foreign)]),
        executor.truncate_kv(foreign, 3),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="another manager"):
            run(call)
    assert (own.num_tokens(), foreign.num_tokens()) == (5, 5)
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[5]]), own)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:6])


@pytest.mark.clause("MX-HANDLE-1", "MX-UNIFIED-5")
def test_a_freed_handle_is_not_found(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, _ = bench
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:5])))).kv_cache
    item = UnifiedBatchItem("a", [1], handle, 5, True)
    executor.release_cache(handle.cache_id())
    calls = [
        executor.decode(DecodeInput.new(tensor([1]), handle)),
        executor.prefill(PrefillInput.new(tensor([1])).with_kv_cache(handle)),
        executor.truncate_kv(handle, 3),
        executor.unified_decode(UnifiedBatch([item])),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="freed"):
            run(call)


@pytest.mark.clause("MX-HANDLE-2", "MX-PREFILL-1")
def test_the_given_handle_holds_the_keys(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    """Upstream keeps its own cache: the manager's blocks would stay zero, and the handle at 10 (D-83)."""
    executor, manager = bench
    handle = allocate(manager, 10)
    run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:10])).with_kv_cache(handle)))
    run(executor.decode(DecodeInput.new(tensor([judge7.ids[10]]), handle)))
    assert handle.num_tokens() == 11
    for layer in range(3):
        rows = handle.key_cache(layer).to_numpy()
        assert rows.shape == (11, 2, 8)
        assert (np.abs(rows).max(axis=(1, 2)) > 0).all()
    assert executor.status().memory_usage.used_bytes == 3 * 4 * 2 * 3 * 2 * 8 * 4


@pytest.mark.clause("MX-HANDLE-3")
def test_nothing_another_cache_reads_is_overwritten(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, manager = bench
    source = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6])))).kv_cache
    fork = source.clone_handle()
    with pytest.raises(ModelError, match="shares"):  # without positions it would begin at 0
        run(executor.prefill(PrefillInput.new(tensor([1, 2, 3])).with_kv_cache(fork)))
    more = PrefillInput.new(tensor([1, 2, 3])).with_kv_cache(fork).with_position_ids(tensor([6, 7, 8]))
    output = run(executor.prefill(more))
    assert judge7.right(output.last_token_logits().to_numpy(), [*judge7.ids[:6], 1, 2, 3])
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[6]]), source)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:7])
    audit(manager)


@pytest.mark.clause("MX-HANDLE-3", "MX-PREFILL-3")
def test_a_fresh_handle_may_be_filled_chunk_by_chunk_beside_others(
    judge7: Any, bench: Any, run: Any, tensor: Any
) -> None:
    executor, manager = bench
    run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6]))))
    handle = allocate(manager, 12)
    for start in (0, 4, 8):
        chunk = PrefillInput.new(tensor(judge7.ids[start : start + 4])).with_kv_cache(handle)
        output = run(executor.prefill(chunk))
        assert judge7.right(output.last_token_logits().to_numpy(), judge7.ids[: start + 4])
    assert handle.num_tokens() == 12


@pytest.mark.clause("MX-HANDLE-4", "MX-TRUNCATE-4")
def test_a_manager_without_rollback(judge7: Any, run: Any, tensor: Any) -> None:
    """It keeps what it grew, says so, and what is cached is still what was cached."""
    base, _ = judge7.loaded.new_executor(60, 4)
    manager = PagedKvCacheManager(60, 4, storage=base._storage)
    executor = PagedModelExecutor(
        judge7.loaded.decoder, base._storage, base._factory, base.info(), base.capabilities(),
        lender=manager, head_dim=8,
    )  # fmt: skip
    assert not executor.can_truncate()
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6])))).kv_cache
    with pytest.raises(UnsupportedError, match="takes no tokens back"):
        run(executor.truncate_kv(handle, 5))
    run(executor.truncate_kv(handle, 6))
    other = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6])))).kv_cache
    with pytest.raises(InvalidParameterError):
        run(executor.batch_decode([DecodeInput.new(tensor([1]), handle), DecodeInput.new(tensor([97]), other)]))
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[6]]), handle)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:7])


@pytest.mark.clause("MX-TRUNCATE-2", "MX-TRUNCATE-3")
def test_rejected_tokens_leave_no_trace(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, manager = bench
    handle = run(executor.prefill(PrefillInput.new(tensor([*judge7.ids[:6], 90, 91, 92, 93])))).kv_cache
    assert (handle.block_table().num_blocks(), manager.stats().free_blocks) == (3, 57)
    run(executor.truncate_kv(handle, 6))
    assert handle.num_tokens() == 6
    assert (handle.block_table().num_blocks(), manager.stats().free_blocks) == (2, 58)
    for at in range(6, 12):
        step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[at]]), handle)))
        assert judge7.right(step.logits.to_numpy(), judge7.ids[: at + 1])
    run(executor.truncate_kv(handle, 12))
    assert handle.num_tokens() == 12
    run(executor.truncate_kv(handle, 0))
    assert (handle.num_tokens(), manager.stats().free_blocks) == (0, 60)
    output = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:3])).with_kv_cache(handle)))
    assert judge7.right(output.last_token_logits().to_numpy(), judge7.ids[:3])


@pytest.mark.clause("MX-TRUNCATE-3", "MX-TRUNCATE-5")
@pytest.mark.parametrize("cut", [3, 4, 8, 9])
def test_a_shared_block_is_never_freed_or_written(judge7: Any, bench: Any, run: Any, tensor: Any, cut: int) -> None:
    executor, manager = bench
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:10])))).kv_cache
    clone = handle.clone_handle()
    kept = clone.key_cache(2).to_numpy().copy()
    run(executor.truncate_kv(handle, cut))
    assert handle.block_table().num_blocks() == -(-cut // 4)
    assert manager.stats().free_blocks == 57
    audit(manager)
    text = list(judge7.ids[:cut])
    for token in (70, 71, 72, 73, 74):
        text.append(token)
        step = run(executor.decode(DecodeInput.new(tensor([token]), handle)))
        assert judge7.right(step.logits.to_numpy(), text)
    np.testing.assert_array_equal(clone.key_cache(2).to_numpy(), kept)
    step = run(executor.decode(DecodeInput.new(tensor([judge7.ids[10]]), clone)))
    assert judge7.right(step.logits.to_numpy(), judge7.ids[:11])
    audit(manager)


@pytest.mark.clause("MX-TRUNCATE-4")
def test_what_truncation_refuses(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, manager = bench
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:5])))).kv_cache
    for length in (-1, 6):
        with pytest.raises(InvalidParameterError, match="holds 5 tokens"):
            run(executor.truncate_kv(handle, length))
    with pytest.raises(InvalidParameterError, match="use extend"):
        manager.truncate_now(handle, 6)
    with pytest.raises(InvalidParameterError, match="new_len"):
        manager.truncate_now(handle, -1)
    batch = run(executor.prefill(PrefillInput.new(tensor([[1], [2]])))).kv_cache
    with pytest.raises(UnsupportedError, match="batch of 1 with 2"):
        run(executor.truncate_kv(batch, 0))
    assert handle.num_tokens() == 5


@pytest.mark.clause("MX-TRUNCATE-5")
def test_a_block_kept_in_part_is_no_cached_prefix(judge7: Any, bench: Any) -> None:
    _, manager = bench
    handle = allocate(manager, 8)
    blocks = handle.block_table().physical_blocks
    for block in blocks:
        manager.pool.index.register(block, bytes([block] * 16))
    handle.num_registered_blocks = 2
    manager.truncate_now(handle, 6)
    assert manager.pool.index.digest_of(blocks[0]) is not None
    assert manager.pool.index.digest_of(blocks[1]) is None
    assert handle.num_registered_blocks == 1


@pytest.mark.clause("MX-TRUNCATE-2", "MX-TRUNCATE-3", "MX-TRUNCATE-5", "MX-HANDLE-2", "MX-HANDLE-3", "MX-VERIFY-2")
@settings(max_examples=60)
@given(data=st.data())
def test_any_program_of_appends_cuts_clones_and_releases(judge7: Any, data: st.DataObject) -> None:
    """Each cache is a list of tokens; logits are those of the list, accounting is exact, every block comes home."""
    executor, manager = judge7.loaded.new_executor(40, 4)
    caches: list[tuple[Any, list[int]]] = []
    token = st.integers(0, 3)
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["new", "append", "cut", "clone", "release"]))
        if action == "new" or not caches:
            caches.append((executor.new_cache_now(), []))
            continue
        at = data.draw(st.integers(0, len(caches) - 1))
        handle, text = caches[at]
        if action == "append":
            members = data.draw(st.lists(st.sampled_from(range(len(caches))), min_size=1, max_size=3, unique=True))
            new = [data.draw(st.lists(token, min_size=1, max_size=6)) for _ in members]
            found = executor.append_now([caches[i][0] for i in members], new)
            for i, part, logits in zip(members, new, found, strict=True):
                caches[i][1].extend(part)
                for back in range(1, len(part) + 1):
                    assert judge7.right(logits[-back], caches[i][1], -back)
        elif action == "cut":
            length = data.draw(st.integers(0, len(text)))
            executor.truncate_now(handle, length)
            del text[length:]
        elif action == "clone":
            caches.append((handle.clone_handle(), list(text)))
        else:
            manager.free_handle(handle)
            del caches[at]
        for live, tokens in caches:
            assert live.num_tokens() == len(tokens)
            assert live.block_table().num_blocks() == -(-len(tokens) // 4)
        audit(manager)
    for handle, _ in caches:
        manager.free_handle(handle)
    assert manager.stats().free_blocks == 40


@pytest.mark.clause("MX-HANDLE-1")
def test_forgotten_forks_are_not_kept_alive(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    executor, manager = bench
    source = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:6])))).kv_cache
    fork = source.clone_handle()
    run(executor.decode(DecodeInput.new(tensor([1]), fork)))
    del fork
    gc.collect()
    assert manager.gc_now().caches_freed == 1
    assert manager.stats().free_blocks == 58


@pytest.mark.clause("MX-VERIFY-1")
def test_verification_runs_where_the_cache_ends(judge7: Any, bench: Any, run: Any, tensor: Any) -> None:
    """20 tokens cached: upstream's default would verify positions 0, 1, ... (D-36)."""
    executor, _ = bench
    handle = run(executor.prefill(PrefillInput.new(tensor(judge7.ids[:20])))).kv_cache
    chain = [DecodeInput.new(tensor([token]), handle) for token in judge7.ids[20:25]]
    before = executor.status().decode_operations
    outputs = run(executor.forward_verify(chain))
    assert executor.status().decode_operations == before + 5
    for at, output in enumerate(outputs):
        assert output.logits.shape() == (1, 97)
        assert judge7.right(output.logits.to_numpy(), judge7.ids[: 21 + at])
    assert outputs[-1].kv_cache is handle
    assert handle.num_tokens() == 25
    placed = [step.with_position_ids(tensor([[25 + i]])) for i, step in enumerate(chain)]
    run(executor.forward_verify(placed))
    assert handle.num_tokens() == 30
    other = run(executor.prefill(PrefillInput.new(tensor([1])))).kv_cache
    wrong = [
        [chain[0], DecodeInput.new(tensor([1]), other)],
        placed,
        [chain[0], placed[1]],
        [chain[0], DecodeInput.new(tensor([1, 2]), handle)],
    ]
    for inputs in wrong:
        with pytest.raises(ModelError):
            run(executor.forward_verify(inputs))
    assert (handle.num_tokens(), other.num_tokens()) == (30, 1)
    assert run(executor.forward_verify([])) == []


@pytest.mark.clause("MX-THREAD-1")
def test_threads_take_turns(judge7: Any, bench: Any, tensor: Any) -> None:
    """Two threads decode one cache; the decoder dawdles until somebody else comes in, which nobody must."""
    executor, _ = bench
    handle = executor.prefill_now([PrefillInput.new(tensor(judge7.ids[:4]))])[0].kv_cache
    decoder, second_came = judge7.loaded.decoder, threading.Event()
    inside: list[int] = []

    class Dawdling:
        max_tokens = 96
        check = decoder.check

        def forward(self, *arguments: Any) -> Any:
            inside.append(1)
            if len(inside) > 1:
                second_came.set()
            second_came.wait(0.2)
            result = decoder.forward(*arguments)
            inside.pop()
            return result

    executor._forwarder._decoder = Dawdling()
    threads = [threading.Thread(target=executor.append_now, args=([handle], [[9]])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not second_came.is_set()
    assert handle.num_tokens() == 6
    executor._forwarder._decoder = decoder
    logits = executor.append_now([handle], [[8]])[0]
    assert judge7.right(logits, [*judge7.ids[:4], 9, 9, 8])


@pytest.mark.clause("MX-VERIFY-2")
def test_the_wanted_rows(judge7: Any, bench: Any) -> None:
    executor, _ = bench
    first, second = executor.new_cache_now(), executor.new_cache_now()
    tokens = [judge7.ids[:3], judge7.ids[:1]]
    assert [part.shape for part in executor.append_now([first, second], tokens, "none")] == [(0, 97), (0, 97)]
    last = executor.append_now([first, second], [judge7.ids[3:6], judge7.ids[1:5]], "last")
    assert [part.shape for part in last] == [(1, 97), (1, 97)]
    assert judge7.right(last[0], judge7.ids[:6])
    assert judge7.right(last[1], judge7.ids[:5])
    assert executor.append_now([], []) == []
    with pytest.raises(ModelError, match="at least one token"):
        executor.append_now([first], [[]])
