"""All operations under judgement, in the order of the table.  Clause: PA-CASE-1."""

from __future__ import annotations

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.parity.ops.activation import Gelu, GeluTanh, Silu, SiluMul
from ferrum_ref.parity.ops.attention import Attention
from ferrum_ref.parity.ops.choice import ArgMax, Embedding
from ferrum_ref.parity.ops.elementwise import Add, Mul
from ferrum_ref.parity.ops.linear import Linear, MatMul
from ferrum_ref.parity.ops.norm import LayerNorm, RmsNorm, RmsNormResidual
from ferrum_ref.parity.ops.operation import Operation
from ferrum_ref.parity.ops.paged import PagedAttention, WriteKv
from ferrum_ref.parity.ops.position import RotaryEmbedding
from ferrum_ref.parity.ops.softmax import Softmax

OPERATIONS: tuple[Operation, ...] = (
    RmsNorm(),
    RmsNormResidual(),
    RotaryEmbedding(),
    Attention(),
    PagedAttention(),
    WriteKv(),
    SiluMul(),
    Gelu(),
    Linear(),
    Softmax(),
    Embedding(),
    ArgMax(),
    MatMul(),
    Add(),
    Mul(),
    Silu(),
    GeluTanh(),
    LayerNorm(),
)


def operation_named(name: str) -> Operation:
    """The operation called `name`. Raises InvalidParameterError for an unknown name."""
    for operation in OPERATIONS:
        if operation.name == name:
            return operation
    known = ", ".join(operation.name for operation in OPERATIONS)
    raise InvalidParameterError(f"parity: operation {name!r} is unknown; expected one of {known}")
