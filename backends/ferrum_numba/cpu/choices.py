"""Kernel of the token choice: repetition penalty, temperature, top-k, top-p, draw, in float64.

Clauses: BK-NCPU-15 (specs/backend_numba.md), KN-SAMPLE-1..8 (specs/kernels.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import numpy as np

from ferrum_numba.cpu.addresses import doubles_at, integers_at
from ferrum_numba.cpu.compiled import ordered, serial_kernel

GREEDY_BELOW = 1e-5


@ordered
def uniform_of(seed):
    """u in [0, 1): the 32-bit seed, mixed by MurmurHash3's finaliser, over 2**32.  Source: Appleby, fmix32."""
    mixed = np.uint32(seed)
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.float64(np.uint32(mixed ^ (mixed >> np.uint32(16)))) / 4294967296.0


@ordered
def first_largest(x):
    best = 0
    for i in range(1, len(x)):
        if x[i] > x[best]:
            best = i
    return best


@ordered
def descending(values):
    """The order of float64 values from the largest down, equal ones by lower index: a radix sort, a byte at a time."""
    count = len(values)
    keys, order = np.empty(count, np.uint64), np.empty(count, np.int64)
    other_keys, other_order = np.empty(count, np.uint64), np.empty(count, np.int64)
    for i in range(count):
        bits = np.float64(values[i] + 0.0).view(np.uint64)  # -0 is 0
        is_negative = bits >> np.uint64(63)
        keys[i] = bits if is_negative else np.uint64(bits ^ np.uint64(0x7FFFFFFFFFFFFFFF))
        order[i] = i
    for byte in range(8):
        shift = np.uint64(8 * byte)
        starts = np.zeros(257, np.int64)
        for i in range(count):
            starts[np.int64((keys[i] >> shift) & np.uint64(255)) + 1] += 1
        for value in range(256):
            starts[value + 1] += starts[value]
        for i in range(count):
            digit = np.int64((keys[i] >> shift) & np.uint64(255))
            place = starts[digit]
            starts[digit] = place + 1
            other_keys[place], other_order[place] = keys[i], order[i]
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
    return order


@ordered
def keep_top_k(x, top_k):
    """Everything below the k-th largest becomes -inf; ties with it stay."""
    threshold = x[descending(x)[top_k - 1]]
    for i in range(len(x)):
        if x[i] < threshold:
            x[i] = -np.inf


@ordered
def to_probabilities(x):
    """softmax(x), in place."""
    highest = x[first_largest(x)]
    total = 0.0
    for i in range(len(x)):
        x[i] = math.exp(x[i] - highest)
        total += x[i]
    for i in range(len(x)):
        x[i] /= total


@ordered
def keep_top_p(p, top_p):
    """In descending order, ties by lower id, what comes once the mass before it reaches top_p becomes 0."""
    order = descending(p)
    running = 0.0
    for rank in range(len(order)):
        mass = p[order[rank]]
        running += mass
        if rank > 0 and running - mass >= top_p:
            p[order[rank]] = 0.0


@ordered
def draw(p, u):
    """The first index whose running sum exceeds u times the total: its own probability is positive."""
    total = 0.0
    for i in range(len(p)):
        total += p[i]
    point, running, last = u * total, 0.0, 0
    for i in range(len(p)):
        running += p[i]
        if p[i] > 0.0:
            last = i
            if running > point:
                return i
    return last


@serial_kernel
def choose(logits, num_logits, listed, num_listed, penalty, temperature, top_k, top_p, seed):
    """The chosen id. float64 logits, overwritten; distinct listed ids, int64."""
    x, ids = doubles_at(logits, num_logits), integers_at(listed, num_listed)
    for i in range(num_listed):
        old = x[ids[i]]
        x[ids[i]] = old / penalty if old > 0.0 else old * penalty
    if temperature < GREEDY_BELOW:
        return first_largest(x)
    for i in range(num_logits):
        x[i] = x[i] / temperature
    if 0 < top_k < num_logits:
        keep_top_k(x, top_k)
    to_probabilities(x)
    if top_p < 1.0:
        keep_top_p(x, top_p)
    return draw(x, uniform_of(seed))
