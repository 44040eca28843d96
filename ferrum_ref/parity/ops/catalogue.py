"""All operations under judgement, in the order of the table.  Clauses: PA-CASE-1, PA-SCHEME-1."""

from __future__ import annotations

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.parity.ops.activation import Gelu, GeluTanh, Silu, SiluMul, TensorGelu
from ferrum_ref.parity.ops.attention import Attention
from ferrum_ref.parity.ops.batch import BatchMatMul, MatMulAsync, SoftmaxAsync
from ferrum_ref.parity.ops.cast import Cast
from ferrum_ref.parity.ops.choice import ArgMax, Embedding
from ferrum_ref.parity.ops.decode import DecodeStep
from ferrum_ref.parity.ops.elementwise import Add, Div, Mul, Relu, Sub
from ferrum_ref.parity.ops.linear import Linear, MatMul
from ferrum_ref.parity.ops.norm import LayerNorm, RmsNorm, RmsNormResidual, TensorRmsNorm
from ferrum_ref.parity.ops.operation import Operation
from ferrum_ref.parity.ops.packed import PACKED
from ferrum_ref.parity.ops.paged import PagedAttention, WriteKv
from ferrum_ref.parity.ops.position import RotaryEmbedding
from ferrum_ref.parity.ops.quantized import QuantizedLinearQ4, QuantizedLinearQ8
from ferrum_ref.parity.ops.sampling import SampleToken
from ferrum_ref.parity.ops.shaping import Concat, PadBatch, Permute, Split, Stack, Transpose, Unstack
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
    QuantizedLinearQ4(),
    QuantizedLinearQ8(),
    Softmax(),
    Embedding(),
    ArgMax(),
    SampleToken(),
    MatMul(),
    Add(),
    Sub(),
    Mul(),
    Div(),
    Relu(),
    Silu(),
    TensorGelu(),
    GeluTanh(),
    TensorRmsNorm(),
    LayerNorm(),
    Cast(),
    Concat(),
    Split(),
    Transpose(),
    Permute(),
    BatchMatMul(),
    Stack(),
    Unstack(),
    PadBatch(),
    MatMulAsync(),
    SoftmaxAsync(),
    DecodeStep(),
)
"""The contract's methods, `quantized_linear` in upstream's two schemes."""

EVERY: tuple[Operation, ...] = (*OPERATIONS, *PACKED)
"""With this project's further schemes of `quantized_linear`, which a backend may or may not list."""


def operation_named(name: str) -> Operation:
    """The operation called `name`. Raises InvalidParameterError for an unknown name."""
    for operation in EVERY:
        if operation.name == name:
            return operation
    known = ", ".join(operation.name for operation in EVERY)
    raise InvalidParameterError(f"parity: operation {name!r} is unknown; expected one of {known}")
