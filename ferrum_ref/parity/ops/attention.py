"""Attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.attention import attention_errors
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops import bridge
from ferrum_ref.parity.ops.attention_draws import probed, stored
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, bounded, case, models_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

AXES = ("batch", "token", "query head", "element")


def heads_errors(
    models: Sequence[ErrorModel], q: Array, k: Array, v: Array, scale: float, visible: Array
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
        _, parts = attention_errors(models, queries, k[:, kv_head], v[:, kv_head], scale, rows)
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
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        size, scale = sizes["D"], sizes.get("scale", sizes["D"] ** -0.5)
        shapes = [(sizes["T"], sizes["H"], size), (sizes["S"], sizes["G"], size), (sizes["S"], sizes["G"], size)]
        drawn = [probed(case.probe, rng, shapes, scale, sizes.get("place")) for _ in range(sizes["B"])]
        stacked = [
            np.array([sequence[index] for sequence in drawn]).reshape(sizes["B"], *shape)
            for index, shape in enumerate(shapes)
        ]
        arrays = dict(zip("qkv", stored(storage, stacked, case.probe), strict=True))
        params = AttentionParams(sizes["H"], sizes["G"], size, scale, sizes["causal"], sizes.get("window", 0))
        return Inputs(case, storage, arrays, {"params": params})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        q, k, v = (bridge.tensor(backend, inputs, name) for name in "qkv")
        return bridge.host(bridge.attention_ops(backend).attention(q, k, v, inputs.settings["params"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        q, k, v = (inputs.exact(name) for name in "qkv")
        params: AttentionParams = inputs.settings["params"]
        value = oracle.attention(q, k, v, params)
        models = models_of(inputs, algorithm, value.size)
        errors = [np.zeros(value.shape) for _ in models]
        visible = visible_keys(q.shape[1], k.shape[1], params)
        for batch in range(q.shape[0]):
            parts = heads_errors(models, q[batch], k[batch], v[batch], params.softmax_scale, visible)
            for error, part in zip(errors, parts, strict=True):
                error[batch] = part
        return [bounded("o", value, AXES, models, errors)]
