"""Weights that GPTQ packed, read as the plain matrix they stand for.

    w[n, k] = (q[k, n] - (z[g(k), n] + offset)) * s[g(k), n]      g(k) = g_idx[k], else k // group_size

    X.qweight i32 [K*bits/32, N]   values along K, lowest bits first, as one stream of bits per column
    X.qzeros  i32 [G, N*bits/32]   the same along N          X.scales f16 [G, N]          X.g_idx i32 [K], optional

`offset` is 1 for checkpoint_format "gptq", whose writer stored zero - 1, and 0 for "gptq_v2" (D-53).  The result is
[N, K] as a linear layer's weight (D-76).  Clauses: WL-GPTQ-1..4.  Source: Frantar et al. 2022; AutoGPTQ, GPTQModel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidFormatError, ModelError, UnsupportedError
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.formats.elements import Array, StoredTensor
from ferrum_ref.weights.containers import Container, found

_BITS: Final = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What quantize_config.json says; `group_size` None is one group for all rows.  [WL-GPTQ-3]"""

    method: str = "gptq"
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool = False
    sym: bool = False
    checkpoint_format: str = "gptq"

    @property
    def zero_offset(self) -> int:
        return 0 if self.checkpoint_format == "gptq_v2" else 1


def gptq_settings(config: Mapping[str, Any], where: str) -> GptqSettings:
    """From quantize_config.json, or from config.json's `quantization_config` (D-75).  Pure.  [WL-GPTQ-3]

    The method is `quant_method`, `method`, or "gptq" when neither is there; a group_size of -1 is one group.
    Raises InvalidFormatError for values of the wrong kind, UnsupportedError for another method or format.
    """
    inner = config.get("quantization_config", config)
    if not isinstance(inner, dict):
        raise InvalidFormatError(f"read {where}: quantization_config: got {quoted(inner)}, expected an object")
    method = inner.get("quant_method", inner.get("method", "gptq"))
    if method != "gptq":
        raise UnsupportedError(f"read {where}: quant_method: got {quoted(method)}, expected gptq")
    form = inner.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"read {where}: checkpoint_format: got {quoted(form)}, expected gptq or gptq_v2")
    group = _integer(inner, "group_size", where, -1)
    if group != -1 and not 0 < group < 2**31:
        raise InvalidFormatError(f"read {where}: group_size: got {group}, expected -1 or a size")
    bits = _integer(inner, "bits", where, 0)
    if bits not in (0, *_BITS):
        raise UnsupportedError(f"read {where}: bits: got {bits}, expected one of {_BITS}")
    switches = {key: inner.get(key, False) for key in ("desc_act", "sym")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise InvalidFormatError(f"read {where}: {key}: got {quoted(value)}, expected true or false")
    return GptqSettings(method, bits or None, None if group == -1 else group, checkpoint_format=form, **switches)


def dequantize_gptq(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[Any],
    g_idx: NDArray[np.int32] | None,
    settings: GptqSettings,
) -> NDArray[np.float32]:
    """The float32 weight [N, K]; the formula of this page, in float32.  Pure.  [WL-GPTQ-1..2]

    Raises ModelError when the shapes do not belong together or g_idx names no group.
    """
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32 or scales.dtype.kind not in "fV":
        types = f"{qweight.dtype}, {qzeros.dtype}, {scales.dtype}"
        raise ModelError(f"dequantize GPTQ: got {types}, expected int32, int32 and floats")
    num_groups, num_out, bits, num_in = _layout(qweight, qzeros, scales, settings)
    groups = _groups(g_idx, num_in, num_groups, settings)
    quanta = _unpack(qweight.T, bits)[:, :num_in]  # [N, K]
    zeros = _unpack(qzeros, bits)[:, :num_out].astype(np.float32) + np.float32(settings.zero_offset)  # [G, N]
    scale = scales.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or NaN: that is the file's value
        return (quanta.astype(np.float32) - zeros[groups].T) * scale[groups].T


def packed_layers(names: Iterable[str]) -> list[str]:
    """Every X of which there is an X.qweight.  Pure."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


class GptqContainer(Container):
    """Another container, with one more tensor `X.weight` for every packed X.  [WL-GPTQ-4]"""

    def __init__(self, inner: Container, settings: GptqSettings) -> None:
        self.name, self.format = inner.name, inner.format
        self._inner, self._settings = inner, settings
        packed = inner.tensors()
        self._made: dict[str, StoredTensor] = {}
        for layer in packed_layers(packed):
            if f"{layer}.weight" in packed or not {f"{layer}.qzeros", f"{layer}.scales"} <= packed.keys():
                continue
            shape = self._shape(packed, layer)
            self._made[f"{layer}.weight"] = StoredTensor(f"{layer}.weight", shape, "F32", 4 * shape[0] * shape[1])

    def tensors(self) -> Mapping[str, StoredTensor]:
        return {**self._inner.tensors(), **self._made}

    def read(self, name: str, limit_bytes: int) -> Array:
        if name not in self._made:
            return self._inner.read(name, limit_bytes)
        found(self, self._made, name, limit_bytes)
        layer = name.removesuffix(".weight")
        parts = [self._inner.read(f"{layer}.{part}", limit_bytes) for part in ("qweight", "qzeros", "scales")]
        has_groups = f"{layer}.g_idx" in self._inner.tensors()
        groups = self._inner.read(f"{layer}.g_idx", limit_bytes) if has_groups else None
        return dequantize_gptq(parts[0], parts[1], parts[2], groups, self._settings)

    def extra(self) -> Mapping[str, Any]:
        return self._inner.extra()

    def _shape(self, packed: Mapping[str, StoredTensor], layer: str) -> tuple[int, int]:
        stored = [packed[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")]
        empty = [np.broadcast_to(np.zeros((), np.int32), each.shape) for each in stored]
        _, num_out, _, num_in = _layout(empty[0], empty[1], empty[2], self._settings)
        return num_out, num_in


def _layout(
    qweight: NDArray[Any], qzeros: NDArray[Any], scales: NDArray[Any], settings: GptqSettings
) -> tuple[int, int, int, int]:
    """(G, N, bits, K) of three arrays that fit together; the bits follow from the shapes, and must agree if given."""
    shapes = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
    if not qweight.ndim == qzeros.ndim == scales.ndim == 2 or 0 in (*qweight.shape, *scales.shape):
        raise ModelError(f"dequantize GPTQ: got {shapes}, expected [K*bits/32, N], [G, N*bits/32], [G, N]")
    num_groups, num_out = scales.shape
    bits = settings.bits or qzeros.shape[1] * 32 // num_out
    num_in = qweight.shape[0] * 32 // bits if bits in _BITS else 0
    fits = bits in _BITS and qweight.shape == (-(-num_in * bits // 32), num_out)
    if not fits or qzeros.shape != (num_groups, -(-num_out * bits // 32)):
        raise ModelError(
            f"dequantize GPTQ: got {shapes} at {bits} bits, expected [K*bits/32, N], [G, N*bits/32], [G, N]"
        )
    return num_groups, num_out, bits, num_in


def _groups(g_idx: NDArray[Any] | None, num_in: int, num_groups: int, settings: GptqSettings) -> NDArray[np.int64]:
    """The group of every input row."""
    if g_idx is not None:
        if g_idx.shape != (num_in,) or g_idx.min() < 0 or g_idx.max() >= num_groups:
            raise ModelError(
                f"dequantize GPTQ: g_idx: got shape {list(g_idx.shape)}, expected [{num_in}] below {num_groups}"
            )
        return g_idx.astype(np.int64)
    size = settings.group_size if settings.group_size is not None else -(-num_in // num_groups)
    if -(-num_in // size) != num_groups:
        raise ModelError(f"dequantize GPTQ: group_size: got {size} for {num_in} rows, expected {num_groups} groups")
    return np.arange(num_in) // size


def _unpack(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Rows of 32-bit words as rows of unsigned numbers of `bits` bits, lowest bits first across word borders."""
    stream = np.unpackbits(
        np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8), axis=-1, bitorder="little"
    )
    count = stream.shape[-1] // bits
    pieces = stream[:, : count * bits].reshape(len(words), count, bits)
    numbers: NDArray[np.uint8] = (pieces << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return numbers


def _integer(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidFormatError(f"read {where}: {key}: got {quoted(value)}, expected an integer")
    return value
