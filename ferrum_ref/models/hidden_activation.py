"""The activations that Hugging Face configurations name, over a backend's operations.

Clause: FM-ACT-1 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import KernelOpsDispatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.types.devices import DataType

Activation = Callable[[TensorRef], TensorRef]

TANH_GELUS: Final = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
ACTIVATIONS: Final = ("gelu", *TANH_GELUS, "quick_gelu", "relu", "silu", "swish")
_QUICK: Final = 1.702


def hidden_activation(name: str, backend: ComputeBackend, dtype: DataType) -> Activation:
    """The function that `hidden_act` names, for tensors of `dtype`.  [FM-ACT-1; D-81]

    gelu: x Phi(x); the tanh forms: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3))); quick_gelu: x sigmoid(1.702 x).
    Raises UnsupportedError for any other name.
    """
    ops = backend.tensor_ops()
    dispatch = KernelOpsDispatch(backend.kernel_ops(), ops)
    if name == "gelu":
        return dispatch.gelu
    if name in TANH_GELUS:
        return lambda x: ops.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        factory = backend.tensor_factory()
        slope, inverse = (
            factory.from_numpy(np.array([value], dtype=np.float32)).to_dtype(dtype) for value in (_QUICK, 1 / _QUICK)
        )
        return lambda x: ops.mul(ops.silu(ops.mul(x, slope)), inverse)
    if name == "relu":
        return ops.relu
    if name in ("silu", "swish"):
        return ops.silu
    raise UnsupportedError(f"hidden_act: got {name!r:.80}, expected one of {', '.join(ACTIVATIONS)}")
