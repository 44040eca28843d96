"""Attention over keys and values that lie in blocks, and the writing of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.attention import AXES, heads_errors, params_of, visible_keys
from ferrum_ref.parity.ops.attention_draws import probed
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, Expected, Inputs, Operation, bounded, case, models_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

NUM_SPARE_BLOCKS = 2  # belong to nobody and hold NaN, as does every slot that no token has


class PagedAttention(Operation):
    """q (B, T, H, D) or, for T = 1, (B, H, D); lens: the valid positions of each sequence, its T new ones included."""

    name = "paged_attention"
    cases = (
        case(IID, lens=(37, 5, 16), T=1, H=4, G=2, D=64, block=16),
        case(IID, lens=(20, 9), T=4, H=9, G=3, D=64, block=8),
        case("needle at a page edge", lens=(48, 33), T=1, H=6, G=2, D=64, block=16, place=16),
        case("needle at a page end", lens=(47, 20), T=1, H=4, G=1, D=64, block=16, place=15),
        case("needle at the end", lens=(45, 17, 33), T=1, H=4, G=1, D=64, block=16),
        case("one-hot V", lens=(35, 50), T=2, H=4, G=2, D=64, block=16),
        case("rising scores", lens=(70,), T=1, H=2, G=2, D=64, block=16),
        case("large scores", lens=(30, 7), T=1, H=3, G=1, D=64, block=4),
        case("flat table", lens=(48,), T=1, H=4, G=2, D=64, block=16),
        case(IID, lens=(5, 1), T=1, H=1, G=1, D=64, block=1),
        case(IID, lens=(23,), T=1, H=7, G=1, D=80, block=7),
        case(IID, lens=(18, 40), T=3, H=8, G=1, D=128, block=32),
        case(IID, lens=(18,), T=18, H=4, G=4, D=96, block=16),
        case(IID, lens=(19, 0, 4), T=1, H=2, G=1, D=64, block=8),
        case(IID, lens=(9, 30), T=2, H=2, G=1, D=256, block=16, causal=False),
        case("shared prefix", lens=(37, 41), T=1, H=4, G=2, D=64, block=16),
        case(IID, lens=(40, 9), T=2, H=4, G=2, D=64, block=16, window=16),
        case(IID, lens=(), T=1, H=2, G=1, D=64, block=16),
        case(IID, small=False, lens=(300, 129, 16, 511), T=1, H=9, G=3, D=64, block=16),
        case("needle", small=False, lens=(4096,), T=1, H=8, G=1, D=64, block=16, place=2049),
        case("needle", small=False, lens=(16384,), T=1, H=2, G=1, D=64, block=16, place=16368),
        case("soft cap", lens=(40, 9), T=2, H=4, G=2, D=64, block=16, softcap=5.0),
        case("sinks", lens=(33, 7), T=1, H=8, G=2, D=64, block=16, sinks=True),
        case("sinks", lens=(20, 3), T=3, H=4, G=1, D=64, block=8, sinks=True, window=6),
        case("needle at the window edge", lens=(60,), T=1, H=4, G=1, D=64, block=16, window=17, place=43),
        case("needle behind the window", lens=(60,), T=1, H=4, G=1, D=64, block=16, window=17, place=42),
        case(IID, lens=(16, 32, 48), T=1, H=8, G=8, D=64, block=16),
        case("ragged", lens=(1, 63, 17, 0, 16), T=1, H=7, G=1, D=64, block=16),
        case("needle", lens=(33,), T=2, H=4, G=2, D=120, block=16, place=15),
        case("later blocks first", lens=(50, 50), T=1, H=4, G=2, D=64, block=16),
        case(IID, lens=(30,), T=2, H=2, G=1, D=192, block=16),
        case("huge scores", lens=(30, 21), T=1, H=3, G=1, D=64, block=8),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(DRAWN, number=3),
        case("needle page", small=False, lens=(131072,), T=1, H=1, G=1, D=64, block=16, place=70016, page=16),
        case("needle", small=False, lens=(16384,), T=1, H=1, G=1, D=64, block=16, place=5003),
        case(IID, lens=(40, 9), T=2, H=4, G=2, D=64, block=16, scale=0.3),
        case(IID, lens=(21,), T=1, H=2, G=1, D=64, block=8, scale=-0.05),
        case("low scores", lens=(20, 37), T=3, H=4, G=2, D=64, block=16),
        case(IID, lens=(2, 40), T=5, H=2, G=1, D=64, block=16),
        case("unused entries -1", lens=(40, 3, 17), T=1, H=4, G=2, D=64, block=16),
        case(IID, lens=tuple(range(1, 20)), T=1, H=2, G=1, D=32, block=4),
        case(IID, lens=(70,), T=66, H=1, G=1, D=32, block=16),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        num_tokens, num_kv_heads = draws.size(rng, 5), draws.size(rng, 3)
        lens = tuple(num_tokens + int(rng.integers(0, 70)) for _ in range(draws.size(rng, 4)))
        sizes: dict[str, Any] = {
            "lens": lens,
            "T": num_tokens,
            "H": num_kv_heads * int(rng.choice([1, 2, 3, 4, 7])),
            "G": num_kv_heads,
            "D": int(rng.choice([32, 64, 80, 128])),
            "block": int(rng.choice([1, 4, 7, 8, 16, 32])),
        }
        if rng.random() < 0.3:
            sizes["window"] = draws.size(rng, 40)
        if rng.random() < 0.25:
            sizes["softcap"] = float(rng.uniform(2.0, 40.0))
        if rng.random() < 0.25:
            sizes["sinks"] = True
        return sizes

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        lens, block, size = sizes["lens"], sizes["block"], sizes["D"]
        scale = sizes.get("scale", size**-0.5)
        table, num_blocks = block_table(lens, block, rng, shared=1 if case.probe == "shared prefix" else 0)
        if case.probe == "later blocks first":  # ids fall along the sequence
            table = -np.sort(-table, axis=1)
        if case.probe == "unused entries -1":
            table[np.arange(table.shape[1]) >= -(-np.array(lens)[:, None] // block)] = -1
        caches = [draws.filled((num_blocks, block, sizes["G"], size), np.nan, storage) for _ in range(2)]
        queries = np.zeros((len(lens), sizes["T"], sizes["H"], size))
        for batch, length in enumerate(lens):
            shapes = [queries.shape[1:], (length, sizes["G"], size), (length, sizes["G"], size)]
            queries[batch], *rows = probed(case.probe, rng, shapes, scale, sizes.get("place"), sizes.get("page", 1))
            for cache, row in zip(caches, rows, strict=True):
                cache.reshape(-1, sizes["G"], size)[slots_of(table[batch], length, block)] = storage.round(row)
        q = storage.round(queries)
        arrays = {"q": q[:, 0] if sizes["T"] == 1 else q, "k_cache": caches[0], "v_cache": caches[1]}
        if sizes.get("sinks"):
            arrays["sinks"] = draws.normal(rng, (sizes["H"],), storage)
        params = params_of(sizes, scale, sizes.get("causal", True))
        return Inputs(case, storage, arrays, {"params": params, "table": table, "lens": np.array(lens, dtype=np.int64)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        q, k_cache, v_cache = (bridge.tensor(backend, inputs, name) for name in ("q", "k_cache", "v_cache"))
        attention, settings = bridge.attention_ops(backend), inputs.settings
        if inputs.case.probe == "flat table":
            flat = [int(block) for block in settings["table"][0]]
            return bridge.host(attention.paged_attention(q, k_cache, v_cache, flat, settings["params"]))
        more = {"sinks": bridge.tensor(backend, inputs, "sinks")} if "sinks" in inputs.arrays else {}
        result = attention.paged_attention(
            q, k_cache, v_cache, settings["table"], settings["params"], context_lens=settings["lens"], **more
        )
        return bridge.host(result)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        q, settings = inputs.exact("q"), inputs.settings
        k_cache, v_cache, params = inputs.exact("k_cache"), inputs.exact("v_cache"), settings["params"]
        sinks = inputs.exact("sinks") if "sinks" in inputs.arrays else None
        value = oracle.paged_attention(q, k_cache, v_cache, settings["table"], params, settings["lens"], sinks)
        models = models_of(inputs, algorithm, value.size)
        queries = q if q.ndim == 4 else q[:, None]
        errors = [np.zeros(queries.shape) for _ in models]
        for batch, length in enumerate(settings["lens"]):
            slots = slots_of(settings["table"][batch], int(length), k_cache.shape[1])
            keys, values = (cache.reshape(-1, *cache.shape[2:])[slots] for cache in (k_cache, v_cache))
            visible = visible_keys(queries.shape[1], int(length), params)
            parts = heads_errors(models, queries[batch], keys, values, params, visible, sinks)
            for error, part in zip(errors, parts, strict=True):
                error[batch] = part
        axes = AXES if q.ndim == 4 else (AXES[0], *AXES[2:])
        return [bounded("o", value, axes, models, [error.reshape(q.shape) for error in errors])]


def block_table(lens: Sequence[int], block: int, rng: np.random.Generator, shared: int = 0) -> tuple[Array, int]:
    """(B, max_blocks) block ids in random order and the number of blocks; unused entries name a block full of NaN."""
    counts = [-(-length // block) for length in lens]
    num_blocks = sum(counts) + NUM_SPARE_BLOCKS
    order = rng.permutation(num_blocks)
    table = np.full((len(lens), max(counts, default=0)), order[-1], dtype=np.int64)
    start = 0
    for batch, count in enumerate(counts):
        table[batch, :count] = order[start : start + count]
        start += count
    table[1:, :shared] = table[:1, :shared]
    return table, num_blocks


def slots_of(blocks: Array, length: int, block: int) -> Array:
    """Flat cache slots of positions 0 .. length - 1. Pure."""
    positions = np.arange(length)
    slots: Array = blocks[positions // block] * block + positions % block
    return slots


class WriteKv(Operation):
    """cache (num_blocks, block, G, D), rows (T, G, D); exact, and no other slot may change."""

    name = "write_kv"
    cases = (
        case(IID, T=5, blocks=3, block=16, G=2, D=64),
        case("skipped rows", T=6, blocks=2, block=8, G=3, D=64),
        case("every slot", T=12, blocks=3, block=4, G=1, D=80),
        case("no rows", T=0, blocks=2, block=4, G=1, D=64),
        case(IID, T=20, blocks=9, block=8, G=1, D=16),
        case(IID, T=7, blocks=4, block=7, G=2, D=33),
        case(IID, T=3, blocks=3, block=4, G=8, D=160),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        cache = draws.normal(rng, (sizes["blocks"], sizes["block"], sizes["G"], sizes["D"]), storage)
        cache[rng.integers(sizes["blocks"])] = np.nan
        num_slots = sizes["blocks"] * sizes["block"]
        slots = rng.permutation(num_slots)[: sizes["T"]]
        if case.probe == "skipped rows":  # first and last slot stay free: a skipped row goes to neither
            slots = 1 + rng.permutation(num_slots - 2)[: sizes["T"]]
            slots[::2] = -1
        rows = draws.normal(rng, (sizes["T"], sizes["G"], sizes["D"]), storage)
        return Inputs(case, storage, {"cache": cache, "rows": rows}, {"slots": slots})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        cache = backend.tensor_factory().from_numpy(inputs.arrays["cache"].copy())
        bridge.attention_ops(backend).write_kv(cache, bridge.tensor(backend, inputs, "rows"), inputs.settings["slots"])
        return bridge.host(cache)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        cache, slots = inputs.arrays["cache"].copy(), inputs.settings["slots"]
        flat = cache.reshape(-1, *cache.shape[2:])
        for row, slot in zip(inputs.arrays["rows"], slots, strict=True):
            if slot >= 0:
                flat[slot] = row
        return [Expected("cache", cache, ("block", "slot", "kv head", "element"), cache.dtype)]
