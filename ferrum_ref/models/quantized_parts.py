"""One quantised matrix of a Hugging Face directory: its tensors checked against each other and put together.

    GPTQ               M.qweight  M.qzeros  M.scales  [M.g_idx]
    AWQ                M.qweight  M.qzeros  M.scales
    FP8                M.weight   M.weight_scale_inv or M.weight_scale      [M.input_scale, of activations: left out]
    pack-quantized     M.weight_packed  M.weight_scale  M.weight_shape  [M.weight_zero_point]
    int-quantized      M.weight   M.weight_scale  [M.weight_zero_point]

Nothing is copied but scales that must change type.  Clauses: MD-HFQ-3..7 (specs/model_files.md).
Source: AutoGPTQ and AutoAWQ (storage of their linear layers); compressed-tensors (pack_quantized, float_quantized).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import BackendError, InvalidFormatError, InvalidParameterError, UnsupportedError
from ferrum_ref.formats.elements import ELEMENTS
from ferrum_ref.kernels.quant_awq import AwqWeights
from ferrum_ref.kernels.quant_gptq import GptqWeights, gptq_groups
from ferrum_ref.kernels.quant_groups import GroupWeights, fp8_block
from ferrum_ref.kernels.quant_matrix import AwqMatrix, Fp8Matrix, GptqMatrix, GroupMatrix, QuantMatrix
from ferrum_ref.kernels.quant_words import unpack_words
from ferrum_ref.models.checkpoint import TensorEntry
from ferrum_ref.models.quantized_config import QuantizationSettings

Array = NDArray[Any]
_SCALES: Final = ("F16", "BF16", "F32", "F64")
_ENDINGS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "gptq": frozenset({"qweight", "qzeros", "scales", "g_idx"}),
        "awq": frozenset({"qweight", "qzeros", "scales", "g_idx"}),
        "fp8": frozenset({"weight", "weight_scale", "weight_scale_inv"}),
        "float-quantized": frozenset({"weight", "weight_scale"}),
        "int-quantized": frozenset({"weight", "weight_scale", "weight_zero_point", "weight_g_idx"}),
        "pack-quantized": frozenset(
            {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        ),
    }
)
_FP8: Final = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}


@dataclass(frozen=True, slots=True)
class StoredParts:
    """The stored tensors of one module `M`, by their ending."""

    path: str
    module: str
    entries: Mapping[str, TensorEntry]
    read: Callable[[str], NDArray[np.uint8]]

    def shape(self, ending: str) -> tuple[int, ...]:
        return self.entries[ending].shape

    def array(self, ending: str, dtypes: tuple[str, ...], shape: tuple[int, ...], beside: str) -> Array:
        """The tensor, of one of these dtypes and of this shape.  Raises InvalidFormatError naming it and `beside`."""
        entry = self.entries.get(ending)
        if entry is None:
            self.fail(ending, "nothing", f"shape {list(shape)} beside {self._shown(beside)}")
        if entry.shape != shape:
            self.fail(ending, f"shape {list(entry.shape)}", f"{list(shape)} beside {self._shown(beside)}")
        return self.typed(ending, dtypes)

    def typed(self, ending: str, dtypes: tuple[str, ...]) -> Array:
        """The tensor as it is, of one of these dtypes.  Raises InvalidFormatError."""
        entry = self.entries[ending]
        if entry.dtype not in dtypes:
            self.fail(ending, f"dtype {entry.dtype}{list(entry.shape)}", f"one of {', '.join(dtypes)}")
        return self.read(entry.name).reshape(-1).view(ELEMENTS[entry.dtype]).reshape(entry.shape)

    def scales(self, ending: str, shape: tuple[int, ...], beside: str) -> Array:
        """Scales: floats, all of them finite.  Raises InvalidFormatError saying how many are not."""
        values = self.array(ending, _SCALES, shape, beside)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            where = [int(index) for index in bad[0]]
            self.fail(ending, f"{len(bad)} scales that are NaN or infinite, the first at {where}", "finite numbers")
        return values

    def matrix_shape(self, ending: str) -> tuple[int, int]:
        """The shape of a tensor that must be a matrix.  Raises InvalidFormatError."""
        if ending not in self.entries:
            self.fail(ending, "nothing", f"a matrix beside {self._shown(next(iter(self.entries)))}")
        shape = self.shape(ending)
        if len(shape) != 2 or 0 in shape:
            self.fail(ending, f"shape {list(shape)}", "a matrix")
        return shape[0], shape[1]

    def fail(self, ending: str, got: str, expected: str) -> NoReturn:
        raise InvalidFormatError(
            f"open model {self.path}: tensor {self.module}.{ending}: got {got}, expected {expected}"
        )

    def _shown(self, ending: str) -> str:
        entry = self.entries.get(ending)
        return f"{self.module}.{ending} {list(entry.shape)}" if entry is not None else self.module


def put_together(parts: StoredParts, settings: QuantizationSettings) -> QuantMatrix:
    """The module's matrix.  [MD-HFQ-3..7]

    Raises InvalidFormatError for a missing, misshaped or mistyped tensor, or one whose numbers make no sense.
    """
    for ending in parts.entries.keys() - _ENDINGS[settings.format or settings.method]:
        others = ", ".join(sorted(f"{each} {list(parts.shape(each))}" for each in parts.entries if each != ending))
        parts.fail(ending, f"shape {list(parts.shape(ending))} beside {others}", "no such tensor in this format")
    builders = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed}
    try:
        return builders[settings.method](parts, settings)
    except (BackendError, InvalidParameterError) as error:
        raise InvalidFormatError(f"open model {parts.path}: tensor {parts.module}.weight: {error.message}") from None


def _num_groups(parts: StoredParts, num_inputs: int, group_size: int, beside: str) -> int:
    size = num_inputs if group_size == -1 else group_size
    if num_inputs % size:
        parts.fail(beside, f"{num_inputs} inputs", f"a multiple of the configuration's group_size {group_size}")
    return num_inputs // size


def _gptq(parts: StoredParts, settings: QuantizationSettings) -> GptqMatrix:
    rows, outputs = parts.matrix_shape("qweight")
    bits = settings.bits
    if rows * 32 % bits:
        parts.fail("qweight", f"shape {[rows, outputs]}", f"a multiple of {bits} rows for {bits} bits")
    inputs = rows * 32 // bits
    groups = 1 if settings.group_size == -1 else -(-inputs // settings.group_size)
    words = parts.typed("qweight", ("I32", "U32"))
    zeros = parts.array("qzeros", ("I32", "U32"), (groups, -(-outputs * bits // 32)), "qweight")
    scales = parts.scales("scales", (groups, outputs), "qweight")
    g_idx = None
    if "g_idx" in parts.entries or settings.act_order:
        g_idx = parts.array("g_idx", ("I32",), (inputs,), "qweight")
    weights = GptqWeights(_signed(words), _signed(zeros), scales, g_idx, bits, settings.group_size, settings.version)
    try:
        gptq_groups(weights)
    except InvalidParameterError as error:
        parts.fail("g_idx", error.message, f"rows of {parts.module}.scales {list(scales.shape)}")
    return GptqMatrix(weights)


def _awq(parts: StoredParts, settings: QuantizationSettings) -> AwqMatrix:
    inputs, words = parts.matrix_shape("qweight")
    groups = _num_groups(parts, inputs, settings.group_size, "qweight")
    packed = parts.typed("qweight", ("I32", "U32"))
    zeros = parts.array("qzeros", ("I32", "U32"), (groups, words), "qweight")
    scales = parts.scales("scales", (groups, words * 8), "qweight")
    return AwqMatrix(AwqWeights(_signed(packed), _signed(zeros), scales, settings.group_size))


def _fp8(parts: StoredParts, settings: QuantizationSettings) -> Fp8Matrix:
    shape = parts.matrix_shape("weight")
    codes = parts.typed("weight", tuple(_FP8))
    ending = "weight_scale_inv" if "weight_scale_inv" in parts.entries else "weight_scale"
    if settings.block is not None:
        blocks = tuple(-(-extent // side) for extent, side in zip(shape, settings.block))
        scale = parts.scales("weight_scale_inv" if ending not in parts.entries else ending, blocks, "weight")
        if scale.size > 1 and any(
            count > 1 and side != found
            for count, side, found in zip(blocks, settings.block, fp8_block(scale.shape, shape))
        ):
            raise UnsupportedError(
                f"open model {parts.path}: tensor {parts.module}.weight: got blocks of {list(settings.block)} for "
                f"shape {list(shape)}, expected the powers of two that {list(scale.shape)} scales give"
            )
    else:
        scale = _row_scales(parts, ending, shape)
    return Fp8Matrix(codes.view(np.uint8), scale, "e4m3" if parts.entries["weight"].dtype == "F8_E4M3" else "e5m2")


def _row_scales(parts: StoredParts, ending: str, shape: tuple[int, int]) -> Array:
    """One scale for the tensor, one a row, or one a block, whatever is stored."""
    entry = parts.entries.get(ending)
    if entry is not None and entry.shape not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
        try:
            fp8_block(entry.shape, shape)
        except BackendError:
            parts.fail(ending, f"shape {list(entry.shape)}", f"[1], {[shape[0], 1]} or blocks of weight {list(shape)}")
    return parts.scales(ending, entry.shape if entry is not None else (shape[0], 1), "weight")


def _compressed(parts: StoredParts, settings: QuantizationSettings) -> QuantMatrix:
    if settings.format == "float-quantized":
        return _fp8(parts, settings)
    if "weight_g_idx" in parts.entries:
        parts.fail(
            "weight_g_idx", f"shape {list(parts.shape('weight_g_idx'))}", "no order of inputs: it is not offered"
        )
    if settings.format == "int-quantized":
        return _integers(parts, settings)
    rows, words = parts.matrix_shape("weight_packed")
    bits = settings.bits
    columns = words * 32 // bits
    if "weight_shape" in parts.entries:
        said = [int(each) for each in parts.array("weight_shape", ("I32", "I64"), (2,), "weight_packed")]
        if said[0] != rows or not columns - 32 // bits < said[1] <= columns or (bits == 4 and said[1] % 2):
            parts.fail("weight_shape", f"{said}", f"{[rows, columns]} beside weight_packed {[rows, words]}")
        columns = said[1]
    groups = _num_groups(parts, columns, settings.group_size, "weight_packed")
    packed = parts.typed("weight_packed", ("I32",)).view(np.uint8)[:, : columns * bits // 8]
    scales = parts.scales("weight_scale", (rows, groups), "weight_packed").astype(np.float32)
    if "weight_zero_point" in parts.entries:
        shape = (-(-rows * bits // 32), groups)
        stored = parts.array("weight_zero_point", ("I32",), shape, "weight_packed")
        zeros = unpack_words(stored, bits, rows, axis=0)
    else:  # both sides are kept without a sign, 2**(bits - 1) higher
        zeros = np.full((rows, groups), 1 << (bits - 1), np.uint8)
    return GroupMatrix(GroupWeights(packed, scales, zeros, 4 if bits == 4 else 8, settings.group_size))


def _integers(parts: StoredParts, settings: QuantizationSettings) -> GroupMatrix:
    """One signed integer a byte, whatever the number of bits."""
    rows, columns = parts.matrix_shape("weight")
    quanta = parts.typed("weight", ("I8",))
    groups = _num_groups(parts, columns, settings.group_size, "weight")
    entry = parts.entries.get("weight_scale")
    shape = (1,) if entry is not None and entry.shape in ((), (1,)) else (rows, groups)
    scales = parts.scales("weight_scale", entry.shape if shape == (1,) and entry else shape, "weight")
    spread = np.broadcast_to(scales.reshape(-1, 1) if shape == (1,) else scales, (rows, groups)).astype(np.float32)
    zeros = None
    if "weight_zero_point" in parts.entries:
        zeros = parts.array("weight_zero_point", ("I8",), scales.shape, "weight_scale")
        zeros = np.broadcast_to(zeros.reshape(-1, 1) if shape == (1,) else zeros, (rows, groups))
    return GroupMatrix(GroupWeights(quanta, spread, zeros, 8, settings.group_size))


def _signed(words: Array) -> NDArray[np.int32]:
    return words.view(np.int32)
