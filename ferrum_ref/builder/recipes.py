"""Recipes: how a parameter is computed, once, while a model is loaded.  Clause: MB-IR-3 (specs/model_builder.md).

    {"op": "load", "tensor": name, "shape": [...], "initialization": ...}         a stored tensor
    {"op": operation, "config": {...}, "inputs": [recipe, ...], "output": slot}   a graph operation on recipes

A recipe means what the same operations in the graph would have computed, so folding a constant changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.initialization import decode_strategy, encode_strategy
from ferrum_ref.builder.operators import MAX_ELEMENTS, Operator, Runtime, Signal, static_size
from ferrum_ref.builder.operators_model import OPERATORS
from ferrum_ref.errors import ConfigError, ModelError, UnsupportedError
from ferrum_ref.interfaces.model_builder import InitializationStrategy, ParameterSpec
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import DataType

Recipe = Mapping[str, Any]
LoadTensor = Callable[[str, tuple[int, ...], DataType, InitializationStrategy], npt.NDArray[Any]]
_MAX_DEPTH: Final = 32


def recipe_of(spec: ParameterSpec) -> dict[str, Any]:
    """What computes a parameter: its own recipe, or the stored tensor of its name. Pure.  Raises ConfigError."""
    found = spec.metadata.get("recipe")
    if found is None:
        initialization = encode_strategy(spec.initialization)
        return {"op": "load", "tensor": spec.name, "shape": list(spec.shape), "initialization": initialization}
    if not isinstance(found, Mapping):
        raise ConfigError(f"parameter {spec.name!r:.80}: recipe: expected an object")
    return dict(found)


def combine(operation: str, config: Mapping[str, Any], inputs: Sequence[Recipe], output: int = 0) -> dict[str, Any]:
    """The recipe of one operation on recipes. Pure."""
    return {"op": operation, "config": dict(config), "inputs": [dict(each) for each in inputs], "output": output}


def stored_tensors(spec: ParameterSpec) -> list[str]:
    """Names of the stored tensors a parameter is made of, in order. Pure.  Raises ConfigError."""
    return [name for name, _, _ in _leaves(spec.name, recipe_of(spec), 0)]


def evaluate(spec: ParameterSpec, runtime: Runtime, load: LoadTensor) -> TensorRef:
    """The parameter's tensor on the backend.  Errors of `load` pass through.

    Raises ConfigError (a recipe that is none), UnsupportedError (an operation), ModelError (another shape or type).
    """
    tensor = _evaluate(spec, recipe_of(spec), runtime, load, 0)
    if tensor.shape() != tuple(spec.shape) or tensor.dtype() is not spec.dtype:
        raise ModelError(
            f"parameter {spec.name!r:.80}: got {tensor.dtype().name}{list(tensor.shape())},"
            f" expected {spec.dtype.name}{spec.shape}"
        )
    return tensor


def _evaluate(spec: ParameterSpec, recipe: Any, runtime: Runtime, load: LoadTensor, depth: int) -> TensorRef:
    if _operation(spec.name, recipe, depth) == "load":
        values = load(*_leaf(spec.name, recipe)[:2], spec.dtype, _leaf(spec.name, recipe)[2])
        return runtime.backend.tensor_factory().from_numpy(np.ascontiguousarray(values))
    operator = _operator(spec.name, recipe)
    operands = [_evaluate(spec, each, runtime, load, depth + 1) for each in _inputs(spec.name, recipe)]
    attributes = Attributes(f"parameter {spec.name!r:.80} ({operator.name})", recipe.get("config") or {})
    signals = operator.check(attributes, [Signal(tuple(x.shape()), x.dtype()) for x in operands])
    slot = attributes_slot(spec.name, recipe, len(signals))
    return operator.run(runtime, attributes, operands)[slot]  # type: ignore[no-any-return]


def attributes_slot(name: str, recipe: Recipe, num_outputs: int) -> int:
    """Which result of its operation a recipe means. Pure.  Raises ConfigError."""
    return Attributes(f"parameter {name!r:.80}", recipe).optional_whole("output", 0, 0, num_outputs)


def _operation(name: str, recipe: Any, depth: int) -> str:
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("op"), str) or depth > _MAX_DEPTH:
        raise ConfigError(f"parameter {name!r:.80}: recipe: expected objects with an op, at most {_MAX_DEPTH} deep")
    operation: str = recipe["op"]
    return operation


def _operator(name: str, recipe: Recipe) -> Operator:
    operator = OPERATORS.get(recipe["op"])
    if operator is None or not operator.is_pure or operator.integer_operands:
        raise UnsupportedError(f"parameter {name!r:.80}: operation {recipe['op']!r:.80} is not offered in a recipe")
    config = recipe.get("config")
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"parameter {name!r:.80}: recipe: config: expected an object")
    return operator


def _inputs(name: str, recipe: Recipe) -> list[Any]:
    inputs = recipe.get("inputs", [])
    if not isinstance(inputs, list) or len(inputs) > 4096:
        raise ConfigError(f"parameter {name!r:.80}: recipe: inputs: expected a list of recipes")
    return inputs


def _leaf(name: str, recipe: Recipe) -> tuple[str, tuple[int, ...], InitializationStrategy]:
    attributes = Attributes(f"parameter {name!r:.80} (load)", recipe)
    strategy = decode_strategy(recipe.get("initialization", "Zeros"))
    shape = tuple(attributes.dims("shape", 0))
    if static_size(shape) > MAX_ELEMENTS:
        raise ConfigError(f"parameter {name!r:.80}: shape {shape} has too many elements")
    return attributes.text("tensor"), shape, strategy


def _leaves(name: str, recipe: Any, depth: int) -> list[tuple[str, tuple[int, ...], InitializationStrategy]]:
    if _operation(name, recipe, depth) == "load":
        return [_leaf(name, recipe)]
    return [leaf for each in _inputs(name, recipe) for leaf in _leaves(name, each, depth + 1)]
