"""Values for parameters that no file stores.  Clauses: MB-INIT-1..4 (specs/model_builder.md).

A parameter's numbers depend on the builder's seed and on its own name, never on the order or the company it is made in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ConfigError, NotFoundError, SerializationError
from ferrum_ref.interfaces.model_builder import InitializationStrategy
from ferrum_ref.interfaces.model_builder_ir import (
    CustomInitialization,
    KaimingInitialization,
    NormalInitialization,
    OnesInitialization,
    UniformInitialization,
    XavierInitialization,
    ZerosInitialization,
)
from ferrum_ref.serialization import from_jsonable, to_jsonable

Array = npt.NDArray[np.float32]
Initializer = Callable[[tuple[int, ...], np.random.Generator], Array]


def initial_values(
    strategy: InitializationStrategy,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    initializers: Mapping[str, Initializer],
) -> Array:
    """float32 values of a parameter.  Pure.  [MB-INIT-1..4]

    Raises ConfigError (impossible limits, a fan without a matrix, a rule that gives another shape), NotFoundError (a
    custom rule that is not among `initializers`).
    """
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    match strategy:
        case ZerosInitialization():
            return np.zeros(shape, np.float32)
        case OnesInitialization():
            return np.ones(shape, np.float32)
        case UniformInitialization(low, high):
            return _uniform(rng, name, low, high, shape)
        case NormalInitialization(mean, std):
            mean, std = _single(mean), _single(std)
            if not (math.isfinite(mean) and 0 <= std < math.inf):
                raise ConfigError(f"initialise {name!r:.80}: Normal({mean}, {std}), expected finite and std >= 0")
            return rng.normal(mean, std, shape).astype(np.float32)
        case XavierInitialization():
            fan_in, fan_out = _fans(name, shape)
            limit = math.sqrt(6.0 / (fan_in + fan_out))
            return _uniform(rng, name, -limit, limit, shape)
        case KaimingInitialization():
            limit = math.sqrt(6.0 / _fans(name, shape)[0])
            return _uniform(rng, name, -limit, limit, shape)
        case CustomInitialization(rule):
            return _custom(initializers, rule, name, shape, rng)
        case _:
            raise ConfigError(f"initialise {name!r:.80}: got {strategy!r:.80}, expected an InitializationStrategy")


def encode_strategy(strategy: InitializationStrategy) -> Any:
    """The strategy as JSON. Pure."""
    return to_jsonable(strategy, InitializationStrategy)


def decode_strategy(value: Any) -> InitializationStrategy:
    """The inverse of `encode_strategy`. Pure.  Raises ConfigError."""
    try:
        return from_jsonable(InitializationStrategy, value)
    except SerializationError as error:
        raise ConfigError(f"initialization: {error.message}") from None


def _single(value: float) -> float:
    """A float32 field's number: what is left of it after JSON."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _uniform(rng: np.random.Generator, name: str, low: float, high: float, shape: tuple[int, ...]) -> Array:
    low, high = _single(low), _single(high)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ConfigError(f"initialise {name!r:.80}: Uniform({low}, {high}), expected finite limits, min <= max")
    values = rng.uniform(low, high, shape).astype(np.float32)
    below = np.nextafter(np.float32(high), np.float32(-np.inf))
    return np.minimum(values, below) if low < high else values  # rounding to float32 may reach the open end


def _fans(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan in, fan out) of an [out, in, ...] weight."""
    if len(shape) < 2 or 0 in shape:
        raise ConfigError(f"initialise {name!r:.80}: shape {shape} has no fan; expected a matrix [out, in]")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _custom(
    initializers: Mapping[str, Initializer], rule: str, name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> Array:
    if rule not in initializers:
        raise NotFoundError(f"initialise {name!r:.80}: rule {rule!r:.80} is not known; give it to the builder")
    values = np.asarray(initializers[rule](shape, rng), dtype=np.float32)
    if values.shape != shape:
        raise ConfigError(f"initialise {name!r:.80}: rule {rule!r} gave shape {values.shape}, expected {shape}")
    return values
