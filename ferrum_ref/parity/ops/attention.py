"""Attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.attention import attention_errors
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.attention_draws import probed, stored
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, Expected, Inputs, Operation, bounded, case, models_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

AXES = ("batch", "token", "query head", "element")


def heads_errors(
    models: Sequence[ErrorModel],
    q: Array,
    k: Array,
    v: Array,
    params: AttentionParams,
    visible: Array,
    sinks: Array | None = None,
) -> list[Array]:
    """e of one sequence for each of `models`: q (T, H, D), k and v (S, G, D), visible (T, S) -> (T, H, D). Pure."""
    num_tokens, num_heads, size = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    errors = [np.zeros(q.shape) for _ in models]
    rows = np.repeat(visible, group, axis=0)
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        queries = q[:, heads].reshape(num_tokens * group, size)
        beside = None if sinks is None else np.tile(sinks[heads], num_tokens)
        scale, cap = params.softmax_scale, params.logit_softcap
        _, parts = attention_errors(models, queries, k[:, kv_head], v[:, kv_head], scale, rows, cap, beside)
        for error, part in zip(errors, parts, strict=True):
            error[:, heads] = part.reshape(num_tokens, group, size)
    return errors


def visible_keys(num_tokens: int, num_keys: int, params: AttentionParams) -> Array:
    """(T, S) bool: query t sees the keys j <= S - T + t when causal, the last `window` of them if there is a window."""
    if not params.causal:
        return np.ones((num_tokens, num_keys), dtype=bool)
    keys = np.arange(num_keys)[None, :]
    own = num_keys - num_tokens + np.arange(num_tokens)[:, None]
    window = params.sliding_window or num_keys
    visible: Array = (keys <= own) & (keys > own - window)
    return visible


def params_of(sizes: Mapping[str, Any], scale: float, causal: bool) -> AttentionParams:
    """The parameters that a case's sizes name."""
    window, cap = sizes.get("window", 0), sizes.get("softcap", 0.0)
    return AttentionParams(sizes["H"], sizes["G"], sizes["D"], scale, causal, window, cap)


class Attention(Operation):
    """q (B, T, H, D), k and v (B, S, G, D)."""

    name = "attention"
    cases = (
        case(IID, B=1, T=5, S=5, H=4, G=4, D=64, causal=True),
        case(IID, B=2, T=3, S=17, H=8, G=2, D=64, causal=True),
        case(IID, B=1, T=6, S=6, H=9, G=3, D=64, causal=True),
        case("needle", B=1, T=2, S=33, H=7, G=1, D=64, causal=True),
        case("needle", B=1, T=1, S=64, H=6, G=2, D=64, causal=False, place=0),
        case("one-hot V", B=1, T=4, S=40, H=4, G=2, D=64, causal=True),
        case("rising scores", B=1, T=2, S=70, H=2, G=2, D=64, causal=True),
        case("large scores", B=1, T=3, S=20, H=4, G=1, D=64, causal=True),
        case("equal keys", B=1, T=2, S=31, H=3, G=1, D=64, causal=False),
        case(IID, B=1, T=7, S=3, H=2, G=1, D=64, causal=True),
        case(IID, B=1, T=4, S=21, H=4, G=2, D=64, causal=True, window=6),
        case(IID, B=1, T=1, S=1, H=1, G=1, D=64, causal=True),
        case(IID, B=1, T=5, S=9, H=8, G=1, D=80, causal=False),
        case(IID, B=1, T=4, S=9, H=8, G=2, D=96, causal=True),
        case(IID, B=1, T=2, S=33, H=7, G=1, D=128, causal=False),
        case(IID, B=1, T=3, S=30, H=2, G=1, D=120, causal=True),
        case(IID, B=1, T=2, S=20, H=2, G=2, D=192, causal=True),
        case(IID, B=1, T=2, S=20, H=2, G=1, D=256, causal=True),
        case("strided", B=2, T=4, S=11, H=4, G=2, D=64, causal=True),
        case("head-major", B=2, T=4, S=11, H=4, G=2, D=64, causal=True),
        case(IID, B=1, T=3, S=0, H=2, G=1, D=64, causal=False),
        case(IID, B=1, T=0, S=5, H=2, G=1, D=64, causal=True),
        case(IID, B=0, T=2, S=2, H=2, G=1, D=64, causal=True),
        case(IID, B=1, T=3, S=12, H=2, G=1, D=64, causal=True, scale=0.3),
        case(IID, small=False, B=1, T=33, S=129, H=9, G=3, D=64, causal=True),
        case("needle", small=False, B=1, T=1, S=4096, H=8, G=1, D=64, causal=True, place=4079),
        case("needle", small=False, B=1, T=2, S=16384, H=2, G=1, D=64, causal=True, place=8192),
        case(IID, small=False, B=1, T=1, S=16384, H=3, G=1, D=64, causal=True),
        case("needle", small=False, B=1, T=1, S=131072, H=1, G=1, D=16, causal=True, place=131071),
        case("window edge", B=1, T=3, S=40, H=4, G=2, D=64, causal=True, window=1),
        case("needle at the window edge", B=1, T=1, S=50, H=4, G=1, D=64, causal=True, window=16, place=34),
        case("needle behind the window", B=1, T=1, S=50, H=4, G=1, D=64, causal=True, window=16, place=33),
        case("window edge", B=1, T=9, S=9, H=2, G=1, D=64, causal=True, window=9),
        case("soft cap", B=1, T=4, S=30, H=4, G=2, D=64, causal=True, softcap=5.0),
        case("large scores", B=1, T=2, S=24, H=2, G=1, D=64, causal=True, softcap=30.0),
        case("sinks", B=1, T=4, S=30, H=8, G=2, D=64, causal=True, sinks=True),
        case("sinks", B=2, T=3, S=2, H=3, G=1, D=64, causal=True, sinks=True, window=4, softcap=8.0),
        case("heavy sinks", B=1, T=2, S=12, H=4, G=4, D=64, causal=False, sinks=True),
        case("needle", B=1, T=1, S=257, H=7, G=7, D=64, causal=True, place=255),
        case("needle", B=1, T=1, S=129, H=2, G=1, D=80, causal=True, place=127),
        case("needle in one head", B=1, T=2, S=40, H=8, G=8, D=64, causal=True, place=11),
        case(IID, B=3, T=1, S=47, H=6, G=3, D=64, causal=True),
        case("huge scores", B=1, T=3, S=20, H=4, G=1, D=64, causal=True),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(DRAWN, number=3),
        case("needle", small=False, B=1, T=1, S=16384, H=1, G=1, D=64, causal=True, place=5003),
        case("needle page", small=False, B=1, T=1, S=131072, H=1, G=1, D=64, causal=True, place=70016, page=16),
        case("needle", small=False, B=1, T=1, S=1024, H=4, G=1, D=64, causal=True, place=0),
        case("low scores", B=1, T=3, S=20, H=4, G=2, D=64, causal=True),
        case(IID, B=1, T=66, S=66, H=1, G=1, D=32, causal=True),
        case(IID, B=1, T=18, S=60, H=1, G=1, D=32, causal=True, window=30),
        case(IID, B=1, T=2, S=9, H=20, G=4, D=40, causal=True),
        case(IID, small=False, B=1, T=140, S=150, H=2, G=1, D=64, causal=True),
        case(IID, B=1, T=2, S=12, H=2, G=1, D=64, causal=True, scale=-0.05),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        num_kv_heads, group = draws.size(rng, 4), int(rng.choice([1, 2, 3, 4, 7, 8]))
        sizes: dict[str, Any] = {
            "B": draws.size(rng, 3),
            "T": draws.size(rng, 12),
            "S": draws.size(rng, 90),
            "H": num_kv_heads * group,
            "G": num_kv_heads,
            "D": int(rng.choice([32, 64, 80, 96, 120, 128])),
            "causal": bool(rng.random() < 0.8),
        }
        if sizes["causal"] and rng.random() < 0.4:
            sizes["window"] = draws.size(rng, 40)
        if rng.random() < 0.25:
            sizes["softcap"] = float(rng.uniform(2.0, 40.0))
        if rng.random() < 0.25:
            sizes["sinks"] = True
        return sizes

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        size, scale = sizes["D"], sizes.get("scale", sizes["D"] ** -0.5)
        shapes = [(sizes["T"], sizes["H"], size), (sizes["S"], sizes["G"], size), (sizes["S"], sizes["G"], size)]
        drawn = [
            probed(case.probe, rng, shapes, scale, sizes.get("place"), sizes.get("page", 1)) for _ in range(sizes["B"])
        ]
        stacked = [
            np.array([sequence[index] for sequence in drawn]).reshape(sizes["B"], *shape)
            for index, shape in enumerate(shapes)
        ]
        arrays = dict(zip("qkv", stored(storage, stacked, case.probe), strict=True))
        if sizes.get("sinks"):
            arrays["sinks"] = draws.normal(rng, (sizes["H"],), storage, 6.0 if case.probe == "heavy sinks" else 1.0)
        params = params_of(sizes, scale, sizes["causal"])
        return Inputs(case, storage, arrays, {"params": params})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        q, k, v = (bridge.tensor(backend, inputs, name) for name in "qkv")
        ops, params = bridge.attention_ops(backend), inputs.settings["params"]
        if "sinks" in inputs.arrays:
            return bridge.host(ops.attention(q, k, v, params, sinks=bridge.tensor(backend, inputs, "sinks")))
        return bridge.host(ops.attention(q, k, v, params))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        q, k, v = (inputs.exact(name) for name in "qkv")
        params: AttentionParams = inputs.settings["params"]
        sinks = inputs.exact("sinks") if "sinks" in inputs.arrays else None
        value = oracle.attention(q, k, v, params, sinks)
        models = models_of(inputs, algorithm, value.size)
        errors = [np.zeros(value.shape) for _ in models]
        visible = visible_keys(q.shape[1], k.shape[1], params)
        for batch in range(q.shape[0]):
            parts = heads_errors(models, q[batch], k[batch], v[batch], params, visible, sinks)
            for error, part in zip(errors, parts, strict=True):
                error[batch] = part
        return [bounded("o", value, AXES, models, errors)]
