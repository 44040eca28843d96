"""Wide loads: what they give does not depend on addresses, and misuse is noticed; unpacking is exact."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ferrum_numba.gpu import unpack
from ferrum_numba.gpu.kernels.norm import HELD, MOST_THREADS, ROWS_TOGETHER, blocks_for
from ferrum_numba.gpu.wide import fetch, is_aligned, put, widen_half
from ferrum_numba.simulator import Simulator

from ferrum_ref.errors import BackendError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.types.devices import DataType

BF16 = ml_dtypes.bfloat16
DTYPES = (np.float32, np.float16, BF16)
U32 = 2.0**-24
RNG = np.random.default_rng


def beside(tensor: Any, values: Any) -> Any:
    """The same values one element behind a 16-byte address."""
    flat = np.concatenate([np.zeros(1, values.dtype), values.reshape(-1)])
    return tensor(flat, values.dtype).view((1,), (flat.size,)).reshape(values.shape)


def drawn(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    return RNG(seed).standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.mark.clause("BK-NCUDA-42")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [8, 264, 1032])
def test_norms_give_the_same_bits_on_any_address(
    kernels: Any, ops: Any, tensor: Any, dtype: Any, num_columns: int
) -> None:
    x, r = drawn((3, num_columns), dtype, 1), drawn((3, num_columns), dtype, 2)
    w, b = drawn((num_columns,), dtype, 3), drawn((num_columns,), dtype, 4)
    norm = kernels.norm_ops()
    for call in (
        lambda at: (norm.rms_norm(at(x), at(w), 1e-6),),
        lambda at: norm.rms_norm_residual(at(x), at(r), at(w), 1e-6),
        lambda at: (ops.layer_norm(at(x), at(w), at(b), 1e-6),),
    ):
        aligned = [y.to_numpy().tobytes() for y in call(lambda values: tensor(values, dtype))]
        assert [y.to_numpy().tobytes() for y in call(lambda values: beside(tensor, values))] == aligned


@pytest.mark.clause("BK-NCUDA-42")
@pytest.mark.parametrize("num_columns", [1, 7, 9, 512, 513, HELD * 8 * MOST_THREADS + 8])
def test_rows_of_every_length_are_normalised(kernels: Any, ops: Any, tensor: Any, num_columns: int) -> None:
    x, w = drawn((2, num_columns), np.float32, 5), drawn((num_columns,), np.float32, 6)
    exact, weight = x.astype(np.float64), w.astype(np.float64)
    y = kernels.norm_ops().rms_norm(tensor(x), tensor(w), 1e-6).to_numpy()
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * weight
    assert (np.abs(y - expected) <= (num_columns + 8) * U32 * np.abs(expected)).all()
    y = ops.layer_norm(tensor(x), tensor(w), None, 1e-2).to_numpy()
    off = exact - exact.mean(-1, keepdims=True)
    spread = np.abs(off) + np.abs(exact).max() * (num_columns + 2) * U32
    expected = off / np.sqrt((off**2).mean(-1, keepdims=True) + 1e-2) * weight
    bound = (num_columns + 8) * 8 * U32 * np.abs(weight) * spread / 0.1
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.clause("BK-NCUDA-42")
def test_short_rows_share_a_block_and_long_ones_have_one() -> None:
    assert blocks_for(100, 128) == (math.ceil(100 / ROWS_TOGETHER), (32, ROWS_TOGETHER, 1))
    assert blocks_for(1, 512) == (1, (32, 1, 1))
    assert blocks_for(4, 4096) == (4, (256, 1, 1))
    assert blocks_for(4, 100_000) == (4, (MOST_THREADS, 1, 1))


@pytest.mark.clause("BK-NCUDA-42")
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_give_the_same_bits_on_any_address(kernels: Any, ops: Any, tensor: Any, dtype: Any) -> None:
    a, b, row = drawn((3, 5, 16), dtype, 7), drawn((3, 5, 16), dtype, 8), drawn((16,), dtype, 9)
    odd = drawn((5,), dtype, 10)
    cos, sin = drawn((4, 8), dtype, 11), drawn((4, 8), dtype, 12)
    x = drawn((2, 3, 2, 16), dtype, 13)
    activation, position = kernels.activation_ops(), kernels.position_ops()
    for call in (
        lambda at: activation.silu_mul(at(a), at(b)),
        lambda at: activation.gelu(at(a)),
        lambda at: ops.add(at(a), at(row)),
        lambda at: ops.mul(at(row), at(a)),
        lambda at: ops.sub(at(np.tile(odd, (7, 1))), at(odd)),
        lambda at: position.rotary_embedding(at(x), at(cos), at(sin), [3, 0, 2]),
        lambda at: kernels.linear_ops().linear(at(a), at(np.stack([row, row, row]))),
    ):
        aligned = call(lambda values: tensor(values, dtype)).to_numpy()
        assert call(lambda values: beside(tensor, values)).to_numpy().tobytes() == aligned.tobytes()
    expected = np.tile(odd.astype(np.float64), (7, 1)) - odd.astype(np.float64)
    assert ops.sub(tensor(np.tile(odd, (7, 1)), dtype), tensor(odd, dtype)).to_numpy().tolist() == expected.tolist()


@pytest.mark.clause("BK-NCUDA-42", "BK-NCUDA-7")
def test_a_wide_store_rounds_as_a_narrow_one(tensor: Any) -> None:
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -1e-40, np.inf, -np.inf, -0.0, np.nan], np.float32)
    for dtype in (np.float16, BF16):
        target = DataType.FP16 if dtype is np.float16 else DataType.BF16
        wide_one = tensor(values).to_dtype(target).to_numpy()
        narrow = beside(tensor, values).to_dtype(target).to_numpy()
        assert wide_one.tobytes() == narrow.tobytes()
        with np.errstate(over="ignore"):
            assert wide_one[:7].astype(float).tolist() == values[:7].astype(dtype).astype(float).tolist()


@pytest.mark.clause("BK-NCUDA-43")
@pytest.mark.parametrize(
    ("scheme", "kind", "size"), [("Q4_0", QuantScheme.Q4_0(32), 18), ("Q8_0", QuantScheme.Q8_0(32), 34)]
)
@pytest.mark.parametrize("num_blocks", [8, 9, 72, 131])
def test_packed_rows_of_every_length_are_multiplied(
    kernels: Any, tensor: Any, scheme: str, kind: Any, size: int, num_blocks: int
) -> None:
    """Whole and odd rows, one step of 64 blocks and several; wherever W and x lie, the bits are the same."""
    import gguf

    rng = RNG(num_blocks)
    blocks = rng.integers(0, 256, (5, num_blocks, size), dtype=np.uint8)
    blocks[..., :2] = rng.standard_normal((5, num_blocks, 1)).astype(np.float16).view(np.uint8)
    packed = blocks.reshape(5, -1)
    exact = gguf.dequantize(packed, gguf.GGMLQuantizationType[scheme]).astype(np.float64)
    x = drawn((2, num_blocks * 32), np.float32, 14)
    linear = kernels.linear_ops()
    y = linear.quantized_linear(tensor(x), tensor(packed, np.uint8), kind).to_numpy()
    terms = num_blocks * 32 + 4
    bound = terms * U32 / (1 - terms * U32) * (np.abs(x).astype(np.float64) @ np.abs(exact.T))
    assert (np.abs(y - x.astype(np.float64) @ exact.T) <= bound).all()
    flat = np.concatenate([np.zeros(2, np.uint8), packed.reshape(-1)])
    moved = tensor(flat, np.uint8).view((2,), (flat.size,)).reshape(packed.shape)
    assert linear.quantized_linear(beside(tensor, x), moved, kind).to_numpy().tobytes() == y.tobytes()


def compiled(intrinsic: Any, argument: Any, count: int) -> Any:
    """The intrinsic's own LLVM code on this machine's CPU: bits -> `count` float32 numbers."""
    import ctypes

    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    signature, codegen = intrinsic._defn(None, argument)
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(16), ir.FloatType().as_pointer()])
    function = ir.Function(module, kind, "run")
    builder = ir.IRBuilder(function.append_basic_block())
    made = codegen(SimpleNamespace(make_tuple=lambda _b, _t, values: values), builder, signature, [function.args[0]])
    for i, value in enumerate(made if isinstance(made, list) else [made]):
        builder.store(value, builder.gep(function.args[1], [ir.IntType(32)(i)]))
    builder.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    run = ctypes.CFUNCTYPE(None, ctypes.c_uint16, ctypes.c_void_p)(engine.get_function_address("run"))

    def call(bits: int) -> Any:
        out = np.zeros(count, np.float32)
        run(bits, out.ctypes.data)
        return out

    call.engine = engine  # type: ignore[attr-defined]  # lives as long as the function
    return call


@pytest.mark.clause("BK-NCUDA-43")
def test_integers_are_unpacked_exactly_by_the_code_that_kernels_are_made_of() -> None:
    from numba.cuda import types

    nibbles, both = compiled(unpack.nibbles, types.uint16, 4), compiled(unpack.signed_bytes, types.uint16, 2)
    for word in range(0, 65536, 7):
        expected = [(word >> shift & 15) - 8 for shift in (0, 4, 8, 12)]
        assert nibbles(word).tolist() == expected == [int(n) for n in unpack.nibbles.py_func(word)]
        expected = np.array([word], "<u2").view(np.int8).tolist()
        assert both(word).tolist() == expected == [int(n) for n in unpack.signed_bytes.py_func(word)]


@pytest.mark.clause("BK-CUDASIM-11")
def test_a_pack_on_an_odd_address_is_an_error() -> None:
    def reads(source: Any, target: Any, first: Any) -> None:
        put(target, 0, 0, 8, widen_half(fetch(source, first, 0, 8)))

    def writes(source: Any, target: Any, first: Any) -> None:
        put(target, first, 0, 8, widen_half(fetch(source, 0, 0, 8)))

    source, target = np.arange(32).astype(np.float16), np.zeros(32, np.float32)
    Simulator().launch(reads, 1, 1, source, target, 8)
    assert target[:8].tolist() == list(range(8, 16))
    for kernel in (reads, writes):
        with pytest.raises(BackendError, match=r"\[1\] lies \d+ bytes beyond a multiple of 16"):
            Simulator().launch(kernel, 1, 1, source, target, 1)
    with pytest.raises(BackendError, match="lies 2 bytes beyond"):
        Simulator().launch(reads, 1, 1, source[1:], target, 0)
    with pytest.raises(BackendError, match="out of bounds"):
        Simulator().launch(reads, 1, 1, source, target, 32)


@pytest.mark.clause("BK-CUDASIM-11")
def test_where_an_array_starts_is_seen() -> None:
    def asks(source: Any, target: Any) -> None:
        target[0] = 1 if is_aligned(source) else 0

    source, target = np.zeros(32, np.float16), np.zeros(1, np.int64)
    for first, expected in ((0, 1), (1, 0), (4, 0), (8, 1)):
        Simulator().launch(asks, 1, 1, source[first:], target)
        assert int(target[0]) == expected


@pytest.mark.clause("BK-CUDASIM-11")
def test_shared_memory_is_as_aligned_as_it_was_asked_for() -> None:
    from ferrum_numba.gpu.kernel import cuda
    from ferrum_numba.gpu.stream import copy_vector

    def asked(source: Any) -> None:
        copy_vector(cuda.shared.array(8, np.uint16, 16), 0, source, 0)

    def not_asked(source: Any) -> None:
        copy_vector(cuda.shared.array(8, np.uint16), 0, source, 0)

    source = np.arange(8, dtype=np.uint16)
    Simulator().launch(asked, 1, 1, source)
    with pytest.raises(BackendError, match="lies 2 bytes beyond"):
        Simulator().launch(not_asked, 1, 1, source)
