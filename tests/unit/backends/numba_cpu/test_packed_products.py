"""Products with rows in every packed format: decoded as gguf decodes them, and summed as if they were dense."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from ferrum_ref.errors import ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme

U32 = 2.0**-24
HALF_FIELDS = {  # byte offsets of a block's float16 numbers
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
NAMES = list(HALF_FIELDS)
SPECIAL = np.array([0, 0x8000, 1, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], np.uint16)


def scheme_of(name: str) -> QuantScheme:
    known = {"Q4_0": QuantScheme.Q4_0(32), "Q8_0": QuantScheme.Q8_0(32)}
    return known.get(name, QuantScheme.Rows(name))


def sizes_of(name: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def drawn(name: str, rows: int, blocks: int, halves: np.ndarray | None = None) -> np.ndarray:
    """Random bytes (rows, blocks * bytes); their float16 numbers are `halves` in turn, or around 2**-7."""
    rng = np.random.default_rng(rows + blocks)
    packed = rng.integers(0, 256, (rows, blocks, sizes_of(name)[1]), dtype=np.uint8)
    for start in HALF_FIELDS[name]:
        if halves is None:
            found = (rng.uniform(0.5, 1.5, (rows, blocks)) * rng.choice([-1, 1], (rows, blocks)) / 128).astype(
                np.float16
            )
        else:
            found = rng.choice(halves, (rows, blocks)).view(np.float16)
        packed[..., start : start + 2] = found.view(np.uint8).reshape(rows, blocks, 2)
    return packed.reshape(rows, -1)


def decoded(name: str, packed: np.ndarray) -> np.ndarray:
    """gguf's float32 numbers."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.dequantize(packed, gguf.GGMLQuantizationType[name]))


@pytest.fixture
def product(kernels: Any, tensor: Any) -> Any:
    """product(x, packed, name) by the kernel."""

    def run(x: Any, packed: np.ndarray, name: str, dtype: Any = np.float32) -> np.ndarray:
        weight = type(tensor([0]))(packed)  # where it lies, strides and all
        found: np.ndarray = kernels.linear_ops().quantized_linear(tensor(x, dtype), weight, scheme_of(name)).to_numpy()
        return found

    return run


@pytest.mark.clause("BK-NCPU-22")
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_bit_for_bit_ggufs(name: str) -> None:
    """Whole rows unpacked, with every kind of scale; any NaN stands for any other."""
    from ferrum_numba.cpu.packing import as_stored

    for halves in (None, SPECIAL):
        packed = drawn(name, 50, 7, halves)
        matrix = as_stored("test", packed, scheme_of(name))
        want, found = decoded(name, packed), np.empty((50, 7 * sizes_of(name)[0]), np.float32)
        matrix.unpack(0, 50, found)
        same = (found.view(np.uint32) == want.view(np.uint32)) | (np.isnan(found) & np.isnan(want))
        assert same.all()
        assert np.isnan(want).any() == (halves is SPECIAL)


@pytest.mark.clause("BK-NCPU-22")
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_vector_picks_one_number(product: Any, name: str) -> None:
    """By the kernel for few rows and by that for many: sums of one number and zeros are exact."""
    packed = drawn(name, 9, 1, SPECIAL[:7])
    want = decoded(name, packed).T
    unit = np.eye(sizes_of(name)[0], dtype=np.float32)
    assert np.array_equal(product(unit, packed, name), want)
    assert np.array_equal(np.concatenate([product(row, packed, name)[None] for row in unit]), want)


@pytest.mark.clause("BK-NCPU-22")
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("name", [*NAMES, "F32", "F16", "BF16"])
def test_products_keep_the_bound_of_dense_ones(product: Any, name: str, rows: int) -> None:
    elements, num_bytes = sizes_of(name)
    if name in NAMES:
        packed = drawn(name, 41, 3)
    else:
        values = np.random.default_rng(1).normal(size=(41, 83)).astype(np.float32)
        packed = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    weight = decoded(name, packed).astype(np.float64).reshape(41, -1)
    size = packed.shape[1] // num_bytes * elements
    x = np.random.default_rng(2).normal(size=(rows, size)).astype(np.float32)
    exact, magnitude = x.astype(np.float64) @ weight.T, np.abs(x.astype(np.float64)) @ np.abs(weight).T
    gamma = (size + 1) * U32 / (1 - (size + 1) * U32)
    assert np.all(np.abs(product(x, packed, name) - exact) <= gamma * magnitude)
    half = product(x, packed, name, np.float16)
    assert half.dtype == np.float16
    assert np.array_equal(half, product(x.astype(np.float16).astype(np.float32), packed, name).astype(np.float16))


@pytest.mark.clause("BK-NCPU-22")
@pytest.mark.parametrize("rows", [2, 6])
def test_nothing_is_taken_out_of_a_blocks_sum(product: Any, rows: int) -> None:
    """The clause's examples: a sum of q x that overflows, and numbers that are 0 where d q and m are large."""
    block = np.zeros((5, 34), np.uint8)
    block[:, :2] = np.frombuffer(np.float16(2.0**-14).tobytes(), np.uint8)
    block[:, 2:] = 100
    x = np.zeros((rows, 32), np.float32)
    x[:, 7] = 1e37
    assert np.array_equal(product(x, block, "Q8_0"), np.full((rows, 5), np.float32(100 * 2.0**-14) * np.float32(1e37)))
    zeros = np.full((5, 20), 0x88, np.uint8)
    zeros[:, :4] = np.array([1000, -8000], np.float16).view(np.uint8)
    x = np.random.default_rng(3).normal(size=(rows, 32)).astype(np.float32)
    assert not product(x, zeros, "Q4_1").any()


@pytest.mark.clause("BK-NCPU-22")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_scales_that_are_not_finite_count_as_what_they_are(product: Any, name: str, rows: int) -> None:
    for bits in (0x7C00, 0xFC00, 0x7E00):
        for field in HALF_FIELDS[name]:
            packed = drawn(name, 12, 2)
            start = sizes_of(name)[1] + field  # of the second block
            packed[::2, start : start + 2] = np.array([bits], np.uint16).view(np.uint8)
            x = np.random.default_rng(4).normal(size=(rows, 2 * sizes_of(name)[0])).astype(np.float32)
            with np.errstate(invalid="ignore"):
                want = x.astype(np.float64) @ decoded(name, packed).astype(np.float64).T
            found = product(x, packed, name)
            assert np.array_equal(np.isnan(found), np.isnan(want))
            assert np.array_equal(found[np.isinf(want)], want[np.isinf(want)])
            assert not np.isfinite(want[:, ::2]).any()
            assert np.isfinite(found[:, 1::2]).all()


@pytest.mark.clause("BK-NCPU-22", "BK-NCPU-13")
@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q3_K", "Q6_K"])
def test_an_output_depends_on_nothing_but_its_row(product: Any, threads: Any, name: str) -> None:
    """Not on its neighbours, on the number of threads, on where the rows lie or on what lies between them."""
    packed = drawn(name, 203, 2)
    x = np.random.default_rng(5).normal(size=(2, 2 * sizes_of(name)[0])).astype(np.float32)
    threads(1)
    whole = product(x, packed, name)
    threads(2)
    assert np.array_equal(whole, product(x, packed, name))
    for start, stop in ((0, 1), (5, 12), (201, 203)):
        assert np.array_equal(whole[:, start:stop], product(x, packed[start:stop], name))
    apart = np.full((203, packed.shape[1] + 3), 0xFF, np.uint8)
    apart[:, 1:-2] = packed
    assert np.array_equal(whole, product(x, apart[:, 1:-2], name))


@pytest.mark.clause("BK-NCPU-22")
def test_no_rows_and_no_columns(product: Any) -> None:
    assert product(np.ones((2, 256)), np.zeros((0, 210), np.uint8), "Q6_K").shape == (2, 0)
    assert product(np.ones((0, 256)), np.zeros((3, 210), np.uint8), "Q6_K").shape == (0, 3)
    for rows in (2, 6):
        assert product(np.ones((rows, 0)), np.zeros((3, 0), np.uint8), "Q4_1").tolist() == [[0.0] * 3] * rows


@pytest.mark.clause("BK-NCPU-22")
def test_what_is_refused(backend: Any, product: Any, tensor: Any) -> None:
    listed = backend.capabilities().extra_capabilities["quantized_linear"]
    assert sorted(listed) == sorted([*(name.lower() for name in NAMES), "f32", "f16", "bf16"])
    with pytest.raises(ShapeError, match=r"expected uint8 \(out, in/256\*210\) for q6_k"):
        product(np.ones(256), np.zeros((3, 211), np.uint8), "Q6_K")
    with pytest.raises(ShapeError, match=r"q4_1 rows are 64 weights"):
        product(np.ones(32), np.zeros((3, 40), np.uint8), "Q4_1")
    with pytest.raises(ShapeError, match="expected uint8"):
        product(np.ones(32), np.zeros((3, 20), np.int8), "Q4_1")
    linear, packed = backend.kernel_ops().linear_ops(), tensor(np.zeros((2, 32)), np.uint8)
    for scheme in (
        QuantScheme.Rows("IQ4_XS"),
        QuantScheme.Fp8("e4m3", tensor([1.0])),
        QuantScheme.Groups(8, tensor([[1.0], [1.0]])),
    ):
        with pytest.raises(UnsupportedError, match="expected rows of f32, f16, bf16, q8_0, q4_0, q4_1"):
            linear.quantized_linear(tensor(np.ones(32)), packed, scheme)
