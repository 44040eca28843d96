"""Every kernel that this backend can ever launch, by name; what continuous integration compiles.

Clause: BK-NCUDA-17 (specs/backend_numba_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ferrum_numba.gpu.kernel import Kernel
from ferrum_numba.gpu.kernels import (
    argmax,
    attend_one,
    attention,
    copy,
    decode,
    elementwise,
    gemm,
    gemv,
    norm,
    packed_gemv,
    rope,
    sampling,
    softmax,
    weights,
)
from ferrum_numba.gpu.storage import BITS, FP32, STORAGES, Storage, common_type

Made = tuple[str, Kernel]
Maker = Callable[..., Kernel]


OF_ONE: tuple[Maker, ...] = (softmax.softmax, argmax.argmax, attention.attention, attention.merge, sampling.sample)
OF_TWO: tuple[Maker, ...] = (
    *(norm.rms_norm, norm.rms_norm_residual, norm.layer_norm),
    *(rope.rotary_embedding, decode.turn_and_store),
)
OF_BITS: tuple[Maker, ...] = (copy.gather_strided, copy.scatter_strided, copy.copy_runs, copy.copy_rows, copy.fill)


def kernels() -> Iterator[Made]:
    """(name, kernel) with names like "rms_norm bf16 fp32", all different. Pure."""
    yield _made(decode.place_cursor)
    for x in STORAGES.values():
        for make in OF_ONE:
            yield _made(make, x)
        for share in attend_one.shares_of(x):
            yield _made(attend_one.attend_one, x, share)
        for name in elementwise.UNARY:
            for y in STORAGES.values() if name == "cast" else (x,):
                yield _made(elementwise.unary, name, x, y)
        for w in {x.data_type: x, FP32.data_type: FP32}.values():
            for make in OF_TWO:
                yield _made(make, x, w)
            yield _made(gemv.gemv, x, w)
            yield _made(gemm.gemm, x, weights.DENSE[w])
        for packed in (weights.Q4_0, weights.Q8_0):
            yield _made(packed_gemv.packed_gemv, x, packed)
            yield _made(gemm.gemm, x, packed)
        yield from _binaries(x)
    for bits in BITS.values():
        for make in OF_BITS:
            yield _made(make, bits)


def _binaries(a: Storage) -> Iterator[Made]:
    for b in STORAGES.values():
        for name in elementwise.BINARY:
            y = a if name == "silu_mul" else STORAGES[common_type(name, a.data_type, b.data_type)]
            yield _made(elementwise.binary, name, a, b, y)


def _made(make: Maker, *of: Any) -> Made:
    return " ".join((make.__name__, *(_short(one) for one in of))), make(*of)


def _short(one: Any) -> str:
    if isinstance(one, Storage):
        return str(one.data_type)
    return str(getattr(one, "name", one))
