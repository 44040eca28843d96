"""Packed weights where they lie: every scale, any address, no dense copy, no wait for the device, a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from ferrum_torch import linear, packed_weights, row_formats
from ferrum_torch.tensor import TorchTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ferrum_ref.errors import InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.kernels.quant_awq import AwqWeights
from ferrum_ref.kernels.quant_gptq import GptqWeights
from ferrum_ref.kernels.quant_groups import GroupWeights
from ferrum_ref.kernels.quant_matrix import AwqMatrix, Fp8Matrix, GptqMatrix, GroupMatrix, QuantMatrix, RowMatrix

SCALE_BYTES = {
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
SPECIAL = np.array([0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 65504.0, -65504.0, np.inf, -np.inf, np.nan, 0.1])
PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def scheme_of(matrix: QuantMatrix) -> QuantScheme:
    """What `quantized_linear` is told of a matrix of the reference; its tensors are shared."""

    def put(array: Any) -> Any:
        return TorchTensor(torch.from_numpy(np.asarray(array)))

    if isinstance(matrix, RowMatrix):
        return QuantScheme.Rows(matrix.format)
    if isinstance(matrix, GptqMatrix):
        w = matrix.weights
        order = None if w.g_idx is None else put(w.g_idx)
        return QuantScheme.Gptq(w.bits, w.group_size, w.version, put(w.qzeros), put(w.scales), order)
    if isinstance(matrix, AwqMatrix):
        return QuantScheme.Awq(matrix.weights.group_size, put(matrix.weights.qzeros), put(matrix.weights.scales))
    if isinstance(matrix, GroupMatrix):
        groups = matrix.weights
        return QuantScheme.Groups(groups.bits, put(groups.scales), None if groups.zeros is None else put(groups.zeros))
    assert isinstance(matrix, Fp8Matrix)
    return QuantScheme.Fp8(matrix.format, put(matrix.scale))


def packed_of(matrix: QuantMatrix) -> torch.Tensor:
    if isinstance(matrix, RowMatrix):
        return torch.from_numpy(matrix.packed)
    if isinstance(matrix, GptqMatrix | AwqMatrix):
        return torch.from_numpy(matrix.weights.qweight)
    return torch.from_numpy(matrix.weights.quanta if isinstance(matrix, GroupMatrix) else matrix.bits)


def opened(matrix: QuantMatrix) -> packed_weights.PackedWeight:
    return packed_weights.packed_weight(packed_of(matrix), scheme_of(matrix), lambda _, tensor: tensor.data)


def words(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def gptq(n: int, k: int, bits: int = 4, group: int = 128, version: Any = "gptq", order: bool = False) -> GptqMatrix:
    rng = np.random.default_rng(bits)
    groups = 1 if group == -1 else -(-k // group)
    scales = rng.standard_normal((groups, n)).astype(np.float16)
    g_idx = rng.permutation(np.arange(k) % groups).astype(np.int32) if order else None
    stored = words(rng, k * bits // 32, n), words(rng, groups, n * bits // 32)
    return GptqMatrix(GptqWeights(*stored, scales, g_idx, bits, group, version))


def awq(n: int, k: int, group: int = 128, element: Any = np.float16) -> AwqMatrix:
    rng = np.random.default_rng(group + 2)
    groups = 1 if group == -1 else k // group
    scales = rng.standard_normal((groups, n)).astype(element)
    return AwqMatrix(AwqWeights(words(rng, k, n // 8), words(rng, groups, n // 8), scales, group))


def integers(n: int, k: int, bits: Any, symmetric: bool) -> GroupMatrix:
    rng = np.random.default_rng(bits)
    quanta = rng.integers(0, 256, (n, k * bits // 8)).astype(np.uint8)
    if bits == 8 and symmetric:
        quanta = quanta.view(np.int8)
    scales = rng.standard_normal((n, k // 32)).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 1 << bits, scales.shape).astype(np.uint8)
    return GroupMatrix(GroupWeights(quanta, scales, zeros, bits, 32))


def fp8(n: int, k: int, name: Any, *shape: int) -> Fp8Matrix:
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes.reshape(-1)[:256] = np.arange(256)
    scale = rng.standard_normal(shape).astype(np.float32)
    scale.reshape(-1)[:1] = 1e-41  # subnormal products
    return Fp8Matrix(codes, scale, name)


def blocks(n: int, k: int, name: str) -> RowMatrix:
    form = row_formats.ROW_FORMATS[name]
    codes = np.random.default_rng(form.num_bytes).integers(0, 256, (n, k // form.elements * form.num_bytes))
    return RowMatrix(codes.astype(np.uint8), name)


FURTHER: dict[str, Any] = {
    **{f"gptq {bits}": lambda bits=bits: gptq(64, 192, bits, 64) for bits in range(2, 9)},
    "gptq of float32 scales": lambda: GptqMatrix(
        GptqWeights(
            *(words(np.random.default_rng(1), *shape) for shape in ((8, 40), (2, 5))),
            np.random.default_rng(2).standard_normal((2, 40)).astype(np.float32),
            None,
            4,
            32,
            "gptq_v2",
        )
    ),
    "gptq, last group short": lambda: gptq(32, 160, 4, 64, "gptq_v2"),
    "gptq act-order": lambda: gptq(96, 128, 3, 32, order=True),
    "gptq one group": lambda: gptq(64, 64, 8, -1, "gptq_v2"),
    "awq": lambda: awq(72, 128, 32),
    "awq of float32 scales": lambda: awq(8, 96, -1, np.float32),
    **{
        f"int{bits} {symmetric}": lambda bits=bits, symmetric=symmetric: integers(9, 96, bits, symmetric)
        for bits in (4, 8)
        for symmetric in (True, False)
    },
    "fp8 tensor": lambda: fp8(9, 40, "e4m3"),
    "fp8 rows": lambda: fp8(9, 40, "e5m2", 9),
    "fp8 rows of one": lambda: fp8(9, 40, "e4m3", 9, 1),
    "fp8 blocks": lambda: fp8(40, 72, "e4m3", 3, 5),
    "fp8 blocks e5m2": lambda: fp8(64, 64, "e5m2", 2, 2),
}


def same_bits(got: torch.Tensor, want: Any) -> None:
    """Every float32 pattern; NaNs alike."""
    found = got.contiguous().numpy()
    nan = np.isnan(want)
    assert found.dtype == want.dtype == np.float32
    assert found.shape == want.shape
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.uint32)[~nan], np.ascontiguousarray(want).view(np.uint32)[~nan])


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("name", SCALE_BYTES)
def test_scales_that_are_zero_subnormal_huge_infinite_or_nan(name: str) -> None:
    """Every pair of special fields over random quanta, against gguf's own decoder."""
    rng = np.random.default_rng(7)
    form, fields = row_formats.ROW_FORMATS[name], SCALE_BYTES[name]
    pairs = np.stack(np.meshgrid(SPECIAL, SPECIAL), -1).reshape(-1, 2).astype(np.float16)
    packed = rng.integers(0, 256, (len(pairs), form.num_bytes), dtype=np.uint8)
    for place, start in enumerate(fields):
        packed[:, start : start + 2] = np.ascontiguousarray(pairs[:, place]).view(np.uint8).reshape(-1, 2)
    with np.errstate(all="ignore"):
        want = gguf.dequantize(packed, gguf.GGMLQuantizationType[name])
    same_bits(row_formats.unpack_rows(torch.from_numpy(packed), form), want)


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("name", FURTHER)
def test_the_other_schemes_are_the_references_bit_for_bit(name: str) -> None:
    matrix = FURTHER[name]()
    weight, num_rows = opened(matrix), matrix.shape[0]
    assert (weight.num_outputs, weight.num_inputs) == matrix.shape
    with np.errstate(all="ignore"):
        same_bits(weight.rows(0, num_rows), matrix.rows(0, num_rows))
        for start in range(0, num_rows, weight.row_step):
            stop = min(start + weight.row_step, num_rows)
            same_bits(weight.rows(start, stop), matrix.rows(start, stop))


@pytest.mark.clause("BK-TORCH-39")
def test_every_float16_scale_and_every_number() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    packed = np.concatenate([halves, np.full((65536, 16), 0xF0, np.uint8)], 1)  # 16 times -8, 16 times 7
    with np.errstate(all="ignore"):
        want = halves.view(np.float16).astype(np.float32) * np.repeat(np.array([-8, 7], np.float32), 16)
    same_bits(row_formats.unpack_rows(torch.from_numpy(packed), row_formats.ROW_FORMATS["Q4_0"]), want)
    for name, element in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        want = np.arange(65536, dtype=np.uint16).view(element).astype(np.float32)[None]
        same_bits(row_formats.unpack_rows(torch.from_numpy(halves.reshape(1, -1)), row_formats.ROW_FORMATS[name]), want)
    doubles = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300, 2.0**-149, 2.0**-150, -np.inf, np.nan, -0.0])
    with np.errstate(all="ignore"):
        want = doubles.astype(np.float32)[None]
    same_bits(
        row_formats.unpack_rows(torch.from_numpy(doubles.view(np.uint8)[None]), row_formats.ROW_FORMATS["F64"]), want
    )


@pytest.mark.clause("BK-TORCH-41")
@pytest.mark.parametrize("name", [*SCALE_BYTES, *PLAIN])
def test_weights_that_begin_anywhere_and_are_no_run_of_memory(name: str) -> None:
    form = row_formats.ROW_FORMATS[name]
    for num_rows in (1, 3):
        matrix = blocks(num_rows, form.elements, name)
        with np.errstate(all="ignore"):
            want = matrix.rows(0, num_rows)
        for shift in (1, 2, 3, 4):
            room = torch.zeros(shift + matrix.packed.size, dtype=torch.uint8)
            room[shift:] = torch.from_numpy(matrix.packed).flatten()
            odd = room[shift:].view(matrix.packed.shape)  # an offset into torch's storage
            same_bits(row_formats.unpack_rows(odd, form), want)
            bytes_ = np.zeros(shift + matrix.packed.size, np.uint8)
            bytes_[shift:] = matrix.packed.ravel()
            there = torch.from_numpy(bytes_[shift:].reshape(matrix.packed.shape))  # as in a mapped file
            same_bits(row_formats.unpack_rows(there, form), want)
            bytes_ = np.zeros(8 + matrix.packed.size, np.uint8)
            bytes_[8:] = matrix.packed.ravel()
            both = torch.from_numpy(bytes_[8 - shift :])[shift:].view(matrix.packed.shape)  # the two together are even
            same_bits(row_formats.unpack_rows(both, form), want)
        spread = torch.zeros((num_rows, 2 * matrix.packed.shape[1]), dtype=torch.uint8)[:, ::2]
        spread.copy_(torch.from_numpy(matrix.packed))
        same_bits(row_formats.unpack_rows(spread, form), want)


class Watched(TorchDispatchMode):
    """The bytes of the largest tensor that is made, the names of the operations, and where their results lie."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.names: set[str] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name)
        if isinstance(result, torch.Tensor):
            self.devices.add(result.device.type)
        owners = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in owners:
            self.largest_bytes = max(self.largest_bytes, result.untyped_storage().nbytes())
        return result


LARGE: dict[str, Any] = {
    **{name: lambda name=name: blocks(2048, 1024, name) for name in (*SCALE_BYTES, *PLAIN)},
    "gptq 4": lambda: gptq(2048, 1024),
    "gptq 3": lambda: gptq(2048, 1024, 3),
    "awq": lambda: awq(2048, 1024),
    "int4": lambda: integers(2048, 1024, 4, False),
    "int8": lambda: integers(2048, 1024, 8, True),
    "fp8 tensor": lambda: fp8(2048, 1024, "e4m3"),
    "fp8 rows": lambda: fp8(2048, 1024, "e4m3", 2048),
    "fp8 blocks": lambda: fp8(2048, 1024, "e4m3", 16, 8),
}


@pytest.mark.clause("BK-TORCH-41")
@pytest.mark.parametrize("name", LARGE)
def test_a_run_of_rows_at_a_time_and_nothing_that_waits_for_a_device(kernels: Any, name: str) -> None:
    """8 MiB of float32 are never made, nor integers as large; and no number comes back to the host."""
    matrix = LARGE[name]()
    scheme, packed = scheme_of(matrix), TorchTensor(packed_of(matrix))
    x = TorchTensor(torch.ones((2, 1024)))
    with Watched() as seen:
        kernels.linear_ops().quantized_linear(x, packed, scheme)
    run_bytes = 4 * linear.ELEMENTS_AT_A_TIME
    assert seen.largest_bytes <= (2 if name == "gptq 3" else 1) * run_bytes  # 3 bits go through 64-bit words
    assert seen.largest_bytes >= run_bytes // 2 or name == "F32"  # which is multiplied where it lies
    assert not {op for op in seen.names if "_local_scalar_dense" in op or "item" in op or "_to_cpu" in op}


@pytest.mark.clause("BK-TORCH-41")
def test_runs_on_a_gpu_are_longer_but_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the CPU: torch's device of shapes without numbers."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(linear, "GPU_ELEMENTS_AT_A_TIME", 5000)

    def values(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.empty((stop - start, 100), device="meta")

    y = linear.in_runs(torch.empty((2, 100), device="meta"), 100, values, row_step=32)
    assert y.shape == (2, 100)
    assert asked == [(0, 32), (32, 64), (64, 96), (96, 100)]


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("name", [name for name in LARGE if name not in PLAIN])
def test_unpacked_by_operations_on_the_device_of_the_weight(name: str) -> None:
    """torch's device of shapes without numbers stands for a GPU."""
    matrix = LARGE[name]()
    packed, scheme = packed_of(matrix).to("meta"), scheme_of(matrix)
    with Watched() as seen:
        rows = packed_weights.packed_weight(packed, scheme, lambda _, tensor: tensor.data.to("meta")).rows(0, 128)
    assert seen.devices == {"meta"}
    assert (rows.device.type, rows.dtype, tuple(rows.shape)) == ("meta", torch.float32, (128, 1024))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable NVIDIA GPU here")
@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("name", [*LARGE, *FURTHER])
def test_a_gpu_unpacks_the_same_bits(name: str) -> None:
    matrix = (LARGE | FURTHER)[name]()
    weight = packed_weights.packed_weight(
        packed_of(matrix).cuda(), scheme_of(matrix), lambda _, tensor: tensor.data.cuda()
    )
    stop = min(256, weight.num_outputs)
    with np.errstate(all="ignore"):
        same_bits(weight.rows(0, stop).cpu(), matrix.rows(0, stop))


@pytest.mark.clause("BK-TORCH-40")
def test_tensors_that_nearly_fit() -> None:
    """What the reference refuses too: a g_idx too short, groups that do not divide, scales that nothing uses."""
    for reference, error in (
        (lambda m: GptqWeights(m.qweight, m.qzeros, m.scales, np.zeros(126, np.int32), 4, 32, "gptq"), ShapeError),
        (
            lambda m: GptqWeights(m.qweight, m.qzeros, m.scales, np.full(128, -1, np.int32), 4, 32, "gptq"),
            InvalidParameterError,
        ),
        (lambda m: GptqWeights(m.qweight, m.qzeros, m.scales, None, 4, -2, "gptq"), InvalidParameterError),
    ):
        stored = GptqMatrix(reference(gptq(32, 128, 4, 32).weights))
        with pytest.raises(error):
            stored.rows(0, 32)
        with pytest.raises(error, match="quantized_linear"):
            opened(stored)
    fitting = awq(16, 96, 32).weights
    for group, scales, error in (
        (64, fitting.scales[:2], InvalidParameterError),
        (0, fitting.scales, InvalidParameterError),
        (48, fitting.scales, ShapeError),
    ):
        unfit = AwqMatrix(AwqWeights(fitting.qweight, fitting.qzeros[: len(scales)], scales, group))
        with pytest.raises(error):
            unfit.rows(0, 16)
        with pytest.raises(error, match="quantized_linear"):
            opened(unfit)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.clause("BK-TORCH-39")
def test_smollm2_says_the_same_as_the_reference_packed(backend: Any, smollm2_path: Path) -> None:
    from ferrum_ref.assembly import load_model

    reference = load_model(smollm2_path, packed=True)
    prompt = reference.tokenizer.encode("The three laws of thermodynamics are", add_special=False)

    def greedy(llm: Any) -> list[int]:
        logits, tokens = llm.prefill("a", prompt), []
        for position in range(len(prompt), len(prompt) + 24):
            tokens.append(int(logits.argmax()))
            logits = llm.decode("a", tokens[-1], position)
        return tokens

    ours = load_model(smollm2_path, backend, packed=True)
    assert ours.decoder.weights.num_bytes() < Path(smollm2_path).stat().st_size
    assert greedy(ours.new_llm()) == greedy(reference.new_llm())
