"""Graph operations of a language model: entries, norms, projections, rotary positions, attention over a cache.

Clause: MB-IR-2 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from ferrum_ref.builder.attributes import Attributes
from ferrum_ref.builder.operators import (
    INTEGERS,
    MAX_CONSTANT_ELEMENTS,
    Operator,
    Runtime,
    Signal,
    agree,
    static_size,
    tensors,
)
from ferrum_ref.builder.operators_tensor import tensor_operators
from ferrum_ref.errors import ConfigError, NotFoundError
from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder_rope import rope_tables

ENTRIES: Final = ("token_ids", "positions", "logit_rows")


def _model_operators() -> list[Operator]:
    return [
        Operator("input", (0, 0), _infer_input, _run_input, is_pure=False, is_view=True),
        Operator("parameter", (1, 1), lambda _, signals: [signals[0]], lambda _run, _, x: [x[0]], is_view=True),
        Operator("embedding", (2, 2), _infer_rows, _run_embedding, integer_operands=(0,)),
        Operator("select_rows", (2, 2), _infer_select, _run_select, integer_operands=(1,)),
        Operator("linear", (2, 3), _infer_linear, _run_linear),
        Operator("rms_norm", (2, 2), _infer_norm, _run_norm),
        Operator("rms_norm_residual", (3, 3), _infer_residual_norm, _run_residual_norm),
        Operator("silu_mul", (2, 2), _infer_gate, _run_gate),
        Operator("rope_tables", (0, 0), _infer_tables, _run_tables),
        Operator("rotary", (4, 4), _infer_rotary, _run_rotary, integer_operands=(3,)),
        Operator("attention", (3, 3), _infer_attention, _run_attention, is_pure=False),
        Operator("custom", (1, 4097), _infer_custom, _run_custom, is_pure=False),
    ]


def _infer_input(attributes: Attributes, _operands: Sequence[Signal]) -> list[Signal]:
    if attributes.text("name") not in ENTRIES:
        raise ConfigError(f"{attributes.operation}: got {attributes.text('name')!r:.80}, expected one of {ENTRIES}")
    return [Signal((-1,), INTEGERS)]


def _run_input(runtime: Runtime, attributes: Attributes, _operands: Sequence[Any]) -> list[Any]:
    return [runtime.entries[attributes.text("name")]]


def _matrix(attributes: Attributes, name: str, signal: Signal) -> tuple[int, int]:
    if len(signal.shape) != 2:
        raise ConfigError(f"{attributes.operation}: {name}: got shape {signal.shape}, expected a matrix")
    return signal.shape[0], signal.shape[1]


def _infer_rows(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    _, width = _matrix(attributes, "table", operands[1])
    return [Signal((-1, width), operands[1].dtype)]


def _run_embedding(runtime: Runtime, _attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    linear = runtime.kernels().linear_ops()
    if linear is None:
        raise runtime.missing("linear")
    return [linear.embedding(operands[1], operands[0])]


def _infer_select(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    return [Signal((-1, _matrix(attributes, "input", operands[0])[1]), operands[0].dtype)]


def _run_select(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    """Rows in the wanted order; the tensor itself where that is all of them."""
    x, rows = operands
    if len(rows) == x.shape()[0] and np.array_equal(rows, np.arange(len(rows))):
        return [x]
    return _run_embedding(runtime, attributes, (rows, x))


def _infer_linear(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    x, weight = operands[:2]
    rows, columns = _matrix(attributes, "weight", weight)
    if not x.shape or not agree(x.shape[-1], columns):
        raise ConfigError(f"{attributes.operation}: input {x.shape} and weight {weight.shape} differ in the inner size")
    if len(operands) == 3 and operands[2].shape != (rows,):
        raise ConfigError(f"{attributes.operation}: bias: got {operands[2].shape}, expected ({rows},)")
    return [Signal((*x.shape[:-1], rows), x.dtype)]


def _run_linear(runtime: Runtime, _attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    linear = runtime.kernels().linear_ops()
    if linear is None:
        raise runtime.missing("linear")
    y = linear.linear(operands[0], operands[1])
    return [y if len(operands) == 2 else runtime.backend.tensor_ops().add(y, operands[2])]


def _infer_norm(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    x, weight = operands
    attributes.number("eps")
    if not x.shape or len(weight.shape) != 1 or not agree(x.shape[-1], weight.shape[0]):
        raise ConfigError(f"{attributes.operation}: weight: got {weight.shape}, expected ({x.shape[-1:]},)")
    return [x]


def _run_norm(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    norm = runtime.kernels().norm_ops()
    if norm is None:
        raise runtime.missing("norm")
    return [norm.rms_norm(operands[0], operands[1], attributes.number("eps"))]


def _infer_residual_norm(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    update, residual, weight = operands
    if len(update.shape) != len(residual.shape) or not all(map(agree, update.shape, residual.shape)):
        raise ConfigError(f"{attributes.operation}: got {update.shape} and {residual.shape}, expected equal shapes")
    return [*_infer_norm(attributes, (residual, weight)), residual]


def _run_residual_norm(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    norm = runtime.kernels().norm_ops()
    if norm is None:
        raise runtime.missing("norm")
    update, residual, weight = tensors(operands)
    return list(norm.rms_norm_residual(update, residual, weight, attributes.number("eps")))


def _infer_gate(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    gate, up = operands
    if len(gate.shape) != len(up.shape) or not all(map(agree, gate.shape, up.shape)):
        raise ConfigError(f"{attributes.operation}: got {gate.shape} and {up.shape}, expected equal shapes")
    return [gate]


def _run_gate(runtime: Runtime, _attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    activation = runtime.kernels().activation_ops()
    if activation is None:
        raise runtime.missing("activation")
    return [activation.silu_mul(operands[0], operands[1])]


def _infer_tables(attributes: Attributes, _operands: Sequence[Signal]) -> list[Signal]:
    head_dim, num_positions = attributes.whole("head_dim", 2, 2**16), attributes.whole("num_positions", 1, 2**24 + 1)
    if head_dim % 2 or not attributes.number("theta") > 0:
        raise ConfigError(f"{attributes.operation}: expected an even head_dim and theta > 0")
    table = Signal((num_positions, head_dim // 2), attributes.data_type("dtype"))
    if static_size(table.shape) > MAX_CONSTANT_ELEMENTS:
        raise ConfigError(f"{attributes.operation}: tables {table.shape} have too many elements")
    return [table, table]


def _run_tables(runtime: Runtime, attributes: Attributes, _operands: Sequence[Any]) -> list[TensorRef]:
    tables = rope_tables(
        attributes.whole("head_dim", 2), attributes.whole("num_positions", 1), attributes.number("theta")
    )
    factory, dtype = runtime.backend.tensor_factory(), attributes.data_type("dtype")
    return [factory.from_numpy(table).to_dtype(dtype) for table in tables]


def _infer_rotary(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    x, cos, sin, _positions = operands
    if len(x.shape) != 3 or len(cos.shape) != 2 or cos.shape != sin.shape or x.shape[2] != 2 * cos.shape[1]:
        raise ConfigError(
            f"{attributes.operation}: got x {x.shape}, tables {cos.shape} and {sin.shape}; expected [N, heads, D] and"
            " [positions, D/2]"
        )
    return [x]


def _run_rotary(runtime: Runtime, _attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    position = runtime.kernels().position_ops()
    if position is None:
        raise runtime.missing("rotary")
    x, cos, sin, positions = operands
    turned = position.rotary_embedding(x.reshape((1, *x.shape())), cos, sin, positions)
    return [turned.reshape(x.shape())]


def _infer_attention(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    params = attention_params(attributes)
    q, k, v = (operand.shape for operand in operands)
    key = (params.num_kv_heads, params.head_dim)
    if len(q) != 3 or q[1:] != (params.num_heads, params.head_dim) or k[1:] != key or v[1:] != key:
        raise ConfigError(
            f"{attributes.operation}: got q {q}, k {k}, v {v}; expected [N, {params.num_heads}, {params.head_dim}] and"
            f" twice [N, {params.num_kv_heads}, {params.head_dim}]"
        )
    return [operands[0]]


def _run_attention(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    """Appends k and v to the layer's cache, then attends over it."""
    q, k, v = tensors(operands)
    if runtime.kv is None:
        raise ConfigError(f"{attributes.operation}: attention needs a cache; it is no constant")
    layer = attributes.whole("layer", 0)
    runtime.kv.append(layer, k, v)
    return [runtime.kv.attend(layer, q, attention_params(attributes))]


def attention_params(attributes: Attributes) -> AttentionParams:
    """The parameters of an attention operation. Pure.  Raises ConfigError."""
    attributes.whole("layer", 0, 2**16)
    num_heads, num_kv_heads = attributes.whole("num_heads", 1, 2**16), attributes.whole("num_kv_heads", 1, 2**16)
    if num_heads % num_kv_heads:
        raise ConfigError(f"{attributes.operation}: {num_kv_heads} kv heads do not divide {num_heads} heads")
    return AttentionParams(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=attributes.whole("head_dim", 1, 2**16),
        softmax_scale=attributes.number("softmax_scale"),
        causal=True,
    )


def _infer_custom(attributes: Attributes, operands: Sequence[Signal]) -> list[Signal]:
    shape, names = attributes.dims("output_shape"), attributes.values.get("parameter_names")
    attributes.text("layer")
    if not isinstance(names, list) or len(names) != len(operands) - 1 or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{attributes.operation}: parameter_names: expected one name for each parameter")
    return [Signal(tuple(shape), operands[0].dtype)]


def _run_custom(runtime: Runtime, attributes: Attributes, operands: Sequence[Any]) -> list[TensorRef]:
    """Calls the user's layer with its parameters by name, and holds it to the shape it promised."""
    name = attributes.text("layer")
    layer = runtime.custom_layers.get(name)
    if layer is None:
        raise NotFoundError(f"{attributes.operation}: custom layer {name!r:.80} is not known to this builder")
    x, *given = tensors(operands)
    parameters = dict(zip(attributes.values["parameter_names"], given, strict=True))
    y = layer.forward(x, parameters, runtime.backend)
    for expected in (tuple(layer.output_shape(list(x.shape()))), tuple(attributes.dims("output_shape"))):
        if len(y.shape()) != len(expected) or not all(map(agree, expected, y.shape())):
            raise ConfigError(f"custom layer {name!r}: forward gave shape {y.shape()}, expected {expected}")
    return [y]


OPERATORS: Final[Mapping[str, Operator]] = MappingProxyType(
    {operator.name: operator for operator in [*tensor_operators(), *_model_operators()]}
)
