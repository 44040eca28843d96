"""`quantization_config` of a config.json: which format the weights are in, or why it is not read.

Weights mean what their integers and scales say; that an engine may also quantise activations (`activation_scheme`,
`input_activations`) changes nothing here: activations stay floats, and `activations` says what the file asked for.
Clauses: MD-HFQ-1..2 (specs/model_files.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, NoReturn

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.kernels.quant_gptq import Version
from ferrum_ref.models.config import quoted

Method = Literal["gptq", "awq", "fp8", "compressed-tensors"]
_GPTQ_VERSIONS: Final[Mapping[str, Version]] = MappingProxyType({"gptq": "gptq", "gptq_v2": "gptq_v2"})
_PACKED, _INTEGERS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
COMPRESSED_FORMATS: Final = (_PACKED, _INTEGERS, _FLOATS, "naive-quantized")


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """What is needed to read the weights. `group_size` -1 is one group a row; `block` None is whatever scales say."""

    method: Method
    bits: int
    group_size: int = -1
    version: Version = "gptq"
    act_order: bool = False
    block: tuple[int, int] | None = None
    format: str = ""
    activations: str = "float"


def quantization_settings(config: Mapping[str, Any], source: str) -> QuantizationSettings | None:
    """The settings of a config.json, None where the weights are plain.  Pure.  [MD-HFQ-1]

    Raises UnsupportedError for a method, width or layout that is not offered, InvalidFormatError for values that make
    no sense; both name the field.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        _invalid(source, "", found, "an object")
    method = found.get("quant_method")
    if method == "mxfp4":  # gpt-oss: the experts' `_blocks` and `_scales` say all there is to say
        return None
    readers = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed}
    if method not in readers:
        raise UnsupportedError(
            f"read {source}: quantization_config.quant_method: got {quoted(method)}, expected one of "
            f"{', '.join((*readers, 'mxfp4'))}"
        )
    return readers[method](found, source)


def _gptq(found: Mapping[str, Any], source: str) -> QuantizationSettings:
    bits = _integer(found, "bits", source)
    if not 2 <= bits <= 8:
        _invalid(source, "bits", bits, "2 to 8")
    named = {found[key] for key in ("checkpoint_format", "format") if isinstance(found.get(key), str)} or {"gptq"}
    if len(named) > 1 or not named <= _GPTQ_VERSIONS.keys() or found.get("is_marlin_format"):
        got = "is_marlin_format" if found.get("is_marlin_format") else " and ".join(sorted(named))
        _unsupported(source, "checkpoint_format", got, "gptq or gptq_v2; convert the checkpoint")
    if found.get("dynamic"):
        _unsupported(source, "dynamic", found["dynamic"], "no settings of single modules")
    version = _GPTQ_VERSIONS[named.pop()]
    order = bool(found.get("desc_act", False))
    return QuantizationSettings("gptq", bits, _group_size(found, source), version, order)


def _awq(found: Mapping[str, Any], source: str) -> QuantizationSettings:
    bits = _integer(found, "bits" if "bits" in found else "w_bit", source)
    if bits != 4:
        _unsupported(source, "bits", bits, "4")
    layout = str(found.get("version") or found.get("format") or "gemm").lower()
    if layout != "gemm":
        _unsupported(source, "version", layout, "gemm; convert the checkpoint")
    if found.get("zero_point", True) is not True:
        _unsupported(source, "zero_point", found["zero_point"], "true: the gemm layout stores zero points")
    key = "group_size" if "group_size" in found else "q_group_size"
    return QuantizationSettings("awq", bits, _group_size(found, source, key))


def _fp8(found: Mapping[str, Any], source: str) -> QuantizationSettings:
    if (name := found.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        _unsupported(source, "fmt", name, "e4m3")
    scheme = f"fp8, {found.get('activation_scheme', 'dynamic')}"
    sides = found.get("weight_block_size")
    if sides is None:
        return QuantizationSettings("fp8", 8, activations=scheme)
    sound = isinstance(sides, list) and len(sides) == 2 and all(_is_count(side) for side in sides)
    if not sound:
        _invalid(source, "weight_block_size", sides, "two counts")
    if any(side & (side - 1) for side in sides):
        _unsupported(source, "weight_block_size", sides, "powers of two")
    return QuantizationSettings("fp8", 8, block=(sides[0], sides[1]), activations=scheme)


def _compressed(found: Mapping[str, Any], source: str) -> QuantizationSettings:
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
        _invalid(source, "config_groups", groups, "a group of settings")
    weights = [each.get("weights") for each in groups.values()]
    if not all(isinstance(each, dict) for each in weights) or any(each != weights[0] for each in weights):
        _unsupported(source, "config_groups", f"{len(weights)} groups", "one description of weights for all modules")
    first: Mapping[str, Any] = weights[0]
    layout, bits = found.get("format"), _integer(first, "num_bits", source)
    if layout not in COMPRESSED_FORMATS:
        _unsupported(source, "format", layout, f"one of {', '.join(COMPRESSED_FORMATS)}")
    kind = first.get("type", "int")
    if layout == "naive-quantized":
        layout = _FLOATS if kind == "float" else _INTEGERS
    if bits not in ((8,) if layout == _FLOATS else (4, 8)):
        _unsupported(source, "num_bits", bits, "8" if layout == _FLOATS else "4 or 8")
    if first.get("actorder") in ("group", True):
        _unsupported(source, "actorder", first["actorder"], "weight, static or none")
    asked = [each.get("input_activations") for each in groups.values()]
    activations = "float" if not any(asked) else "quantised"
    size = _group_size(first, source) if first.get("strategy") in ("group", "tensor_group") else -1
    return QuantizationSettings("compressed-tensors", bits, size, format=str(layout), activations=activations)


def _integer(found: Mapping[str, Any], key: str, source: str) -> int:
    value = found.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        _invalid(source, key, value, "an integer")
    return value


def _group_size(found: Mapping[str, Any], source: str, key: str = "group_size") -> int:
    size = _integer(found, key, source)
    if size != -1 and not _is_count(size):
        _invalid(source, key, size, "-1 or a positive number")
    return size


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _invalid(source: str, field: str, got: Any, expected: str) -> NoReturn:
    place = f"quantization_config.{field}".rstrip(".")
    raise InvalidFormatError(f"read {source}: {place}: got {quoted(got)}, expected {expected}")


def _unsupported(source: str, field: str, got: Any, expected: str) -> NoReturn:
    raise UnsupportedError(f"read {source}: quantization_config.{field}: got {quoted(got)}, expected {expected}")
