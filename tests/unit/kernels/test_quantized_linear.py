"""Projection by packed weights, against gguf's own unpacking and float64."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.kernels import quantized_linear as module
from ferrum_ref.kernels.quantized_linear import quantized_linear
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.devices import DataType, Device

TYPES = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}
BOTH = pytest.mark.parametrize("scheme", TYPES)


def random_packed(rng, scheme, size_out, blocks):
    """Random quanta with scales of every size, subnormal float16 among them."""
    packed = rng.integers(0, 256, (size_out, blocks, BLOCK_BYTES[scheme]), dtype=np.uint8)
    scales = (rng.standard_normal((size_out, blocks)) * 10.0 ** rng.integers(-7, 2, (size_out, blocks))).astype("<f2")
    packed[:, :, :2] = scales[..., None].view(np.uint8)
    return packed.reshape(size_out, blocks * BLOCK_BYTES[scheme])


def unpacked(packed, scheme):
    return gguf.dequantize(packed, TYPES[scheme]).astype(np.float64)


@pytest.mark.clause("KN-QLINEAR-1")
def test_the_block_of_the_clause():
    block = np.frombuffer(np.float16(0.5).tobytes() + b"\x9a" * 16, np.uint8)[None]
    assert quantized_linear(np.ones((1, 32), np.float32), block, "Q4_0", 32).tolist() == [[24]]
    first = np.zeros(32, np.float32)
    first[:16] = 1
    assert quantized_linear(first, block, "Q4_0", 32).tolist() == [16]  # low halves are the first sixteen
    wide = np.frombuffer(np.float16(2).tobytes() + bytes(range(240, 256)) + bytes(range(16)), np.uint8)[None]
    each = quantized_linear(np.eye(32, dtype=np.float32), wide, "Q8_0", 32)
    assert each[:, 0].tolist() == [2 * q for q in range(-16, 16)]


@pytest.mark.clause("KN-QLINEAR-1", "KN-QLINEAR-2")
@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0, 2)])
def test_against_gguf_in_float64(scheme, dtype, lead, bounds):
    rng = np.random.default_rng(3)
    packed = random_packed(rng, scheme, 7, 3)
    x = rng.standard_normal((*lead, 96)).astype(dtype)
    weight = unpacked(packed, scheme)
    with np.errstate(all="ignore"):
        y = quantized_linear(x, packed, scheme, 32)
    assert (y.shape, y.dtype) == ((*lead, 7), dtype)
    want = x.astype(np.float64) @ weight.T
    assert (np.abs(y - want) <= bounds(dtype).linear(x.astype(np.float64), weight)).all()


@pytest.mark.clause("KN-QLINEAR-2")
@BOTH
@given(seed=st.integers(0, 2**32 - 1), step=st.integers(1, 9))
def test_rows_at_a_time_change_nothing_but_rounding(scheme, seed, step):
    """Integer weights and inputs: every order of the sums is exact."""
    rng = np.random.default_rng(seed)
    packed = random_packed(rng, scheme, 9, 2)
    packed.reshape(9, 2, -1)[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    x = rng.integers(-9, 9, (4, 64)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ELEMENTS", 64 * step)
        y = quantized_linear(x, packed, scheme, 32)
    assert (y == x @ unpacked(packed, scheme).T).all()
    assert packed.flags.c_contiguous


@pytest.mark.clause("KN-QLINEAR-2")
def test_odd_scales_count_as_what_they_are():
    for scale, want in ((np.inf, np.inf), (np.nan, np.nan), (2.0**-24, 2.0**-24 * 32)):
        block = np.frombuffer(np.float16(scale).tobytes() + b"\x01" * 32, np.uint8)[None]
        y = quantized_linear(np.ones(32, np.float32), block, "Q8_0", 32)
        np.testing.assert_array_equal(y, [want])


@pytest.mark.clause("KN-QLINEAR-1", "KN-QLINEAR-2")
def test_activations_are_not_quantised():
    """x = [127, 0.4, ...]: with 8-bit activations 0.4 would become 0."""
    block = np.frombuffer(np.float16(1).tobytes() + b"\x00" + b"\x7f" * 31, np.uint8)[None]
    x = np.zeros(32, np.float32)
    x[:2] = 127, 0.4
    assert quantized_linear(x, block, "Q8_0", 32).tolist() == [np.float32(0.4) * 127]


@pytest.mark.clause("KN-QLINEAR-3", "KN-QLINEAR-4")
def test_refusals():
    packed, x = np.zeros((2, 34), np.uint8), np.zeros((1, 32), np.float32)
    for scheme, group in (("Q8_0", 64), ("Q8_0", 16), ("Q4_1", 32), ("nonsense", 32)):
        with pytest.raises(UnsupportedError, match="quantized_linear: scheme"):
            quantized_linear(x, packed, scheme, group)
    bad = [
        (x, packed.view(np.int8)),
        (x, packed[0]),
        (x, packed[:, :33]),
        (x[:, :31], packed),
        (np.zeros((1, 64), np.float32), packed),
        (np.float32(1).reshape(()), packed),
    ]
    for a, b in bad:
        with pytest.raises(BackendError, match="quantized_linear: input"):
            quantized_linear(a, b, "Q8_0", 32)
    with pytest.raises(BackendError, match="element type int32"):
        quantized_linear(x.astype(np.int32), packed, "Q8_0", 32)
    empty = quantized_linear(np.zeros((3, 0), np.float32), np.zeros((2, 0), np.uint8), "Q4_0", 32)
    assert empty.tolist() == [[0, 0]] * 3
    assert quantized_linear(x, packed[:0], "Q8_0", 32).shape == (1, 0)


@pytest.mark.clause("KN-QLINEAR-1", "KN-QLINEAR-3", "KN-QLINEAR-4")
@BOTH
def test_through_the_backend_the_weights_stay_packed(scheme):
    backend = make_backend()
    ops, factory = backend.kernel_ops(), backend.tensor_factory()
    rng = np.random.default_rng(4)
    packed = random_packed(rng, scheme, 5, 2)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    weight = factory.from_numpy(packed)
    kind = QuantScheme.Q4_0 if scheme == "Q4_0" else QuantScheme.Q8_0
    y = ops.linear_ops().quantized_linear(factory.from_numpy(x), weight, kind(32))
    assert y.to_numpy().tobytes() == quantized_linear(x, packed, scheme, 32).tobytes()
    assert weight.dtype() is DataType.UINT8
    assert weight.to_numpy() is packed
    assert ops.declared_algorithm("quantized_linear") == Algorithm()
    for other in (kind(64), "Q4_0", QuantScheme()):
        with pytest.raises(UnsupportedError, match="quantized_linear"):
            ops.linear_ops().quantized_linear(factory.from_numpy(x), weight, other)
    with pytest.raises(BackendError, match=r"expected \(\.\.\., in\)"):
        ops.linear_ops().quantized_linear(factory.zeros((1, 96), DataType.FP32, Device.CPU), weight, kind(32))


@pytest.mark.clause("KN-QLINEAR-1")
@BOTH
def test_two_backends_read_the_same_blocks(scheme):
    from ferrum_torch import make_backend as make_torch

    rng = np.random.default_rng(6)
    packed = random_packed(rng, scheme, 6, 1)
    packed[:, :2] = np.frombuffer(np.float16(0.25).tobytes(), np.uint8)
    x = rng.integers(-8, 8, (3, 32)).astype(np.float32)  # exact in any order
    kind = QuantScheme.Q4_0 if scheme == "Q4_0" else QuantScheme.Q8_0
    results = []
    for backend in (make_backend(), make_torch("cpu")):
        factory, linear = backend.tensor_factory(), backend.kernel_ops().linear_ops()
        y = linear.quantized_linear(factory.from_numpy(x), factory.from_numpy(packed), kind(32))
        results.append(y.to_numpy().tolist())
    assert results[0] == results[1]
