"""Rotary position embedding, half-split pairing; its tables are inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.rope import rope_error
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import DRAWN, IID, Case, Expected, Inputs, Operation, bounded, case, models_of
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

THETA = 10000.0


class RotaryEmbedding(Operation):
    """x (B, T, H, D), tables (P, D/2). Tables are stored in x's type, or in float32 where the case says so."""

    name = "rotary_embedding"
    cases = (
        case(IID, B=1, T=5, H=2, D=64, P=32),
        case("scattered positions", B=2, T=7, H=3, D=80, P=64),
        case("one position", B=1, T=1, H=1, D=2, P=4),
        case(IID, B=1, T=3, H=1, D=96, P=16),
        case(IID, B=1, T=3, H=3, D=120, P=16),
        case(IID, B=2, T=2, H=4, D=128, P=16),
        case(IID, B=1, T=2, H=2, D=192, P=16),
        case(IID, B=1, T=2, H=1, D=256, P=16),
        case("scattered positions", B=1, T=9, H=2, D=64, P=64, tables="fp32"),
        case("last positions", B=1, T=4, H=1, D=16, P=131072, small=False),
        case("repeated position", B=2, T=3, H=2, D=16, P=8),
        case("strided", B=1, T=4, H=2, D=64, P=16),
        case("packed", B=1, T=4, H=3, D=64, P=16),
        case(IID, B=1, T=0, H=2, D=64, P=16),
        case(IID, B=2, T=37, H=9, D=64, P=64, small=False),
        case("large positions", B=1, T=5, H=2, D=64, P=4096),
        case(DRAWN, number=1),
        case(DRAWN, number=2),
        case(IID, B=1, T=33, H=20, D=64, P=40),
    )

    def draw_sizes(self, rng: np.random.Generator) -> Mapping[str, Any]:
        num_tokens = draws.size(rng, 20)
        return {
            "B": draws.size(rng, 3),
            "T": num_tokens,
            "H": draws.size(rng, 9),
            "D": 2 * draws.size(rng, 64),
            "P": num_tokens + draws.size(rng, 50),
        }

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        num_tokens, num_positions, width = sizes["T"], sizes["P"], sizes["D"] // 2
        shape = (sizes["B"], num_tokens, sizes["H"], sizes["D"])
        angles = np.arange(num_positions)[:, None] * THETA ** (-np.arange(width) / width)
        round_table = np.float32 if "tables" in sizes else storage.numpy_dtype
        arrays = {
            "x": _layout(case.probe, draws.normal(rng, shape, storage)),
            "cos": np.cos(angles).astype(round_table),
            "sin": np.sin(angles).astype(round_table),
        }
        return Inputs(case, storage, arrays, {"positions": _positions(case.probe, num_tokens, num_positions, rng)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        x, cos, sin = (bridge.tensor(backend, inputs, name) for name in ("x", "cos", "sin"))
        part = bridge.position_ops(backend)
        return bridge.host(part.rotary_embedding(x, cos, sin, inputs.settings["positions"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        x, cos, sin = inputs.exact("x"), inputs.exact("cos"), inputs.exact("sin")
        positions = inputs.settings["positions"]
        value = oracle.rotary_embedding(x, cos, sin, positions)
        models = models_of(inputs, algorithm, value.size)
        width = x.shape[-1] // 2
        rows = (cos[positions][:, None, :], sin[positions][:, None, :])
        errors = [rope_error(model, x[..., :width], x[..., width:], *rows) for model in models]
        return [bounded("y", value, ("batch", "token", "head", "element"), models, errors)]


def _positions(probe: str, num_tokens: int, num_positions: int, rng: np.random.Generator) -> Array:
    if probe == "scattered positions":
        return rng.permutation(num_positions)[:num_tokens]
    if probe == "large positions":
        return num_positions - 1 - 7 * np.arange(num_tokens)
    if probe == "last positions":
        return np.arange(num_positions - num_tokens, num_positions)
    if probe == "repeated position":
        return np.full(num_tokens, num_positions - 1)
    start = int(rng.integers(1, num_positions - num_tokens + 1)) if num_positions > num_tokens else 0
    return np.arange(start, start + num_tokens)


def _layout(probe: str, x: Array) -> Array:
    """Some cases see x as a strided view, or as the query part of a packed projection."""
    if probe == "strided":
        return draws.strided(x)
    if probe == "packed":
        packed = np.full((*x.shape[:2], 3 * x.shape[2], x.shape[3]), np.nan).astype(x.dtype)
        packed[:, :, : x.shape[2]] = x
        return packed[:, :, : x.shape[2]]
    return x
