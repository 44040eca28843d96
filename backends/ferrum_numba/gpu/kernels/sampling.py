"""One token drawn from logits, in float64, by one block of threads.

No sorting: the k-th largest score and the border of the top-p set are found by bisection over the scores' bits, which
order as the scores do. Each thread has a contiguous share of the ids, so running sums go in the order of ids and
everything comes out the same in every run.   Clause: BK-NCUDA-15 (specs/backend_numba_cuda.md), KN-SAMPLE-1..10.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import DOUBLE, DOUBLES, INTEGER, INTEGERS, Kernel, cuda, device, kernel, libdevice
from ferrum_numba.gpu.kernels.reduction import WARP, warp_sum
from ferrum_numba.gpu.storage import Storage

MOST_THREADS = 256
SIGN = 0x7FFFFFFFFFFFFFFF


@device
def rank_of(score: Any) -> Any:
    """An int64 that orders as the float64 does (-0 counts as 0)."""
    bits = libdevice.double_as_longlong(score + 0.0)
    return bits if bits >= 0 else bits ^ SIGN


@device
def halfway(low: int, high: int) -> int:
    """floor((low + high) / 2) without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@device
def total_of(value: Any, shares: Any) -> Any:
    """The sum of every thread's value, the same bits in all of them; shares is free again afterwards."""
    value = warp_sum(value)
    if cuda.threadIdx.x % WARP == 0:
        shares[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    total = 0.0
    for warp in range(cuda.blockDim.x // WARP):
        total += shares[warp]
    cuda.syncthreads()
    return total


def sample(x: Storage) -> Kernel:
    """chosen[0] = the token; scores float64 (V,) is workspace: logits, penalised and divided, then probabilities.

    top_k 0 and top_p 1 are off; u in [0, 1); is_greedy takes the first maximum of the penalised logits.
    """
    load = x.load

    @kernel(
        *(x.array, DOUBLES, INTEGERS, INTEGERS, INTEGER, INTEGER),
        *(DOUBLE, DOUBLE, INTEGER, DOUBLE, DOUBLE, INTEGER),
    )
    def sample(
        logits: Any,
        scores: Any,
        chosen: Any,
        penalised: Any,
        count: int,
        num_penalised: int,
        penalty: Any,
        temperature: Any,
        top_k: int,
        top_p: Any,
        u: Any,
        is_greedy: int,
    ) -> None:
        shares = cuda.shared.array(MOST_THREADS, np.float64)
        thread = cuda.threadIdx.x
        share = (count + cuda.blockDim.x - 1) // cuda.blockDim.x
        start = min(thread * share, count)
        stop = min(start + share, count)
        for index in range(start, stop):
            scores[index] = np.float64(load(logits, index))
        cuda.syncthreads()
        for place in range(thread, num_penalised, cuda.blockDim.x):
            score = scores[penalised[place]]
            scores[penalised[place]] = score / penalty if score > 0.0 else score * penalty
        cuda.syncthreads()
        best = -math.inf
        for index in range(start, stop):
            score = scores[index] / temperature
            scores[index] = score
            best = score if score > best else best
        shares[thread] = best
        cuda.syncthreads()
        for other in range(cuda.blockDim.x):
            best = shares[other] if shares[other] > best else best
        cuda.syncthreads()
        floor = rank_of(-math.inf)
        if top_k > 0:  # the largest rank that at least top_k scores reach
            low, high = floor, rank_of(best) + 1
            while low + 1 < high:
                middle = halfway(low, high)
                reaching = 0.0
                for index in range(start, stop):
                    reaching += 1.0 if rank_of(scores[index]) >= middle else 0.0
                if total_of(reaching, shares) >= top_k:
                    low = middle
                else:
                    high = middle
            floor = low
        mass = 0.0
        for index in range(start, stop):
            mass += math.exp(scores[index] - best) if rank_of(scores[index]) >= floor else 0.0
        wanted = top_p * total_of(mass, shares)
        border, ties = floor, count  # kept: every rank above border, and the first `ties` ids at it
        if top_p < 1.0:  # the lowest rank with less than the wanted mass above it
            low, high = floor - 1, rank_of(best)
            while low + 1 < high:
                middle = halfway(low, high)
                mass = 0.0
                for index in range(start, stop):
                    mass += math.exp(scores[index] - best) if rank_of(scores[index]) > middle else 0.0
                if total_of(mass, shares) < wanted:
                    high = middle
                else:
                    low = middle
            border = high
            mass, weight = 0.0, 0.0
            for index in range(start, stop):
                rank = rank_of(scores[index])
                mass += math.exp(scores[index] - best) if rank > border else 0.0
                weight = math.exp(scores[index] - best) if rank == border else weight
            mass = total_of(mass, shares)
            shares[thread] = weight
            cuda.syncthreads()
            for other in range(cuda.blockDim.x):
                weight = shares[other] if shares[other] > weight else weight
            cuda.syncthreads()
            ties = 0
            while mass < wanted and ties < count:
                mass += weight
                ties += 1
        if is_greedy != 0:
            border, ties = rank_of(best), 1
        at_border = 0.0
        for index in range(start, stop):
            at_border += 1.0 if rank_of(scores[index]) == border else 0.0
        shares[thread] = at_border
        cuda.syncthreads()
        earlier = 0.0
        for other in range(thread):
            earlier += shares[other]
        cuda.syncthreads()
        mass = 0.0
        for index in range(start, stop):
            score = scores[index]
            rank = rank_of(score)
            is_kept = rank > border
            if rank == border:
                is_kept = earlier < ties
                earlier += 1.0
            weight = math.exp(score - best) if is_kept else 0.0
            scores[index] = weight
            mass += weight
        shares[thread] = mass
        cuda.syncthreads()
        before, after, total = 0.0, 0.0, 0.0  # running sums at the ends of this thread's share, and of all
        for other in range(cuda.blockDim.x):
            before = total if other == thread else before
            total += shares[other]
            after = total if other == thread else after
        point = u * total
        if before <= point and point < after:  # true for one thread: the sums ascend from 0 to above the point
            running, token = before, -1
            for index in range(start, stop):
                if scores[index] > 0.0 and (token < 0 or running <= point):
                    token = index
                running += scores[index]
            chosen[0] = token

    return sample
