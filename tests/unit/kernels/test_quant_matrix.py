"""Packed matrices row by row: the same numbers as the whole, the same products as dense ones, in bounded memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.kernels.quant import FORMATS, decode
from ferrum_ref.kernels.quant_awq import AwqWeights, decode_awq, pack_awq
from ferrum_ref.kernels.quant_gptq import decode_gptq, encode_gptq
from ferrum_ref.kernels.quant_groups import Fp8Format, decode_fp8, decode_groups, encode_fp8, encode_groups
from ferrum_ref.kernels.quant_matrix import AwqMatrix, Fp8Matrix, GptqMatrix, GroupMatrix, QuantMatrix, RowMatrix
from ferrum_ref.kernels.quant_words import pack_words
from ferrum_ref.kernels.quantized_linear import packed_linear
from ferrum_ref.models.matrix_reader import packed_part
from ferrum_ref.numpy_backend import make_backend

OUT, IN = 96, 256
BLOCKED = [name for name, layout in FORMATS.items() if layout.block_elements > 1]


def row_matrix(name: str, rows: int = OUT, columns: int = IN) -> RowMatrix:
    """Random quanta under scales of ordinary size: every float16 and float field's exponent is kept small."""
    rng = np.random.default_rng(len(name))
    if FORMATS[name].block_elements == 1:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        from ferrum_ref.kernels.quant import encode

        return RowMatrix(encode(name, values), name)
    layout = FORMATS[name]
    packed = rng.integers(0, 256, (rows, columns // layout.block_elements, layout.block_bytes), dtype=np.uint8)
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2)[: 2 if name[-1] != "0" else 1]):
        packed[..., start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return RowMatrix(packed.reshape(rows, -1), name)


def awq() -> AwqMatrix:
    rng = np.random.default_rng(3)
    quanta, zeros = (rng.integers(0, 16, shape, dtype=np.uint8) for shape in ((IN, OUT), (IN // 32, OUT)))
    scales = rng.uniform(0.01, 0.1, (IN // 32, OUT)).astype(np.float16)
    return AwqMatrix(AwqWeights(pack_awq(quanta), pack_awq(zeros), scales, 32))


def values() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((OUT, IN)).astype(np.float32)


def gptq(bits: int, act_order: bool = False) -> GptqMatrix:
    order = np.random.default_rng(5).permutation(IN).astype(np.int32) // 32 if act_order else None
    return GptqMatrix(encode_gptq(values(), bits, 32, g_idx=order))


def fp8(scale: str) -> Fp8Matrix:
    block = {"tensor": None, "row": (1, IN), "block": (32, 128), "ragged": (64, 64)}[scale]
    codes, scales = encode_fp8(values(), block=block)
    return Fp8Matrix(codes, scales.reshape(-1) if scale == "row" else scales)


MATRICES: dict[str, tuple[Callable[[], QuantMatrix], Callable[[Any], np.ndarray]]] = {
    **{name: ((lambda name=name: row_matrix(name)), lambda m: decode(m.format, m.packed)) for name in FORMATS},
    **{f"gptq {bits}": ((lambda bits=bits: gptq(bits)), lambda m: decode_gptq(m.weights)) for bits in range(2, 9)},
    "gptq act-order": (lambda: gptq(3, True), lambda m: decode_gptq(m.weights)),
    "awq": (awq, lambda m: decode_awq(m.weights)),
    "int8": (lambda: GroupMatrix(encode_groups(values(), 8, -1, symmetric=True)), lambda m: decode_groups(m.weights)),
    "int4": (lambda: GroupMatrix(encode_groups(values(), 4, 64, symmetric=False)), lambda m: decode_groups(m.weights)),
    **{
        f"fp8 {scale}": ((lambda scale=scale: fp8(scale)), lambda m: decode_fp8(m.bits, m.scale, m.format))
        for scale in ("tensor", "row", "block", "ragged")
    },
}


@pytest.mark.clause("QT-MATRIX-1", "QT-MATRIX-2")
@pytest.mark.parametrize("name", MATRICES)
def test_rows_are_those_of_the_whole_matrix_bit_for_bit(name: str) -> None:
    make, decode_all = MATRICES[name]
    matrix, whole = make(), decode_all(make())
    assert matrix.shape == whole.shape == (OUT, IN)
    for start, stop in ((0, OUT), (0, 1), (1, 2), (31, 33), (40, 95), (OUT - 1, OUT), (7, 7)):
        assert matrix.rows(start, stop).tobytes() == whole[start:stop].tobytes()
        out = np.full((stop - start, IN), 7, np.float32)
        assert matrix.rows(start, stop, out) is out
        assert out.tobytes() == whole[start:stop].tobytes()
    ids = np.array([5, 95, 0, 5])
    assert matrix.at(ids).tobytes() == whole[ids].tobytes()
    assert matrix.at(ids[:0]).shape == (0, IN)


@pytest.mark.clause("QT-MATRIX-1", "QT-MATRIX-2")
@pytest.mark.parametrize("name", ["Q4_K", "gptq 4", "fp8 block"])
def test_rows_that_are_not_there_are_refused(name: str) -> None:
    matrix = MATRICES[name][0]()
    for start, stop in ((-1, 3), (0, OUT + 1), (5, 4)):
        with pytest.raises(InvalidParameterError, match=f"within 0 to {OUT}"):
            matrix.rows(start, stop)
    for bad in (-1, OUT):
        with pytest.raises(InvalidParameterError, match=f"id {bad}, expected 0 <= id < {OUT}"):
            matrix.at(np.array([0, bad]))
    with pytest.raises(ShapeError, match="out: got"):
        matrix.rows(0, 2, np.empty((3, IN), np.float32))


@pytest.mark.clause("QT-MATRIX-3", "QT-SCHEME-1")
@pytest.mark.parametrize("name", MATRICES)
def test_the_product_is_that_of_the_dense_matrix(name: str) -> None:
    """Against float64 sums of the decoded weights, within the bound of any order of float32 sums; no rounding more."""
    make, decode_all = MATRICES[name]
    weight = decode_all(make()).astype(np.float64)
    x = np.random.default_rng(6).standard_normal((2, 3, IN)).astype(np.float32)
    backend = make_backend()
    part = packed_part(make(), backend.tensor_factory())
    assert part.scheme is not None
    assert part.scheme.kind in backend.capabilities().extra_capabilities["quantized_linear"]
    kernel_ops = backend.kernel_ops()
    assert kernel_ops is not None
    linear = kernel_ops.linear_ops()
    assert linear is not None
    y = linear.quantized_linear(backend.tensor_factory().from_numpy(x), part.tensor, part.scheme).to_numpy()
    gamma = IN * 2.0**-24 / (1 - IN * 2.0**-24)
    wanted, magnitude = x.astype(np.float64) @ weight.T, np.abs(x).astype(np.float64) @ np.abs(weight).T
    assert y.shape == (2, 3, OUT)
    assert (np.abs(y - wanted) <= gamma * magnitude).all()


@pytest.mark.clause("QT-MATRIX-3")
@pytest.mark.parametrize("name", ["Q6_K", "gptq 3", "awq", "int4", "fp8 block"])
def test_results_have_the_inputs_type_rounded_once(name: str) -> None:
    matrix = MATRICES[name][0]()
    x = np.random.default_rng(7).standard_normal((4, IN)).astype(ml_dtypes.bfloat16)
    wide = packed_linear(x.astype(np.float32), matrix)
    assert packed_linear(x, matrix).tobytes() == wide.astype(ml_dtypes.bfloat16).tobytes()
    assert packed_linear(x[:0], matrix).shape == (0, OUT)
    with pytest.raises(ShapeError, match=r"expected \(..., 256\)"):
        packed_linear(x[:, :5], matrix)


@pytest.mark.clause("QT-MATRIX-3")
def test_never_a_whole_dense_copy() -> None:
    """4096 x 4096 weights are 64 MiB dense; a product by them takes a few."""
    size, dense_bytes = 4096, 4 * 4096**2
    rng = np.random.default_rng(8)
    blocks = rng.integers(0, 256, (size, size // 256 * FORMATS["Q4_K"].block_bytes), dtype=np.uint8)
    words = rng.integers(-(2**31), 2**31, (size // 8, size), dtype=np.int32)
    codes = rng.integers(0, 120, (size, size), dtype=np.uint8)
    from ferrum_ref.kernels.quant_gptq import GptqWeights

    scales = np.ones((size // 128, size), np.float16)
    zeros = pack_words(np.zeros((size // 128, size), np.uint8), 4, 1)
    x = np.ones((1, size), np.float32)
    matrices: list[QuantMatrix] = [
        RowMatrix(blocks, "Q4_K"),
        GptqMatrix(GptqWeights(words, zeros, scales, None, 4, 128)),
        Fp8Matrix(codes, np.ones((size // 128, size // 128), np.float32)),
    ]
    for matrix in matrices:
        tracemalloc.start()
        packed_linear(x, matrix)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < dense_bytes / 4, matrix.kind


@pytest.mark.clause("QT-SCHEME-1", "QT-SCHEME-2")
def test_schemes_have_names_and_refuse_what_does_not_fit() -> None:
    kinds = [QuantScheme.Q4_0(32).kind, QuantScheme.Q8_0(32).kind, QuantScheme.Rows("Q6_K").kind]
    assert kinds == ["q4_0", "q8_0", "q6_k"]
    backend = make_backend()
    factory, kernel_ops = backend.tensor_factory(), backend.kernel_ops()
    linear = kernel_ops.linear_ops() if kernel_ops is not None else None
    assert linear is not None
    x, packed = factory.from_numpy(np.ones((1, 256), np.float32)), factory.from_numpy(np.zeros((4, 210), np.uint8))
    with pytest.raises(UnsupportedError, match="'IQ4_NL', expected one of"):
        linear.quantized_linear(x, packed, QuantScheme.Rows("IQ4_NL"))
    with pytest.raises(ShapeError, match="packed Q5_K"):
        linear.quantized_linear(x, packed, QuantScheme.Rows("Q5_K"))
    flat, codes = factory.from_numpy(np.zeros(4, np.int32)), factory.from_numpy(np.zeros((4, 256), np.uint8))
    with pytest.raises(ShapeError, match="packed_weight: got"):
        linear.quantized_linear(x, flat, QuantScheme.Awq(32, flat, flat))
    with pytest.raises(BackendError, match="scale"):
        linear.quantized_linear(x, codes, QuantScheme.Fp8("e4m3", factory.from_numpy(np.ones((3, 3), np.float32))))
    with pytest.raises(UnsupportedError, match="scheme"):
        linear.quantized_linear(x, packed, QuantScheme())


@pytest.mark.clause("QT-MATRIX-4", "MD-QUANT-7")
@pytest.mark.parametrize("name", MATRICES)
def test_what_is_not_finite_is_found_without_decoding(name: str) -> None:
    """Each float of the stored form in turn becomes a NaN or an infinity; the decoded numbers say so too."""
    matrix, decode_all = MATRICES[name]
    clean: Any = matrix()
    assert clean.is_finite()
    for bad in (np.nan, np.inf):
        for place in places(clean):
            spoiled: Any = matrix()
            spoil(spoiled, place, bad)
            with np.errstate(all="ignore"):
                if np.isfinite(decode_all(spoiled)).all():  # E4M3 has no infinity
                    assert name == "F8_E4M3"
                    continue
            assert not spoiled.is_finite()


@pytest.mark.clause("QT-MATRIX-4")
@pytest.mark.parametrize(("kind", "code"), [("e4m3", 0x7F), ("e4m3", 0xFF), ("e5m2", 0x7C), ("e5m2", 0xFD)])
def test_codes_of_fp8_that_are_no_numbers_are_found(kind: Fp8Format, code: int) -> None:
    codes = np.full((3, 4), 0x7B, np.uint8)
    assert Fp8Matrix(codes, np.ones(1, np.float32), kind).is_finite()
    codes[2, 1] = code
    assert not Fp8Matrix(codes, np.ones(1, np.float32), kind).is_finite()
    assert not np.isfinite(decode_fp8(codes, np.ones(1), kind)[2, 1])


def places(matrix: Any) -> list[int]:
    if not isinstance(matrix, RowMatrix):
        return [0, -1]
    if FORMATS[matrix.format].block_elements == 1:
        return [0, OUT * IN - 1]
    block = FORMATS[matrix.format].block_bytes
    half = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    first = [at for at in range(block - 1) if np.array_equal(matrix.packed.reshape(-1, block)[7, at : at + 2], half)]
    return [7 * block + at for at in first]


def spoil(matrix: Any, place: int, bad: float) -> None:
    if not isinstance(matrix, RowMatrix):
        scales = matrix.scale if isinstance(matrix, Fp8Matrix) else matrix.weights.scales
        scales.reshape(-1)[place] = bad
    elif FORMATS[matrix.format].block_elements == 1:
        from ferrum_ref.kernels.quant import encode

        size = FORMATS[matrix.format].block_bytes
        matrix.packed.reshape(-1, size)[place] = encode(matrix.format, np.array([bad], np.float32))
    else:
        matrix.packed.reshape(-1)[place : place + 2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
