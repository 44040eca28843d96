"""Bugs of attention over blocks, and of writing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ferrum_ref.parity.honest.attention import (
    Sequence,
    attend_whole,
    attended,
    attention,
    gathered,
    sequence_of,
    with_arrays,
    with_settings,
)
from ferrum_ref.parity.honest.sums import F32, Kernel, stored, wide
from ferrum_ref.parity.mutants.attention import (
    finite_mask,
    heads_interleaved,
    mask_top_left,
    maximum_from_zero,
    scale_of_padded_head,
)
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]
HONEST = attention("plain")
GROUP = "paged cache"


def other_table(change: Callable[[Array, int, Array], Array]) -> Kernel:
    """The honest kernel after `change(table, block size, lens)`."""

    def run(inputs: Inputs) -> Outputs:
        table, lens = inputs.settings["table"].copy(), inputs.settings["lens"]
        return HONEST(with_settings(inputs, table=change(table, inputs.case.sizes["block"], lens)))

    return run


def wrong_page_at_one_block(table: Array, block: int, lens: Array) -> Array:
    """The second block of every sequence that has one is read where the first lies."""
    longer = lens > block
    table[longer, 1:2] = table[longer, 0:1]
    return table


def last_two_pages_swapped(table: Array, block: int, lens: Array) -> Array:
    for row, length in zip(table, lens, strict=True):
        count = -(-int(length) // block)
        if count > 1:
            row[[count - 1, count - 2]] = row[[count - 2, count - 1]]
    return table


def table_of_first_sequence(table: Array, block: int, lens: Array) -> Array:
    table[1:] = table[:1]
    return table


def page_number_wraps(table: Array, block: int, lens: Array) -> Array:
    """Block ids in too narrow an integer: here two bits."""
    return table % 4


def last_partial_block_dropped(inputs: Inputs) -> Outputs:
    block = inputs.case.sizes["block"]

    def change(one: Sequence) -> Sequence:
        visible, whole = one.visible.copy(), one.k.shape[1] // block * block
        if whole:
            visible[:, whole:] = False
        return replace(one, visible=visible)

    return attended(inputs, attend_whole, change)


def last_page_counts_whole(inputs: Inputs) -> Outputs:
    """A full last page is taken for an empty one: length % block tokens of it count."""
    block = inputs.case.sizes["block"]

    def change(one: Sequence) -> Sequence:
        visible, length = one.visible.copy(), one.k.shape[1]
        if length > block and length % block == 0:
            visible[:, length - block :] = False
        return replace(one, visible=visible)

    return attended(inputs, attend_whole, change)


def stale_slot_read(inputs: Inputs) -> Outputs:
    """Every sequence reads one slot beyond its length; unused slots are zero here, as in a cleared cache."""
    caches = {name: np.nan_to_num(inputs.arrays[name].astype(F32)) for name in ("k_cache", "v_cache")}
    lens, block = inputs.settings["lens"], inputs.case.sizes["block"]
    room = inputs.settings["table"].shape[1] * block if len(lens) else 0
    longer = np.where(lens > 0, np.minimum(lens + 1, room), 0)
    return HONEST(with_arrays(with_settings(inputs, lens=longer), **caches))


def unused_slots_multiplied_by_zero(inputs: Inputs) -> Outputs:
    """Whole blocks are read and masked with probability zero: harmless until an unused slot holds NaN."""
    (queries, _), params = gathered(inputs), inputs.settings["params"]
    block, caches = inputs.case.sizes["block"], wide(inputs, "k_cache", "v_cache")
    sinks = wide(inputs, "sinks")[0] if "sinks" in inputs.arrays else None
    out = np.zeros(queries.shape, dtype=F32)
    for batch, length in enumerate(inputs.settings["lens"]):
        blocks = inputs.settings["table"][batch, : -(-int(length) // block)]
        k, v = (cache[blocks].reshape(-1, *cache.shape[2:]) for cache in caches)
        used = sequence_of(queries[batch], k[: int(length)], v[: int(length)], params, sinks).visible
        whole = sequence_of(queries[batch], k, v, params, sinks)
        visible = np.zeros((queries.shape[1], k.shape[0]), dtype=bool)
        visible[:, : int(length)] = used
        out[batch] = attend_whole(replace(whole, visible=visible)).swapaxes(0, 1)
    return stored(inputs, out.reshape(inputs.arrays["q"].shape))


def length_of_previous_step(inputs: Inputs) -> Outputs:
    """The new tokens are not counted yet: the newest key is missing."""
    lens = inputs.settings["lens"]
    return HONEST(with_settings(inputs, lens=np.where(lens > 1, lens - 1, lens)))


def lengths_shifted_by_one_sequence(inputs: Inputs) -> Outputs:
    lens = inputs.settings["lens"]
    return HONEST(with_settings(inputs, lens=np.minimum(lens, np.roll(lens, 1))))


def values_from_key_cache(inputs: Inputs) -> Outputs:
    return HONEST(with_arrays(inputs, v_cache=inputs.arrays["k_cache"]))


def every_split_but_the_last(inputs: Inputs) -> Outputs:
    """Of the splits of 32 keys the last is launched but never combined."""

    def change(one: Sequence) -> Sequence:
        visible, length = one.visible.copy(), one.k.shape[1]
        if length > 32:
            visible[:, (length - 1) // 32 * 32 :] = False
        return replace(one, visible=visible)

    return attended(inputs, attend_whole, change)


def needle_page_skipped(place: int, page: int) -> Kernel:
    """A kernel that leaves out the keys [place, place + page) of every long sequence."""

    def run(inputs: Inputs) -> Outputs:
        def change(one: Sequence) -> Sequence:
            visible = one.visible.copy()
            visible[:, place : place + page] = False
            return replace(one, visible=visible)

        return attended(inputs, attend_whole, change)

    return run


def _written(inputs: Inputs, slots: Array, rows: Array) -> Outputs:
    cache = inputs.arrays["cache"].copy()
    cache.reshape(-1, *cache.shape[2:])[slots] = rows
    return (cache,)


def negative_slot_wraps(inputs: Inputs) -> Outputs:
    return _written(inputs, inputs.settings["slots"], inputs.arrays["rows"])


def skipped_rows_to_slot_zero(inputs: Inputs) -> Outputs:
    return _written(inputs, np.maximum(inputs.settings["slots"], 0), inputs.arrays["rows"])


def slots_of_block_sixteen(inputs: Inputs) -> Outputs:
    """Slots are split into block and offset as if a block had 16 tokens."""
    slots, block = inputs.settings["slots"], inputs.case.sizes["block"]
    kept = slots >= 0
    wrong = (slots // 16 * block + slots % 16) % (inputs.case.sizes["blocks"] * block)
    return _written(inputs, wrong[kept], inputs.arrays["rows"][kept])


def last_row_not_written(inputs: Inputs) -> Outputs:
    slots = inputs.settings["slots"][:-1]
    kept = slots >= 0
    return _written(inputs, slots[kept], inputs.arrays["rows"][:-1][kept])


def heads_written_transposed(inputs: Inputs) -> Outputs:
    slots, rows = inputs.settings["slots"], inputs.arrays["rows"]
    kept = slots >= 0
    wrong = np.ascontiguousarray(np.swapaxes(rows, 1, 2)).reshape(rows.shape)
    return _written(inputs, slots[kept], wrong[kept])


def scale_hard_coded(inputs: Inputs) -> Outputs:
    params = inputs.settings["params"]
    return HONEST(with_settings(inputs, params=replace(params, softmax_scale=params.head_dim**-0.5)))


def only_8_sequences(inputs: Inputs) -> Outputs:
    (o,) = HONEST(inputs)
    o[8:] = 0
    return (o,)


def first_256_of_a_row(inputs: Inputs) -> Outputs:
    """One block of 256 threads writes a row of G D elements."""
    slots, rows = inputs.settings["slots"], inputs.arrays["rows"].copy()
    kept = slots >= 0
    old = inputs.arrays["cache"].reshape(-1, *rows.shape[1:])[slots[kept]]
    size = rows.shape[1] * rows.shape[2]
    written = rows[kept]
    written.reshape(len(written), size)[:, 256:] = old.reshape(len(old), size)[:, 256:]
    return _written(inputs, slots[kept], written)


def _paged(name: str, run: Kernel) -> Mutant:
    return Mutant(GROUP, "paged_attention", name, run)


PAGED: tuple[Mutant, ...] = (
    _paged("last partial block dropped", last_partial_block_dropped),
    _paged("full last page taken for empty", last_page_counts_whole),
    _paged("wrong page at one block", other_table(wrong_page_at_one_block)),
    _paged("last two pages swapped", other_table(last_two_pages_swapped)),
    _paged("table of the first sequence for all", other_table(table_of_first_sequence)),
    _paged("block number overflows", other_table(page_number_wraps)),
    _paged("stale slot read", stale_slot_read),
    _paged("unused slots multiplied by zero", unused_slots_multiplied_by_zero),
    _paged("newest token not counted", length_of_previous_step),
    _paged("length of the previous sequence", lengths_shifted_by_one_sequence),
    _paged("values from the key cache", values_from_key_cache),
    _paged("last split not combined", every_split_but_the_last),
    _paged("causal mask top-left", mask_top_left),
    _paged("kv head h % G", heads_interleaved),
    _paged("scale from the padded head size", lambda one: attended(one, attend_whole, scale_of_padded_head)),
    Mutant(GROUP, "write_kv", "negative slot wraps round", negative_slot_wraps),
    Mutant(GROUP, "write_kv", "skipped rows go to slot 0", skipped_rows_to_slot_zero),
    Mutant(GROUP, "write_kv", "block size taken for 16", slots_of_block_sixteen),
    Mutant(GROUP, "write_kv", "last row not written", last_row_not_written),
    Mutant(GROUP, "write_kv", "heads and elements transposed", heads_written_transposed),
    _paged("running maximum starts at zero", lambda one: attended(one, maximum_from_zero)),
    _paged("-10,000 for a masked score", lambda one: attended(one, finite_mask)),
    _paged("scale hard-coded", scale_hard_coded),
    _paged("only 8 sequences", only_8_sequences),
    Mutant(GROUP, "write_kv", "only 256 elements of a row", first_256_of_a_row),
)  # fmt: skip
