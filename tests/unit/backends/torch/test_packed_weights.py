"""Packed weights against gguf's own decoder, against integers packed by hand, and against closed forms."""

from __future__ import annotations

from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from ferrum_torch import linear, make_backend, packed_weights, row_formats
from ferrum_torch.tensor import TorchTensor

from ferrum_ref.errors import BackendError, DeviceError, InvalidParameterError, ShapeError, UnsupportedError
from ferrum_ref.interfaces.kernel_ops import QuantScheme
from ferrum_ref.numpy_backend.tensor import NumpyTensor

RNG = np.random.default_rng(39)
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def in_words(integers: Any, bits: int) -> Any:
    """(count, N) integers as (words, N) int32: one stream of bits for each column, by Python's integers."""
    count, columns = integers.shape
    words = np.zeros((-(-count * bits // 32), columns), np.uint32)
    for column in range(columns):
        stream = sum(int(value) << (place * bits) for place, value in enumerate(integers[:, column]))
        for word in range(len(words)):
            words[word, column] = (stream >> (32 * word)) & 0xFFFFFFFF
    return words.view(np.int32)


def in_awq_words(nibbles: Any) -> Any:
    """(rows, N) nibbles as (rows, N / 8) int32: nibble i of a word is output AWQ_PLACES[i] of its eight."""
    eights = nibbles.reshape(len(nibbles), -1, 8).astype(np.uint64)
    words = sum(eights[:, :, place] << np.uint64(4 * index) for index, place in enumerate(AWQ_PLACES))
    return np.asarray(words).astype(np.uint32).view(np.int32)


@pytest.fixture
def multiply(kernels: Any, factory: Any) -> Any:
    """multiply(packed, scheme, num_inputs): the weight, by multiplying the unit vectors."""

    def run(packed: Any, scheme: QuantScheme, num_inputs: int) -> Any:
        x = factory.from_numpy(np.eye(num_inputs, dtype=np.float32))
        return kernels.linear_ops().quantized_linear(x, factory.from_numpy(packed), scheme).to_numpy().T

    return run


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_ggmls_bit_for_bit(name: str) -> None:
    form = row_formats.ROW_FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (form.elements, form.num_bytes)
    packed = RNG.integers(0, 256, (64, 5 * form.num_bytes), dtype=np.uint8)  # infinite and NaN scales are among them
    got = row_formats.unpack_rows(torch.from_numpy(packed), form).numpy()
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(packed, kind)
    assert got.shape == want.shape == (64, 5 * form.elements)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))
    for rows, blocks in ((0, 2), (3, 0)):
        none = torch.zeros((rows, blocks * form.num_bytes), dtype=torch.uint8)
        assert row_formats.unpack_rows(none, form).shape == (rows, blocks * form.elements)


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("F64", np.float64),
        ("F32", np.float32),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
    ],
)
def test_rows_of_plain_numbers(multiply: Any, name: str, element: Any) -> None:
    values = RNG.normal(size=(5, 8)).astype(element)
    packed = np.ascontiguousarray(values).view(np.uint8)
    assert np.array_equal(multiply(packed, QuantScheme.Rows(name), 8), values.astype(np.float32))


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq(multiply: Any, factory: Any, bits: int, version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ELEMENTS_AT_A_TIME", 1)  # runs of 32 rows
    num_inputs, num_outputs, num_groups = 32, 96, 4
    quanta = RNG.integers(0, 1 << bits, (num_inputs, num_outputs))
    zeros = RNG.integers(0, 1 << bits, (num_groups, num_outputs))
    scales = RNG.uniform(0.5, 1.5, (num_groups, num_outputs)).astype(np.float16)
    stored, offset = in_words(zeros.T, bits).T, 1 if version == "gptq" else 0
    for g_idx in (None, RNG.permutation(np.arange(num_inputs) % num_groups).astype(np.int32)):
        groups = np.arange(num_inputs) // 8 if g_idx is None else g_idx
        scheme = QuantScheme.Gptq(
            bits,
            8,
            version,
            factory.from_numpy(np.ascontiguousarray(stored)),
            factory.from_numpy(scales),
            None if g_idx is None else factory.from_numpy(g_idx),
        )
        want = (quanta - zeros[groups] - offset) * scales[groups].astype(np.float64)
        assert np.array_equal(multiply(in_words(quanta, bits), scheme, num_inputs), want.T)


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("group_size", [4, -1])
def test_awq(multiply: Any, factory: Any, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ELEMENTS_AT_A_TIME", 1)  # runs of 8 rows
    num_groups = 1 if group_size == -1 else 3
    quanta, zeros = RNG.integers(0, 16, (12, 24)), RNG.integers(0, 16, (num_groups, 24))
    scales = RNG.uniform(0.5, 1.5, (num_groups, 24)).astype(np.float16)
    scheme = QuantScheme.Awq(group_size, factory.from_numpy(in_awq_words(zeros)), factory.from_numpy(scales))
    groups = np.arange(12) // (12 // num_groups)
    want = (quanta - zeros[groups]) * scales[groups].astype(np.float64)
    assert np.array_equal(multiply(in_awq_words(quanta), scheme, 12), want.T)


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_by_groups(multiply: Any, factory: Any, bits: Any, symmetric: bool) -> None:
    top = 1 << bits
    quanta = RNG.integers(-(top // 2), top // 2, (7, 12)) if symmetric else RNG.integers(0, top, (7, 12))
    zeros, scales = RNG.integers(0, top, (7, 3)).astype(np.uint8), RNG.uniform(0.5, 1.5, (7, 3)).astype(np.float16)
    packed = quanta.astype(np.int8 if symmetric else np.uint8)
    if bits == 4:
        nibbles = quanta % 16
        packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    offsets = None if symmetric else factory.from_numpy(zeros)
    scheme = QuantScheme.Groups(bits, factory.from_numpy(scales), offsets)
    levels = quanta if symmetric else quanta - np.repeat(zeros.astype(int), 4, 1)
    assert np.array_equal(multiply(packed, scheme, 12), levels * np.repeat(scales.astype(np.float64), 4, 1))


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize(("name", "element"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
@pytest.mark.parametrize(("shape", "block"), [((), (7, 9)), ((7,), (1, 9)), ((7, 1), (1, 9)), ((4, 3), (2, 4))])
def test_fp8(
    multiply: Any,
    factory: Any,
    name: Any,
    element: Any,
    shape: Any,
    block: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "ELEMENTS_AT_A_TIME", 27)  # three rows, or fewer where a block has two
    values = RNG.normal(size=(7, 9)).astype(element)
    scale = RNG.integers(1, 9, shape).astype(np.float32)
    table = scale.reshape(-(-7 // block[0]), -1)
    wide = np.repeat(np.repeat(table, block[0], 0), block[1], 1)[:7, :9]
    got = multiply(values.view(np.uint8), QuantScheme.Fp8(name, factory.from_numpy(scale)), 9)
    assert np.array_equal(got, values.astype(np.float32) * wide)


@pytest.mark.clause("BK-TORCH-39")
def test_the_list_of_kinds_is_what_is_taken(backend: Any) -> None:
    kinds = backend.capabilities().extra_capabilities["quantized_linear"]
    assert kinds == list(packed_weights.KINDS)
    assert set(kinds) >= {name.lower() for name in BLOCKS} | {"gptq", "awq", "int8", "int4", "fp8", "bf16", "f64"}


@pytest.mark.clause("BK-TORCH-40")
def test_what_does_not_fit(kernels: Any, factory: Any) -> None:
    def tensor(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        return factory.from_numpy(np.zeros(shape, dtype))

    words, bytes_, scales = tensor((4, 8), np.int32), tensor((4, 32), np.uint8), tensor((2, 8))
    zeros = tensor((2, 1), np.int32)
    multiply = kernels.linear_ops().quantized_linear
    shape_errors: dict[str, tuple[Any, QuantScheme]] = {
        "whole blocks": (tensor((4, 33), np.uint8), QuantScheme.Rows("Q8_0")),
        "uint8": (words, QuantScheme.Rows("Q8_0")),
        "a matrix": (tensor((32,), np.uint8), QuantScheme.Rows("F32")),
        "another width": (bytes_, QuantScheme.Rows("F32")),
        "gptq words": (bytes_, QuantScheme.Gptq(4, 16, "gptq", zeros, scales)),
        "gptq scales": (words, QuantScheme.Gptq(4, 16, "gptq", zeros, tensor((2, 7)))),
        "gptq zeros": (words, QuantScheme.Gptq(4, 16, "gptq", tensor((1, 1), np.int32), scales)),
        "gptq g_idx": (words, QuantScheme.Gptq(4, 16, "gptq", zeros, scales, tensor((33,), np.int32))),
        "awq scales": (words, QuantScheme.Awq(2, zeros, scales)),
        "awq zeros": (tensor((32, 1), np.int32), QuantScheme.Awq(16, tensor((2, 2), np.int32), scales)),
        "groups of another type": (tensor((4, 32), np.uint8), QuantScheme.Groups(8, tensor((4, 2)))),
        "groups scales": (bytes_, QuantScheme.Groups(4, tensor((4, 3)))),
        "groups zeros": (bytes_, QuantScheme.Groups(4, tensor((4, 2)), tensor((4, 1), np.uint8))),
        "fp8 scale": (bytes_, QuantScheme.Fp8("e4m3", tensor((3, 5)))),
    }
    x = tensor((2, 32))
    for name, (packed, scheme) in shape_errors.items():
        with pytest.raises(ShapeError) as told:
            multiply(x, packed, scheme)
        assert "quantized_linear: " in told.value.message, name
    wrong: Any = 3
    for packed, scheme in (
        (words, QuantScheme.Gptq(9, 16, "gptq", zeros, scales)),
        (words, QuantScheme.Gptq(4, 0, "gptq", zeros, scales)),
        (words, QuantScheme.Gptq(4, 8, "gptq", zeros, scales)),
        (words, QuantScheme.Gptq(4, 16, "gptq", zeros, scales, factory.from_numpy(np.full(32, 2, np.int32)))),
        (bytes_, QuantScheme.Groups(wrong, scales)),
    ):
        with pytest.raises(InvalidParameterError, match="quantized_linear: "):
            multiply(x, packed, scheme)
    for scheme in (QuantScheme.Q4_0(64), QuantScheme.Rows("IQ4_XS"), QuantScheme.Fp8(wrong, scales)):
        with pytest.raises(UnsupportedError, match="expected one of q4_0, q4_1"):
            multiply(x, bytes_, scheme)
    foreign, elsewhere = NumpyTensor(np.ones((4, 2), np.float32)), TorchTensor(torch.ones(1, device="meta"))
    with pytest.raises(BackendError, match="scales: got NumpyTensor"):
        multiply(x, bytes_, QuantScheme.Groups(4, foreign))
    with pytest.raises(DeviceError, match="scale: is on meta"):
        multiply(x, bytes_, QuantScheme.Fp8("e4m3", elsewhere))


@pytest.mark.clause("BK-TORCH-39")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_judges_further_schemes(dtype: str) -> None:
    from ferrum_ref.parity.ops.packed import PACKED
    from ferrum_ref.parity.runner import PASSED, Selection, run
    from ferrum_ref.parity.subject import BackendSubject

    names = tuple(operation.name for operation in PACKED)
    results = run(BackendSubject(make_backend(), "torch"), Selection(names, (dtype,), only_small=True))
    assert {result.operation for result in results} == set(names)
    assert [result.message for result in results if result.status != PASSED] == []
