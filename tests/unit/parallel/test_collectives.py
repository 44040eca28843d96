"""What ranks say to each other: threads of this process, groups within groups, one gloo process by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ferrum_torch.collectives import make_collectives
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import (
    AlreadyExistsError,
    FerrumError,
    FerrumTimeoutError,
    InvalidParameterError,
    NetworkError,
    ShapeError,
)
from ferrum_ref.interfaces.collectives import Collectives
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.parallel.decoder import Across, read_rank
from ferrum_ref.parallel.in_process import ThreadGroup, run_ranks
from ferrum_ref.parallel.subgroup import ALONE, Subgroup, grid
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

BF16_UNIT = 2.0**-8
UNIT = 2.0**-24


def values_of(rank: int) -> Any:
    return (np.random.default_rng(rank).standard_normal((3, 5)) * 10.0**rank).astype(np.float32)


@pytest.mark.clause("TP-COLL-1", "TP-COLL-2")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_gathered_and_summed_in_rank_order(num_ranks: int) -> None:
    def work(peers: Collectives) -> tuple[Any, Any]:
        mine = values_of(peers.rank)
        gathered = peers.all_gather(mine)
        mine[...] = 0.0  # what was said stays said
        return gathered, peers.all_reduce_sum(values_of(peers.rank))

    expected = [values_of(rank) for rank in range(num_ranks)]
    in_order = reduce(np.add, expected)
    for gathered, total in run_ranks(num_ranks, work):
        assert all(np.array_equal(a, b) for a, b in zip(gathered, expected, strict=True))
        assert total.dtype == np.float32
        assert np.array_equal(total, in_order)


@pytest.mark.clause("TP-COLL-2")
def test_the_order_of_the_sum_is_the_ranks() -> None:
    """(2^24 + 1) + 1 stays 2^24 in float32; 1 + 1 first would give 2^24 + 2."""
    parts = [np.array([value], np.float32) for value in (2.0**24, 1.0, 1.0)]
    totals = run_ranks(3, lambda peers: peers.all_reduce_sum(parts[peers.rank]))
    assert [float(total[0]) for total in totals] == [2.0**24] * 3
    assert parts[0][0] == 2.0**24, "the operand is not written to"


@pytest.mark.clause("TP-COLL-3")
def test_letters_arrive_in_order_and_at_the_right_door() -> None:
    def work(peers: Collectives) -> list[float]:
        if peers.rank == 0:
            for to in (2, 1):
                peers.send(np.full((2,), 10.0 * to, np.float32), to)
                peers.send(np.full((1, 1), 10.0 * to + 1, np.float32), to)
            return []
        return [float(peers.recv((2,), 0)[0]), float(peers.recv((1, 1), 0)[0, 0])]

    assert run_ranks(3, work) == [[], [10.0, 11.0], [20.0, 21.0]]


@pytest.mark.clause("TP-COLL-3", "TP-COLL-4")
def test_wrong_doors_and_shapes() -> None:
    group = ThreadGroup(2, timeout_s=0.1)
    first, second = group.rank(0), group.rank(1)
    for bad in (0, 2, -1):
        with pytest.raises(InvalidParameterError, match=f"rank: got {bad}, expected another one than 0 of 2"):
            first.send(np.zeros(1, np.float32), bad)
        with pytest.raises(InvalidParameterError, match=f"rank: got {bad}, expected another one than 0 of 2"):
            first.recv((1,), bad)
    first.send(np.zeros(3, np.float32), 1)
    with pytest.raises(ShapeError, match=r"got shape \(3,\) from rank 0, expected \(4,\)"):
        second.recv((4,), 0)
    with pytest.raises(FerrumTimeoutError, match=r"recv from rank 0: rank 1 waited 0\.1 s"):
        second.recv((4,), 0)
    with pytest.raises(FerrumTimeoutError, match=r"barrier: rank 0 waited 0\.1 s"):
        first.barrier()
    with pytest.raises(ShapeError, match="expected one shape"):
        run_ranks(2, lambda peers: peers.all_gather(np.zeros(1 + peers.rank, np.float32)))
    for bad in (-1, 2):
        with pytest.raises(InvalidParameterError, match=f"got {bad}, expected 0 to 1"):
            group.rank(bad)
    with pytest.raises(InvalidParameterError, match="num_ranks: got 0, expected at least 1"):
        ThreadGroup(0)


@pytest.mark.clause("TP-COLL-4", "TP-COLL-5")
@pytest.mark.parametrize("waiting", ["gather", "recv"])
def test_a_rank_that_fails_ends_the_run_with_its_own_error(waiting: str) -> None:
    seen: list[FerrumError] = []

    def work(peers: Collectives) -> None:
        try:
            peers.barrier()
            if peers.rank == 1:
                raise ValueError("rank 1 has had enough")
            if waiting == "gather":
                peers.all_gather(np.zeros(1, np.float32))
            else:
                peers.recv((1,), 1)
        except FerrumError as error:
            seen.append(error)
            raise

    start_s = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 has had enough"):
        run_ranks(3, work, timeout_s=60.0)
    assert time.monotonic() - start_s < 30.0
    assert len(seen) == 2
    assert all(isinstance(error, NetworkError) and "lost another rank" in str(error) for error in seen)


@pytest.mark.clause("TP-COLL-6")
def test_groups_within_a_group() -> None:
    def work(world: Collectives) -> tuple[Any, ...]:
        peers, stages = grid(world, 2)
        mine = np.array([float(world.rank)], np.float32)
        shards = [float(each[0]) for each in peers.all_gather(mine)]
        chain = [float(each[0]) for each in stages.all_gather(mine)]
        if stages.rank + 1 < stages.num_ranks:
            stages.send(mine, stages.rank + 1)
        came = float(stages.recv((1,), stages.rank - 1)[0]) if stages.rank else -1.0
        peers.barrier()
        return peers.rank, shards, stages.rank, chain, float(peers.all_reduce_sum(mine)[0]), came

    found = run_ranks(6, work)
    assert found[0] == (0, [0.0, 1.0], 0, [0.0, 2.0, 4.0], 1.0, -1.0)
    assert found[3] == (1, [2.0, 3.0], 1, [1.0, 3.0, 5.0], 5.0, 1.0)
    assert found[5] == (1, [4.0, 5.0], 2, [1.0, 3.0, 5.0], 9.0, 3.0)
    world = ThreadGroup(4).rank(1)
    for bad in ([0, 2], [1, 1], [1, 4], []):
        with pytest.raises(InvalidParameterError, match="expected different ranks of 4, rank 1 among them"):
            Subgroup(world, bad)
    for number in (0, 3):
        with pytest.raises(InvalidParameterError, match=f"got {number} for 4 ranks, expected a divisor"):
            grid(world, number)
    with pytest.raises(InvalidParameterError, match="rank: got 1, expected another one than 1 of 2"):
        Subgroup(world, [0, 1]).send(np.zeros(1, np.float32), 1)
    for refused in (lambda: ALONE.send(np.zeros(1, np.float32), 0), lambda: ALONE.recv((1,), 0)):
        with pytest.raises(InvalidParameterError, match="this rank is alone"):
            refused()


@pytest.mark.clause("TP-GLOO-1", "TP-GLOO-2", "TP-GLOO-3")
def test_gloo_by_itself(tmp_path: Path) -> None:
    with make_collectives(0, 1, f"file://{tmp_path / 'alone'}", 5.0) as peers:
        assert (peers.rank, peers.num_ranks) == (0, 1)
        assert np.array_equal(peers.all_reduce_sum(values_of(1)), values_of(1))
        assert peers.all_gather(np.zeros((0, 3), np.float32))[0].shape == (0, 3)
        peers.barrier()
        for call in (lambda: peers.send(values_of(0), 0), lambda: peers.recv((1,), 1)):
            with pytest.raises(InvalidParameterError, match="expected another one than 0 of 1"):
                call()
        with pytest.raises(AlreadyExistsError, match="in a group already"):
            make_collectives(0, 1, f"file://{tmp_path / 'twice'}")
    peers.close()
    with pytest.raises(InvalidParameterError, match="rank: got 2, expected 0 to 1"):
        make_collectives(2, 2, f"file://{tmp_path / 'none'}")
    with pytest.raises(FerrumTimeoutError, match=r"make_collectives: rank 0 of 2 waited 0\.5 s for the others"):
        make_collectives(0, 2, f"file://{tmp_path / 'nobody'}", 0.5)


@pytest.mark.clause("TP-BOUND-1", "TP-BOUND-3", "TP-RUN-2")
@pytest.mark.parametrize("name", ["numpy", "torch"])
@given(seed=st.integers(0, 2**32), num_ranks=st.integers(2, 4))
def test_row_parallel_products_of_a_backend(name: str, seed: int, num_ranks: int) -> None:
    """Element by element, in float32 and in bfloat16, through the decoder's own sum."""
    backend, rng = load_backend(name), np.random.default_rng(seed)
    factory, linear = backend.tensor_factory(), backend.kernel_ops().linear_ops()  # type: ignore[union-attr]
    assert linear is not None
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 48), (7, 48)))
    for dtype, unit in ((DataType.FP32, 0.0), (DataType.BF16, BF16_UNIT)):
        stored = [factory.from_numpy(each).to_dtype(dtype) for each in (x, weight)]
        wide = [np.array(each.to_numpy(), np.float64) for each in stored]

        def work(peers: Collectives, dtype: DataType = dtype, wide: list[Any] = wide) -> Any:
            mine = np.array_split(np.arange(48), peers.num_ranks)[peers.rank]
            parts = [factory.from_numpy(each[:, mine].astype(np.float32)).to_dtype(dtype) for each in wide]
            return Across(backend, peers).summed(linear.linear(*parts)).to_numpy()

        found = [np.array(each, np.float64) for each in run_ranks(num_ranks, work)]
        exact, terms = wide[0] @ wide[1].T, np.abs(wide[0]) @ np.abs(wide[1]).T
        inner = 48 * UNIT / (1 - 48 * UNIT)
        bound = (1 + unit) * (inner * (1 + unit) + unit) * terms + unit * np.abs(exact)
        assert all(np.array_equal(each, found[0]) for each in found)
        assert (np.abs(found[0] - exact) <= bound).all()


@pytest.mark.clause("TP-RUN-3", "TP-RUN-7")
def test_embedding_rows_are_exact_and_bad_ids_refused_everywhere(
    family_model: Callable[[str], Any],
) -> None:
    tiny, backend = family_model("llama"), load_backend("numpy")
    ids = np.arange(tiny.config.vocab_size)

    def work(peers: Collectives) -> tuple[Any, int]:
        decoder = read_rank(checkpoint, backend, peers)
        bad = ForwardBatch.build([[3, tiny.config.vocab_size]], [0])
        with pytest.raises(InvalidParameterError, match=rf"\[0, {len(ids)}\), got {len(ids)}"):
            decoder.forward(bad, None)  # type: ignore[arg-type]
        return decoder.embed(ids).to_numpy(), decoder.weights.embedding.shape()[0]

    with open_checkpoint(tiny.path) as checkpoint:
        table = checkpoint.read("model.embed_tokens.weight")
        found = run_ranks(4, work)
    assert all(np.array_equal(rows, table) for rows, _ in found)
    assert sorted(count for _, count in found) == [16, 17, 17, 17]


@pytest.mark.clause("TP-RUN-2", "TP-COLL-2")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_narrow_partial_sums_are_added_in_float32_and_rounded_once(name: str) -> None:
    backend = load_backend(name)
    parts = [np.random.default_rng(rank).standard_normal((3, 50)).astype(ml_dtypes.bfloat16) for rank in range(3)]

    def work(peers: Collectives) -> Any:
        mine = backend.tensor_factory().from_numpy(parts[peers.rank].astype(np.float32)).to_dtype(DataType.BF16)
        total = Across(backend, peers).summed(mine)
        assert total.dtype() is DataType.BF16
        return np.array(total.to_numpy(), np.float32)

    first, second, third = (part.astype(np.float32) for part in parts)
    expected = (first + second + third).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert all(np.array_equal(each, expected) for each in run_ranks(3, work))
