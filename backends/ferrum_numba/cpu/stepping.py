"""The kernel of a whole decode step: embedding row in, logits out, nothing of Python in between.

Every worker thread keeps the residual stream and computes norms, activations and the joining of attention parts for
itself, since these cost less than waiting for them; what is large is dealt out in tasks: rows of a matrix, parts of the
keys. A phase is a set of tasks, and is over when all of them are done. A worker takes tasks as long as there are any
and then waits only for those that others have taken: so one worker alone can do the whole step, a late one joins in,
and one that the system has put to sleep holds up no more than its own task. What a phase leaves for good (the updates
of the residual stream) has a place of its own for each layer; what only the next phase reads is overwritten a layer
later, and a late worker that reads it then finds no task to use it for.
Clauses: BK-NCPU-18..20 (specs/backend_numba.md), DB-* (specs/decode_backend.md).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
from numba import prange

from ferrum_numba.cpu.addresses import call, fetch, fetch_and_add, floats_at, give_way, integers_at, keep
from ferrum_numba.cpu.attending import KEYS_AT_A_TIME, empty_part, finish, join
from ferrum_numba.cpu.compiled import device, parallel_kernel, routine
from ferrum_numba.cpu.pointwise import silu32, turn
from ferrum_numba.cpu.rows import inverse_root_mean_square, normalise
from ferrum_numba.cpu.vector import F32

PHASES_A_LAYER: Final = 5  # qkv, attention, output, gate and up, down
COUNTER_BYTES: Final = 128  # of a phase: tasks taken and tasks done, each on a cache line of its own
MATRIX_FIELDS: Final = 6  # address of its first part, parts, rows, columns, bias, rows of a task
PART_FIELDS: Final = 6  # address, that of its kind's multiply_rows, stride, scales, first row, row behind the last
VECTOR_FIELDS: Final = 4  # input norm, post norm, q norm, k norm
SPINS: Final = 4000  # waiting this often, about 0.1 ms, before giving way


@device
def take_task(counters, phase):
    return fetch_and_add(counters + phase * COUNTER_BYTES, 1)


@device
def finish_task(counters, phase):
    fetch_and_add(counters + phase * COUNTER_BYTES + COUNTER_BYTES // 2, 1)


@device
def wait_for(counters, phase, num_tasks):
    spins = 0
    while fetch(counters + phase * COUNTER_BYTES + COUNTER_BYTES // 2) < num_tasks:
        spins += 1
        if spins > SPINS:
            give_way()


@device
def project_rows(first_part, num_parts, start, stop, x, out, columns, num_rows):
    """out[start .. stop - 1] of a matrix whose parts lie one below the other."""
    for part in range(num_parts):
        fields = integers_at(first_part + 8 * PART_FIELDS * part, PART_FIELDS)
        first, above, below = fields[4], max(start, fields[4]), min(stop, fields[5])
        if above < below:
            scales, target = fields[3], out + 4 * first
            call(
                fields[1], (above - first, below - first, fields[0], fields[2], scales, x, target, 1, columns, num_rows)
            )


@routine(integers=5)
def project(counters, phase, matrix, x, out):
    """out = matrix @ x + bias, some rows a task."""
    fields = integers_at(matrix, MATRIX_FIELDS)
    num_rows, columns, bias, rows_a_task = fields[2], fields[3], fields[4], fields[5]
    num_tasks = (num_rows + rows_a_task - 1) // rows_a_task
    task = take_task(counters, phase)
    while task < num_tasks:
        start = task * rows_a_task
        stop = min(num_rows, start + rows_a_task)
        project_rows(fields[0], fields[1], start, stop, x, out, columns, num_rows)
        if bias:
            found, added = floats_at(out, num_rows), floats_at(bias, num_rows)
            for row in range(start, stop):
                found[row] += added[row]
        finish_task(counters, phase)
        task = take_task(counters, phase)
    wait_for(counters, phase, num_tasks)


@device
def prepared_head(source, size, norm, eps, cos, sin, target):
    """One head of q or k, normed where there is a norm, and rotated: source and target are addresses."""
    row, out, half = floats_at(source, size), floats_at(target, size), size // 2
    if norm:
        normalise(row, floats_at(norm, size), inverse_root_mean_square(row, size, eps), out, size)
        turn(out, floats_at(cos, half), floats_at(sin, half), out, half)
    else:
        turn(row, floats_at(cos, half), floats_at(sin, half), out, half)


@routine(integers=15, floats=2)
def attend_all(
    counters, attend_keys, phase, qkv, vectors, cos, sin, keys, values, position, heads, groups, size, capacity, parts,
    eps, scale,
):  # fmt: skip
    """Attention of the new token over positions 0 .. position, a kv head and a part of the keys a task.

    The task with the last keys puts the new key and value into the caches first.
    """
    norms = integers_at(vectors, VECTOR_FIELDS)
    ratio, splits = heads // groups, (position + KEYS_AT_A_TIME) // KEYS_AT_A_TIME
    queries, only_block = np.empty(ratio * size, np.float32), np.zeros(1, np.int64)
    q, row_bytes, width = queries.ctypes.data, 4 * groups * size, size + 2
    task = take_task(counters, phase)
    while task < groups * splits:
        group, split = task % groups, splits - 1 - task // groups
        for head in range(ratio):
            source = qkv + 4 * (group * ratio + head) * size
            prepared_head(source, size, norms[2], eps, cos, sin, q + 4 * head * size)
        k, v = keys + 4 * group * size, values + 4 * group * size
        start = split * KEYS_AT_A_TIME
        stop = min(position + 1, start + KEYS_AT_A_TIME)
        if stop == position + 1:
            source = qkv + 4 * (heads + group) * size
            prepared_head(source, size, norms[3], eps, cos, sin, k + position * row_bytes)
            found = floats_at(qkv + 4 * (heads + groups + group) * size, size)
            floats_at(v + position * row_bytes, size)[:] = found
        call(attend_keys, (
            q, 0, 0, 1, ratio, size, k, v, only_block.ctypes.data, capacity, row_bytes, row_bytes, size, F32, start,
            stop, position, 1, 0, parts + 4 * (split * heads + group * ratio) * width, 0, scale, np.float32(0.0),
        ))  # fmt: skip
        finish_task(counters, phase)
        task = take_task(counters, phase)
    wait_for(counters, phase, groups * splits)
    keep(queries)
    keep(only_block)


@device
def joined(parts, position, heads, size, out):
    """The parts of every head, joined and divided."""
    splits, width = (position + KEYS_AT_A_TIME) // KEYS_AT_A_TIME, size + 2
    held = np.empty(width, np.float32)
    for head in range(heads):
        empty_part(held)
        for split in range(splits):
            join(held, floats_at(parts + 4 * (split * heads + head) * width, width), size)
        finish(held, True, np.float32(0.0), False, floats_at(out + 4 * head * size, size), size)


@device
def add_and_norm(residual, update, weight, eps, out, size):
    """residual += update; out = rms_norm(residual)."""
    added = floats_at(update, size)
    for i in range(size):
        residual[i] += added[i]
    normalise(residual, floats_at(weight, size), inverse_root_mean_square(residual, size, eps), out, size)


@device
def gated(both, inner, out):
    gate, up = floats_at(both, inner), floats_at(both + 4 * inner, inner)
    for i in range(inner):
        out[i] = silu32(gate[i]) * up[i]


@routine(integers=24, floats=2)
def work(
    counters, project, attend_all, attend_keys, embedding, matrices, vectors, final_norm, caches, cos,
    sin, position, num_layers, hidden, inner, heads, groups, size, capacity, qkv, parts, both, updates, logits, eps,
    scale,
):  # fmt: skip
    """What each worker does."""
    residual, x = np.empty(hidden, np.float32), np.empty(max(hidden, heads * size, inner), np.float32)
    residual[:] = floats_at(embedding, hidden)
    address, matrix_bytes = x.ctypes.data, 8 * MATRIX_FIELDS
    norms = integers_at(vectors, VECTOR_FIELDS)
    normalise(residual, floats_at(norms[0], hidden), inverse_root_mean_square(residual, hidden, eps), x, hidden)
    for layer in range(num_layers):
        phase, matrix = PHASES_A_LAYER * layer, matrices + 4 * layer * matrix_bytes
        here = vectors + 8 * VECTOR_FIELDS * layer
        norms, kv = integers_at(here, VECTOR_FIELDS), integers_at(caches + 16 * layer, 2)
        after_attention, after_inner = updates + 8 * layer * hidden, updates + 8 * layer * hidden + 4 * hidden
        call(project, (counters, phase, matrix, address, qkv))
        call(attend_all, (
            counters, attend_keys, phase + 1, qkv, here, cos, sin, kv[0], kv[1], position, heads, groups, size,
            capacity, parts, eps, scale,
        ))  # fmt: skip
        joined(parts, position, heads, size, address)
        call(project, (counters, phase + 2, matrix + matrix_bytes, address, after_attention))
        add_and_norm(residual, after_attention, norms[1], eps, x, hidden)
        call(project, (counters, phase + 3, matrix + 2 * matrix_bytes, address, both))
        gated(both, inner, x)
        call(project, (counters, phase + 4, matrix + 3 * matrix_bytes, address, after_inner))
        following = final_norm
        if layer + 1 < num_layers:
            following = integers_at(here + 8 * VECTOR_FIELDS, VECTOR_FIELDS)[0]
        add_and_norm(residual, after_inner, following, eps, x, hidden)
    last = PHASES_A_LAYER * num_layers
    call(project, (counters, last, matrices + 4 * num_layers * matrix_bytes, address, logits))
    keep(x)


@parallel_kernel
def decode_step(
    threads, work, counters, project, attend_all, attend_keys, embedding, matrices, vectors, final_norm,
    caches, cos, sin, position, num_layers, hidden, inner, heads, groups, size, capacity, qkv, parts, both, updates,
    logits, eps, scale,
):  # fmt: skip
    """All layers and the logits of one token. work, project, attend_all and attend_keys are the addresses of
    those routines.

    matrices (4 L + 1, MATRIX_FIELDS), vectors (L, VECTOR_FIELDS) and caches (L, 2) int64, addresses among them; the
    rest float32. counters: zeros, COUNTER_BYTES for each of 5 L + 1 phases. Written: the new row of every cache, qkv,
    parts, both (gate and up), updates (L, 2, E), logits.
    """
    for _ in prange(threads):
        call(work, (
            counters, project, attend_all, attend_keys, embedding, matrices, vectors, final_norm, caches,
            cos, sin, position, num_layers, hidden, inner, heads, groups, size, capacity, qkv, parts, both, updates,
            logits, np.float32(eps), np.float32(scale),
        ))  # fmt: skip
