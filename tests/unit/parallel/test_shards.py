"""Laws of sharding: nothing is lost, nothing is counted twice, and products of shards add up within the bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.parallel.shards import Copied, Once, Owned, Part, Rule, Split

UNIT = 2.0**-24  # of float32


def gamma(count: int) -> float:
    return count * UNIT / (1 - count * UNIT)


def shards(whole: Any, rule: Rule, num_ranks: int) -> list[Any]:
    return [rule.shard(whole, rank, num_ranks) for rank in range(num_ranks)]


@st.composite
def splits(draw: st.DrawFn) -> tuple[Split, int, tuple[int, ...]]:
    """A rule, a number of ranks, and the shape of a tensor that it cuts."""
    num_ranks = draw(st.integers(1, 5))
    sizes = st.builds(Part, st.integers(1, 9), st.integers(1, 3))
    parts = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = sum(part.num_entries for part in parts)
    return Split(axis, parts), num_ranks, tuple(shape)


@pytest.mark.clause("TP-SHARD-1", "TP-SHARD-2")
@given(splits())
def test_split_shards_join_to_the_whole(case: tuple[Split, int, tuple[int, ...]]) -> None:
    rule, num_ranks, shape = case
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert np.array_equal(rule.unshard(shards(whole, rule, num_ranks)), whole)


@pytest.mark.clause("TP-SHARD-1", "TP-SHARD-3", "TP-SHARD-4")
@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_whole_tensors_come_back(num_ranks: int, count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    whole = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    rules: list[Rule] = [Copied(), Once(), Once(index, count), Owned(0, index, count), Owned(1, index, count)]
    for rule in rules:
        assert np.array_equal(rule.unshard(shards(whole, rule, num_ranks)), whole)
    assert np.array_equal(sum(shards(whole, Once(index, count), num_ranks)), whole)
    sizes = [len(each) for each in shards(whole, Owned(0, index, count), num_ranks)]
    assert sorted(sizes) == [0] * (num_ranks - 1) + [3]
    assert sizes.index(3) == index * num_ranks // count


@pytest.mark.clause("TP-SHARD-2")
@given(st.integers(1, 40), st.integers(1, 9))
def test_runs_of_units_are_even(num_units: int, num_ranks: int) -> None:
    runs = [Part(num_units).units(rank, num_ranks) for rank in range(num_ranks)]
    if num_units >= num_ranks:
        assert [unit for run in runs for unit in run] == list(range(num_units))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1
    else:
        assert all(len(run) == 1 for run in runs)
        assert {run[0] for run in runs} == set(range(num_units))
        assert [run[0] for run in runs] == sorted(run[0] for run in runs)


@pytest.mark.clause("TP-SHARD-2")
def test_fused_matrices_are_cut_by_part() -> None:
    """Two ranks of q (4 heads of 1 row), k and v (2 heads): blind ranges would give the first rank q alone."""
    qkv = Split(0, (Part(4), Part(2), Part(2)))
    rows = np.arange(8)[:, None]
    assert qkv.shard(rows, 0, 2)[:, 0].tolist() == [0, 1, 4, 6]
    assert qkv.shard(rows, 1, 2)[:, 0].tolist() == [2, 3, 5, 7]
    assert qkv.shard(rows, 1, 4)[:, 0].tolist() == [1, 4, 6]  # the first kv head is shared by ranks 0 and 1
    assert qkv.shard(rows, 2, 4)[:, 0].tolist() == [2, 5, 7]


@pytest.mark.clause("TP-SHARD-5")
def test_what_does_not_fit_is_refused() -> None:
    rule = Split(1, (Part(3, 2),))
    with pytest.raises(ShapeError, match=r"got shape \[4, 5\], expected 6 entries along axis 1"):
        rule.shard(np.zeros((4, 5)), 0, 2)
    with pytest.raises(ShapeError, match=r"got shape \[6\], expected 6 entries along axis 1"):
        rule.shard(np.zeros(6), 0, 2)
    with pytest.raises(ShapeError, match="rank 1: got"):
        rule.unshard([np.zeros((4, 2)), np.zeros((4, 3))])
    with pytest.raises(ShapeError, match="rank 1: got"):
        rule.unshard([np.zeros((4, 2)), np.zeros((4, 5))])
    with pytest.raises(InvalidParameterError, match="got 2 of 2 ranks, expected 0 to 1"):
        Copied().shard(np.zeros(1), 2, 2)


def matrices(seed: int, rows: int, inner: int, outer: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    x, weight, bias = (
        rng.standard_normal((rows, inner)),
        rng.standard_normal((outer, inner)),
        rng.standard_normal(outer),
    )
    return x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32)


@pytest.mark.clause("TP-BOUND-1", "TP-SHARD-3")
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(5, 200), st.integers(1, 12))
def test_row_parallel_products_sum_within_the_products_own_bound(
    seed: int, num_ranks: int, inner: int, outer: int
) -> None:
    x, weight, bias = matrices(seed, 3, inner, outer)
    columns, once = Split(1, (Part(inner),)), Once()
    total = np.zeros((3, outer), np.float32)
    for rank in range(num_ranks):
        mine = x[:, Part(inner).entries(rank, num_ranks)]
        partial = mine @ columns.shard(weight, rank, num_ranks).T + once.shard(bias, rank, num_ranks)
        total = total + partial if rank else partial
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    terms = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T + np.abs(bias)
    assert (np.abs(total - exact) <= gamma(inner + 1) * terms).all()


@pytest.mark.clause("TP-BOUND-1")
def test_the_bound_is_not_vacuous() -> None:
    """A term lost, a bias counted twice, a sum in half precision: all outside."""
    x, weight, bias = matrices(1, 16, 64, 32)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    bound = gamma(65) * (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T + np.abs(bias))
    halves = [x[:, :32] @ weight[:, :32].T, x[:, 32:] @ weight[:, 32:].T]
    assert (np.abs(halves[0] + halves[1] + bias - exact) <= bound).all()
    assert (np.abs(halves[0] + halves[1] + 2 * bias - exact) > bound).any()
    assert (np.abs(halves[0] + x[:, 33:] @ weight[:, 33:].T + bias - exact) > bound).any()
    assert (np.abs(halves[0].astype(np.float16) + halves[1].astype(np.float16) + bias - exact) > bound).any()


@pytest.mark.clause("TP-BOUND-2")
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 60), st.integers(5, 40))
def test_column_parallel_products_are_the_wholes_columns(seed: int, num_ranks: int, inner: int, outer: int) -> None:
    x, weight, _ = matrices(seed, 3, inner, outer)
    rule = Split(0, (Part(outer),))
    joined = np.concatenate([x @ shard.T for shard in shards(weight, rule, num_ranks)], axis=1)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    terms = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    assert (np.abs(joined - exact) <= gamma(inner) * terms).all()
