"""Copies from global into shared memory that go on beside other work (cp.async), sixteen bytes each.

A lane that has awaited its groups sees its own copies, and after `syncwarp` those of its warp. Under the simulator a
copy is done at once.   Clauses: BK-NCUDA-43 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ferrum_numba.gpu.wide import I32, VECTOR_BYTES, Typed, address_of, global_address, simulated_by, types

SHARED = 3  # an address space
NOTHING = ir.FunctionType(ir.VoidType(), [])


def _copy_vector(target: Any, place: int, source: Any, index: int) -> None:
    count = VECTOR_BYTES // target.dtype.itemsize
    target.store_pack(place, source.pack(index, count, VECTOR_BYTES), VECTOR_BYTES)


@simulated_by(_copy_vector)
def copy_vector(typing_context: Any, target: Any, place: Any, source: Any, index: Any) -> Typed:
    """copy_vector(target, place, source, index): start copying 16 bytes of `source` into shared memory."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, at, origin, index = arguments
        generic = address_of(context, builder, signature.args[0], to, at)
        shared = builder.addrspacecast(generic, generic.type.pointee.as_pointer(SHARED))
        read = global_address(context, builder, signature.args[2], origin, index, I32)
        kind = ir.FunctionType(ir.VoidType(), [I32, read.type])
        copied = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;"
        builder.asm(kind, copied, "r,l,~{memory}", [builder.ptrtoint(shared, I32), read], True)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), codegen


def _nothing() -> None:
    """The copies are done."""


@simulated_by(_nothing)
def end_group(typing_context: Any) -> Typed:
    """end_group(): the copies started since the last call are a group, possibly of none."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.asm(NOTHING, "cp.async.commit_group;", "~{memory}", [], True)
        return context.get_dummy_value()

    return types.void(), codegen


@simulated_by(_nothing)
def await_all_but_one(typing_context: Any) -> Typed:
    """await_all_but_one(): wait for this thread's groups, except the newest."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.asm(NOTHING, "cp.async.wait_group 1;", "~{memory}", [], True)
        return context.get_dummy_value()

    return types.void(), codegen
