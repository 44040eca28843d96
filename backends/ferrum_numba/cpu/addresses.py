"""Memory by address: arrays over an address, atomic counters, and giving way to another thread.

Kernels take addresses instead of arrays, so that each is compiled once, whatever the element type, the strides and the
writability of the arrays that it is called with. The caller keeps those arrays alive.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
from typing import Any, Final

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from ferrum_numba.cpu.compiled import device

WORD: Final = ir.IntType(64)
intrinsic: Final[Any] = (
    extending.intrinsic
)  # untyped: what it makes is called with fewer arguments than it is written with


def address_of(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    address: int = array.ctypes.data
    return address


def _pointer_maker(element: types.Type) -> Any:
    def pointer(typing_context, address):
        signature = types.CPointer(element)(types.intp)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return intrinsic(pointer)


_float32_pointer = _pointer_maker(types.float32)
_float64_pointer = _pointer_maker(types.float64)
_uint16_pointer = _pointer_maker(types.uint16)
_uint8_pointer = _pointer_maker(types.uint8)
_int8_pointer = _pointer_maker(types.int8)
_int64_pointer = _pointer_maker(types.int64)


@device
def floats_at(address, count):
    return carray(_float32_pointer(address), (count,))


@device
def doubles_at(address, count):
    return carray(_float64_pointer(address), (count,))


@device
def halves_at(address, count):
    """16-bit patterns."""
    return carray(_uint16_pointer(address), (count,))


@device
def bytes_at(address, count):
    return carray(_uint8_pointer(address), (count,))


@device
def small_integers_at(address, count):
    return carray(_int8_pointer(address), (count,))


@device
def integers_at(address, count):
    return carray(_int64_pointer(address), (count,))


@device
def keep(array):
    """Uses the array, so that its memory, known by address, is not given back before."""
    return array.size


@intrinsic
def fetch_and_add(typing_context, address, amount):
    """The int64 at `address`, to which `amount` is added in one indivisible step."""

    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], WORD.as_pointer())
        return builder.atomic_rmw("add", counter, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def fetch(typing_context, address):
    """The int64 at `address`; what its writer wrote before it is visible afterwards."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], WORD.as_pointer()), "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def call(typing_context, address, arguments):
    """Calls the routine at `address` with the numbers of a tuple."""
    parts = [arguments.dtype] * arguments.count if isinstance(arguments, types.UniTuple) else list(arguments)

    def generate(context, builder, signature, values):
        type_ = ir.FunctionType(ir.VoidType(), [context.get_value_type(part) for part in parts])
        function = builder.inttoptr(values[0], type_.as_pointer())
        builder.call(function, cgutils.unpack_tuple(builder, values[1], len(parts)))
        return context.get_dummy_value()

    return types.void(types.intp, arguments), generate


if os.name == "posix":
    _sched_yield: Final = types.ExternalFunction("sched_yield", types.int32())

    @device
    def give_way():
        """Let another thread of this machine run."""
        _sched_yield()

else:

    @device
    def give_way():
        """Nothing: this system offers no such call by a portable name."""
