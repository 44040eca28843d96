"""Shuffles, votes and matches against their definitions, and lanes that take no part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ferrum_numba.simulator import Simulator
from numba import cuda

from ferrum_ref.errors import BackendError, InvalidParameterError

ALL = 0xFFFFFFFF


def lanes(kernel: Any, num_lanes: int = 32, width: int = 1) -> Any:
    out = np.full((num_lanes, width), -1, np.int64)
    Simulator().launch(kernel, 1, num_lanes, out)
    return out


@pytest.mark.clause("BK-CUDASIM-4")
def test_shuffles_give_the_value_of_the_lane_they_name() -> None:
    def shuffle(out: Any) -> None:
        lane = cuda.threadIdx.x
        out[lane, 0] = cuda.shfl_sync(ALL, lane * 10, 5)
        out[lane, 1] = cuda.shfl_up_sync(ALL, lane * 10, 3)
        out[lane, 2] = cuda.shfl_down_sync(ALL, lane * 10, 3)
        out[lane, 3] = cuda.shfl_xor_sync(ALL, lane * 10, 6)
        out[lane, 4] = cuda.shfl_sync(ALL, lane * 10, (lane + 1) % 32)
        out[lane, 5] = cuda.shfl_sync(ALL, lane * 10, 37)

    lane = np.arange(32)
    out = lanes(shuffle, width=6)
    assert (out[:, 0] == 50).all()
    assert (out[:, 1] == 10 * np.where(lane >= 3, lane - 3, lane)).all()
    assert (out[:, 2] == 10 * np.where(lane < 29, lane + 3, lane)).all()
    assert (out[:, 3] == 10 * (lane ^ 6)).all()
    assert (out[:, 4] == 10 * ((lane + 1) % 32)).all()
    assert (out[:, 5] == 50).all()


@pytest.mark.clause("BK-CUDASIM-4")
def test_shuffles_stay_within_each_warp() -> None:
    def shuffle(out: Any) -> None:
        out[cuda.threadIdx.x, 0] = cuda.shfl_sync(ALL, cuda.threadIdx.x, 0)

    assert lanes(shuffle, 96)[:, 0].tolist() == [0] * 32 + [32] * 32 + [64] * 32


@pytest.mark.clause("BK-CUDASIM-4")
def test_votes_and_matches() -> None:
    def vote(out: Any) -> None:
        lane = cuda.laneid
        out[lane, 0] = cuda.ballot_sync(ALL, lane % 4 == 1)
        out[lane, 1] = cuda.all_sync(ALL, lane < 32)
        out[lane, 2] = cuda.any_sync(ALL, lane == 9)
        out[lane, 3] = cuda.eq_sync(ALL, lane == 9)
        out[lane, 4] = cuda.match_any_sync(ALL, lane % 2)
        mask, is_equal = cuda.match_all_sync(ALL, lane // 32)
        out[lane, 5] = mask if is_equal else 0
        out[lane, 6] = cuda.lanemask_lt()

    out = lanes(vote, width=7)
    assert (out[:, :4] == [0x22222222, 1, 1, 0]).all()
    assert out[:, 4].tolist() == [0x55555555, 0xAAAAAAAA] * 16
    assert (out[:, 5] == ALL).all()
    assert out[:, 6].tolist() == [(1 << lane) - 1 for lane in range(32)]


@pytest.mark.clause("BK-CUDASIM-4")
def test_a_part_of_a_warp_exchanges_by_its_own_mask() -> None:
    def halves(out: Any) -> None:
        lane = cuda.threadIdx.x
        if lane < 16:
            out[lane, 0] = cuda.shfl_xor_sync(0x0000FFFF, lane, 1)
        else:
            out[lane, 0] = cuda.shfl_xor_sync(0xFFFF0000, lane, 2)

    lane = np.arange(32)
    assert (lanes(halves)[:, 0] == np.where(lane < 16, lane ^ 1, lane ^ 2)).all()


def beyond_the_block(out: Any) -> None:
    out[cuda.threadIdx.x, 0] = cuda.shfl_xor_sync(ALL, cuda.threadIdx.x, 16)


def ended_lane(out: Any) -> None:
    if cuda.threadIdx.x != 7:
        out[cuda.threadIdx.x, 0] = cuda.shfl_sync(ALL, cuda.threadIdx.x, 7)


def without_the_caller(out: Any) -> None:
    out[cuda.threadIdx.x, 0] = cuda.shfl_sync(0x1, cuda.threadIdx.x, 0)


def other_branch(out: Any) -> None:
    if cuda.threadIdx.x < 8:
        out[cuda.threadIdx.x, 0] = cuda.shfl_sync(ALL, cuda.threadIdx.x, 0)
    else:
        out[cuda.threadIdx.x, 0] = cuda.shfl_sync(ALL, cuda.threadIdx.x, 8)


def mask_against_barrier(out: Any) -> None:
    if cuda.threadIdx.x == 0:
        cuda.syncthreads()
    else:
        cuda.syncwarp()


@pytest.mark.clause("BK-CUDASIM-4")
@pytest.mark.parametrize(
    ("kernel", "num_lanes", "told"),
    [
        (beyond_the_block, 16, r"thread \(0, 0, 0\): shfl_xor_sync .*: lane 0 reads lane 16, which takes no part"),
        (ended_lane, 32, r"lane 0 reads lane 7, which takes no part"),
        (without_the_caller, 32, r"thread \(1, 0, 0\): shfl_sync: mask 0x00000001 leaves out the calling lane 1"),
        (other_branch, 32, r"divergent barrier: .* at shfl_sync with mask 0xffffffff .*; .* at shfl_sync with mask"),
        (
            mask_against_barrier,
            32,
            r"thread \(0, 0, 0\) at syncthreads .*; threads \(1, 0, 0\).* at syncwarp with mask",
        ),
    ],
)
def test_lanes_that_do_not_take_part_are_told(kernel: Any, num_lanes: int, told: str) -> None:
    with pytest.raises(BackendError, match=told):
        lanes(kernel, num_lanes)


@pytest.mark.clause("BK-CUDASIM-4")
def test_sixteen_bits_cannot_be_shuffled() -> None:
    def half(out: Any) -> None:
        out[cuda.threadIdx.x, 0] = cuda.shfl_sync(ALL, np.float16(1.0), 0)

    with pytest.raises(InvalidParameterError, match=r"shfl_sync: value: got float16, expected 32 or 64 bits"):
        lanes(half)
