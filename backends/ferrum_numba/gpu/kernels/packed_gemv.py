"""Few rows times a transposed matrix in ggml's blocks of 32: Q4_0 or Q8_0, through shared memory.

A warp has a few rows of W and takes 64 blocks of each at a time, which are copied, sixteen bytes at once, while those
before are multiplied. Two lanes share a block. The products of a lane's half of a block are added before their sum is
scaled: d sum(q x).   Clauses: BK-NCUDA-14, BK-NCUDA-43 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ferrum_numba.gpu.kernel import INTEGER, Kernel, cuda, device, kernel
from ferrum_numba.gpu.kernels.packs import narrow_access, wide_access
from ferrum_numba.gpu.kernels.reduction import WARP, warp_sum
from ferrum_numba.gpu.kernels.weights import BLOCK, Q4_WORDS, Q8_WORDS, Weights
from ferrum_numba.gpu.pack_math import ZERO
from ferrum_numba.gpu.storage import Storage
from ferrum_numba.gpu.stream import await_all_but_one, copy_vector, end_group
from ferrum_numba.gpu.unpack import half_value, nibbles, signed_bytes
from ferrum_numba.gpu.wide import PACK, is_aligned

WARPS = 4  # of a block
STEP = 64  # blocks of a row at a time
PAIRS = STEP // 16  # of lanes, two to a block
HALF = BLOCK // 2


def outputs_of(w: Weights) -> int:
    """Rows of W that a warp multiplies: as many as fit twice into shared memory. Pure."""
    return 4 if w.name == "q4_0" else 2


def blocks_for(w: Weights, num_rows: int, num_columns: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(grid, block): blocks that share rows of W run side by side. Pure."""
    return (num_rows, -(-num_columns // (WARPS * outputs_of(w))), 1), (WARPS * WARP, 1, 1)


@device
def q4_dot(stage: Any, place: int, a: Any, b: Any, half: int) -> Any:
    """Weights 8 half .. + 7 of a block with a, those 16 further on with b, unscaled."""
    first = place + 1 + 4 * half
    n, m = nibbles(stage[first]), nibbles(stage[first + 1])
    total = n[0] * a[0] + n[2] * a[1] + n[1] * b[0] + n[3] * b[1]
    total += m[0] * a[2] + m[2] * a[3] + m[1] * b[2] + m[3] * b[3]
    n, m = nibbles(stage[first + 2]), nibbles(stage[first + 3])
    total += n[0] * a[4] + n[2] * a[5] + n[1] * b[4] + n[3] * b[5]
    return total + (m[0] * a[6] + m[2] * a[7] + m[1] * b[6] + m[3] * b[7])


@device
def q8_dot(stage: Any, place: int, a: Any, b: Any, half: int) -> Any:
    """Weights 16 half .. + 7 of a block with a, the next eight with b, unscaled."""
    first = place + 1 + 8 * half
    return bytes_dot(stage, first + 4, b, bytes_dot(stage, first, a, ZERO))


@device
def bytes_dot(stage: Any, first: int, a: Any, total: Any) -> Any:
    n, m = signed_bytes(stage[first]), signed_bytes(stage[first + 1])
    total += n[0] * a[0] + n[1] * a[1] + m[0] * a[2] + m[1] * a[3]
    n, m = signed_bytes(stage[first + 2]), signed_bytes(stage[first + 3])
    return total + (n[0] * a[4] + n[1] * a[5] + m[0] * a[6] + m[1] * a[7])


def packed_gemv(x: Storage, w: Weights) -> Kernel:
    """target[row] = x[row] @ weight.T for row blockIdx.x: x (rows, depth), weight (columns, depth) as 16-bit words."""
    is_q4, outputs = w.name == "q4_0", outputs_of(w)
    words_of_block, block_dot = (Q4_WORDS, q4_dot) if is_q4 else (Q8_WORDS, q8_dot)
    to_half, to_other = (PACK, HALF) if is_q4 else (HALF, PACK)  # from half 0 to half 1 of a block; from a to b
    of_row, of_buffer = STEP * words_of_block, outputs * STEP * words_of_block
    all_words = WARPS * 2 * of_buffer
    store, at, slowly = x.store, wide_access(x), narrow_access()
    fetch, widen, fetch_each = at.fetch, at.widen, slowly.fetch
    stage_next = _staging(outputs, words_of_block)

    @kernel(x.array, w.words, x.array, INTEGER, INTEGER)
    def packed_gemv(source: Any, words: Any, target: Any, num_columns: int, depth: int) -> None:
        stage = cuda.shared.array(all_words, np.uint16, 16)
        sums = cuda.local.array(outputs, np.float32)
        for r in range(outputs):
            sums[r] = ZERO
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        pair, half = lane // 2, lane % 2
        first_column = (cuda.blockIdx.y * WARPS + warp) * outputs
        num_blocks = depth // BLOCK
        start = cuda.blockIdx.x * depth
        is_whole = num_blocks % PACK == 0 and is_aligned(words)
        is_wide = is_aligned(source)
        mine = warp * 2 * of_buffer
        stage_next(stage, mine, words, first_column, num_columns, 0, num_blocks, lane, is_whole)
        buffer, done = 0, 0
        while done < num_blocks:
            other = of_buffer - buffer
            stage_next(stage, mine + other, words, first_column, num_columns, done + STEP, num_blocks, lane, is_whole)
            await_all_but_one()
            cuda.syncwarp()
            for part in range(PAIRS):
                block = part * 16 + pair
                if done + block < num_blocks:
                    first = (done + block) * BLOCK + half * to_half
                    if is_wide:
                        raw, more = fetch(source, start, first, depth), fetch(source, start, first + to_other, depth)
                        a, b = widen(raw), widen(more)
                    else:
                        a = fetch_each(source, start, first, depth)
                        b = fetch_each(source, start, first + to_other, depth)
                    place = mine + buffer + block * words_of_block
                    for r in range(outputs):
                        here = place + r * of_row
                        sums[r] += half_value(stage[here]) * block_dot(stage, here, a, b, half)
            cuda.syncwarp()  # everybody is done with what is overwritten next
            buffer, done = other, done + STEP
        for r in range(outputs):
            total = warp_sum(sums[r])
            if lane == 0 and first_column + r < num_columns:
                store(target, cuda.blockIdx.x * num_columns + first_column + r, total)

    return packed_gemv


def _staging(outputs: int, words_of_block: int) -> Callable[..., None]:
    of_row = STEP * words_of_block

    @device
    def stage_next(
        stage: Any,
        place: int,
        words: Any,
        first_column: int,
        num_columns: int,
        first_block: int,
        num_blocks: int,
        lane: int,
        is_whole: bool,
    ) -> None:
        """Start copying 64 blocks, or what is left, of each of the warp's rows of W; a group, possibly of nothing."""
        if first_block < num_blocks:
            count = min(STEP, num_blocks - first_block) * words_of_block
            for r in range(outputs):
                row = min(first_column + r, num_columns - 1)
                start, to = (row * num_blocks + first_block) * words_of_block, place + r * of_row
                if is_whole:
                    word = lane * PACK
                    while word < count:
                        copy_vector(stage, to + word, words, start + word)
                        word += WARP * PACK
                else:
                    word = lane
                    while word < count:
                        stage[to + word] = words[start + word]
                        word += WARP
        end_group()

    return stage_next
