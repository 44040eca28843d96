"""What is particular to the backend: where it opens, what it refuses, what it tells."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, DeviceError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import AttentionParams, KernelSamplingParams, QuantScheme
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType, Device

RNG = np.random.default_rng(2)


def draw(backend: Any, *shape: int, dtype: DataType = DataType.FP32) -> Any:
    return backend.tensor_factory().from_numpy(RNG.standard_normal(shape, np.float32)).to_dtype(dtype)


@pytest.mark.clause("BK-CUPY-1")
def test_importing_it_imports_no_cupy() -> None:
    program = "import ferrum_cupy, ferrum_cupy.host, sys; print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.clause("BK-CUPY-1")
def test_without_a_gpu_or_without_cupy_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrum_cupy import make_backend

    cupy = pytest.importorskip("cupy")
    with pytest.raises(UnsupportedError, match="got 'cpu', expected cuda or cuda:N"):
        make_backend("cpu")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        with pytest.raises(UnsupportedError, match="finds no usable NVIDIA GPU or driver"):
            load_backend("ferrum_cupy:make_backend", "cuda")
    else:
        with pytest.raises(UnsupportedError, match="expected cuda:0 to"):
            make_backend(f"cuda:{count}")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "ferrum_cupy.gpu", raising=False)
    with pytest.raises(UnsupportedError, match="cupy is not installed"):
        make_backend("cuda")


@pytest.mark.clause("BK-CUPY-2")
def test_foreign_operands_are_refused(host: Any) -> None:
    from ferrum_cupy.host import make_backend

    other = make_backend()
    for stranger in (draw(load_backend("numpy"), 4, 4), draw(other, 4, 4)):
        with pytest.raises(BackendError, match="expected a tensor of this cupy backend; convert it"):
            host.tensor_ops().add(draw(host, 4, 4), stranger)


@pytest.mark.clause("BK-CUPY-5")
def test_element_types_come_back_as_they_are(host: Any) -> None:
    factory = host.tensor_factory()
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint32, np.bool_):
        array = np.arange(6).astype(kind).reshape(2, 3)
        back = factory.from_numpy(array).to_numpy()
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
    for kind in (np.int64, np.float64, ml_dtypes.int4):
        with pytest.raises(DeviceError, match="got element type"):
            factory.from_numpy(np.zeros(2, kind))
    with pytest.raises(DeviceError, match="got INT4"):
        factory.zeros((2,), DataType.INT4, Device.CPU)


@pytest.mark.clause("BK-CUPY-6")
@pytest.mark.parametrize(
    ("dtype", "kind"), [(DataType.FP16, np.float16), (DataType.BF16, ml_dtypes.bfloat16), (DataType.FP8, None)]
)
def test_rounding_is_to_nearest_even(host: Any, dtype: DataType, kind: Any) -> None:
    values = (RNG.standard_normal(4000) * 10.0 ** RNG.uniform(-8, 5, 4000)).astype(np.float32)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-9]
    found = host.tensor_factory().from_numpy(values).to_dtype(dtype).to_numpy()
    if kind is None:
        expected = np.where(np.isnan(values), values, values.clip(-448, 448)).astype(ml_dtypes.float8_e4m3fn)
    else:
        with np.errstate(over="ignore"):
            expected = values.astype(kind)
    assert np.array_equal(found.astype(np.float32), expected.astype(np.float32), equal_nan=True)
    assert np.array_equal(np.signbit(found.astype(np.float32)[:2]), [False, True])


@pytest.mark.clause("BK-CUPY-6")
def test_numbers_to_integers(host: Any) -> None:
    given = host.tensor_factory().from_numpy(np.array([2.5, 3.5, -7.2, 300.0, -1e9], np.float32))
    assert given.to_dtype(DataType.INT8).to_numpy().tolist() == [2, 4, -7, 127, -128]
    with pytest.raises(DeviceError, match="NaN has no value in UINT8"):
        host.tensor_factory().from_numpy(np.array([np.nan], np.float32)).to_dtype(DataType.UINT8)


@pytest.mark.clause("BK-CUPY-7")
def test_kernels_take_floats_of_three_kinds(host: Any) -> None:
    whole = host.tensor_factory().from_numpy(np.ones((2, 8), np.int32))
    with pytest.raises(BackendError, match="element type INT32, expected fp32, fp16 or bf16"):
        host.kernel_ops().activation_ops().silu_mul(whole, whole)
    eighth = draw(host, 2, 8, dtype=DataType.FP8)
    with pytest.raises(BackendError, match="element type FP8"):
        host.kernel_ops().norm_ops().rms_norm(eighth, eighth, 1e-5)
    x, gain = draw(host, 3, 16, dtype=DataType.BF16), draw(host, 16)
    found = host.kernel_ops().norm_ops().rms_norm(x, gain, 1e-5)
    same = host.kernel_ops().norm_ops().rms_norm(x, gain.to_dtype(DataType.BF16), 1e-5)
    assert found.dtype() is DataType.BF16
    assert np.array_equal(found.to_numpy(), same.to_numpy())


@pytest.mark.clause("BK-CUPY-8")
def test_packs_and_single_elements_give_the_same_bits(host: Any) -> None:
    """A view that starts off a 16-byte address takes the other path."""
    for dtype in (DataType.FP32, DataType.BF16):
        wide = draw(host, 1, 8 * 64 + 8, dtype=dtype)
        aligned = wide.view((0, 0), (1, 512))
        shifted = host.tensor_factory().from_numpy(np.concatenate([np.zeros(1, np.float32), aligned.to_vec_f32()]))
        shifted = shifted.to_dtype(dtype).view((1,), (513,)).reshape((1, 512))
        up = draw(host, 1, 512, dtype=dtype)
        silu = host.kernel_ops().activation_ops().silu_mul
        assert np.array_equal(silu(aligned, up).to_numpy(), silu(shifted, up).to_numpy())


@pytest.mark.clause("BK-CUPY-9")
def test_attention_says_what_it_does_not_do(host: Any) -> None:
    attention = host.kernel_ops().attention_ops().attention
    q, k = draw(host, 1, 2, 2, 320), draw(host, 1, 4, 2, 320)
    with pytest.raises(UnsupportedError, match="head size 320, expected at most 256"):
        attention(q, k, k, AttentionParams(2, 2, 320, 0.1, True))
    q, k, v = draw(host, 1, 2, 2, 64), draw(host, 1, 4, 2, 64), draw(host, 1, 4, 2, 32)
    with pytest.raises(UnsupportedError, match="values of size 32 beside keys of size 64"):
        attention(q, k, v, AttentionParams(2, 2, 64, 0.1, True))
    with pytest.raises(ShapeError, match="sinks"):
        attention(q, k, k, AttentionParams(2, 2, 64, 0.1, True), sinks=draw(host, 3))


@pytest.mark.clause("BK-CUPY-10", "BK-CUPY-5")
def test_write_kv(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    factory, write = host.tensor_factory(), host.kernel_ops().attention_ops().write_kv
    cache, rows = factory.zeros((2, 3, 1, 4), DataType.FP16, Device.CPU), draw(host, 4, 1, 4, dtype=DataType.FP16)
    write(cache, rows, [5, -1, 0, 5])
    got, new = cache.to_numpy().reshape(6, 4), rows.to_numpy().reshape(4, 4)
    assert np.array_equal(got[5], new[3])
    assert np.array_equal(got[0], new[2])
    assert not got[1:5].any()
    before = cache.to_numpy().copy()
    for slots, other in (([6, 0, 1, 2], rows), ([0, 1], rows), ([0, 1, 2, 3], draw(host, 4, 1, 4))):
        with pytest.raises(BackendError):
            write(cache, other, slots)
    assert np.array_equal(cache.to_numpy(), before)
    sent: list[Any] = []
    really = host._machine.to_device
    monkeypatch.setattr(host._machine, "to_device", lambda array: sent.append(array) or really(array))
    write(cache, rows, [2, 3, 3, 2])  # some twice, none nowhere
    assert np.array_equal(cache.to_numpy().reshape(6, 4)[2:4], new[[3, 2]])
    assert all(len(set(array.tolist())) == len(array) for array in sent)  # a GPU writes equal slots in any order
    write(cache, rows.view((0, 0, 0), (2, 1, 4)), [-1, 1])  # no slot twice, one of them nowhere
    assert np.array_equal(cache.to_numpy().reshape(6, 4)[1], new[1])
    assert np.array_equal(cache.to_numpy().reshape(6, 4)[5], new[3])
    frozen = np.zeros((2, 1, 4), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(BackendError, match="read-only"):
        write(factory.from_numpy(frozen), draw(host, 1, 1, 4), [0])


@pytest.mark.clause("BK-CUPY-9")
def test_blocks_that_are_needed_must_exist(host: Any) -> None:
    q, cache, params = draw(host, 2, 2, 64), draw(host, 3, 4, 2, 64), AttentionParams(2, 2, 64, 0.1, True)

    def attend(table: Any, lengths: Any) -> Any:
        attention = host.kernel_ops().attention_ops().paged_attention
        return attention(q, cache, cache, table, params, context_lens=lengths).to_numpy()

    expected = attend([[0, 1], [2, 0]], [8, 4])
    for unneeded in (-1, 3, 10**9):
        assert np.array_equal(attend([[0, 1], [2, unneeded]], [8, 4]), expected)
        with pytest.raises(BackendError, match=rf"block_table\[1\] names block {unneeded}, expected 0 <= block < 3"):
            attend([[0, 1], [2, unneeded]], [8, 5])
    with pytest.raises(BackendError, match=r"context_lens\[0\] is 9, expected 0 <= length <= 8"):
        attend([[0, 1], [2, 0]], [9, 4])


@pytest.mark.clause("BK-CUPY-11")
def test_other_schemes_are_refused(host: Any) -> None:
    packed = host.tensor_factory().from_numpy(np.zeros((2, 36), np.uint8))
    with pytest.raises(UnsupportedError, match="group_size=32"):
        host.kernel_ops().linear_ops().quantized_linear(draw(host, 1, 64), packed, QuantScheme.Q4_0(group_size=64))
    with pytest.raises(ShapeError, match="quantized_linear"):
        host.kernel_ops().linear_ops().quantized_linear(draw(host, 1, 32), packed, QuantScheme.Q4_0(group_size=32))


@pytest.mark.clause("BK-CUPY-13")
def test_a_seed_gives_the_references_token(host: Any) -> None:
    numpy = load_backend("numpy")
    logits = (3 * RNG.standard_normal(200)).astype(np.float32)
    for seed in range(60):
        params = KernelSamplingParams(0.8, 40, 0.9, 1.2, [3, 5, 5], [1, 2, 0], seed * 71)
        ours, theirs = (
            backend.kernel_ops().sampling_ops().sample_token(backend.tensor_factory().from_numpy(logits), params)
            for backend in (host, numpy)
        )
        assert ours == theirs


@pytest.mark.clause("BK-CUPY-14")
def test_declarations(host: Any) -> None:
    declared = host.kernel_ops().declared_algorithm
    assert declared("gelu").accumulate == "fp64"
    assert declared("attention").key_block == 1
    assert not declared("linear").truncates  # the host rounds; a GPU's matrix units may cut
    assert declared("rms_norm").accumulate == "fp32"


@pytest.mark.clause("BK-CUPY-12", "BK-CUPY-15")
def test_status_and_shutdown() -> None:
    from ferrum_cupy.host import make_backend

    backend = make_backend()
    x = draw(backend, 2, 3)
    backend.tensor_ops().add(x, x)
    assert backend.status().operations_completed == 1
    assert backend.supports_device(Device.CPU)
    assert DataType.INT4 not in backend.capabilities().supported_dtypes
    assert not backend.capabilities().supports_cuda_graphs
    ops = backend.tensor_ops()
    asyncio.run(backend.synchronize(Device.CPU))
    asyncio.run(backend.shutdown())
    with pytest.raises(BackendError, match="was shut down"):
        ops.add(x, x)
    with pytest.raises(BackendError, match="was shut down"):
        backend.kernel_ops()
    assert x.to_numpy().shape == (2, 3)
    with pytest.raises(DeviceError, match=r"expected cpu"):
        asyncio.run(make_backend().initialize(Device.CUDA(0)))
