"""From token vectors to one vector: pooling and normalisation, as a checkpoint's sentence-transformers files say.

Clauses: FM-POOL-1..5 (specs/families.md).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.errors import ConfigError, FerrumIOError, InvalidFormatError, InvalidParameterError, UnsupportedError
from ferrum_ref.formats.json_file import parse_json_object, read_json_object
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import KernelOpsDispatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import flag, size


class Pooling(enum.Enum):
    """How token vectors become one."""

    MEAN = "mean"
    CLS = "cls"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"


_SQUARED_FLOOR: Final = 1e-24  # (1e-12)**2: the norm below which a vector counts as zero
_OLD_KEYS: Final[Mapping[str, Pooling]] = MappingProxyType(
    {
        "pooling_mode_cls_token": Pooling.CLS,
        "pooling_mode_mean_tokens": Pooling.MEAN,
        "pooling_mode_max_tokens": Pooling.MAX,
        "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    }
)
_NAMES: Final[Mapping[str, str]] = MappingProxyType({mode.value: key for key, mode in _OLD_KEYS.items()})


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """How a text becomes a vector.  [FM-POOL-1]  Raises InvalidParameterError for max_tokens < 1."""

    max_tokens: int
    pooling: Pooling = Pooling.MEAN
    normalize: bool = False
    lower_case: bool = False  # the text is lowered before the tokenizer sees it

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidParameterError(f"SentenceSettings: max_tokens must be >= 1, got {self.max_tokens}")

    @staticmethod
    def from_directory(directory: Path, num_positions: int) -> SentenceSettings:
        """What modules.json and the files it names say; mean without normalisation where there is none.  [FM-POOL-4..5]

        `num_positions` bounds max_tokens. Pure.
        Raises InvalidFormatError on a broken file, UnsupportedError on a module, pooling mode or default prompt that is
        not offered.
        """
        prompts = directory / "config_sentence_transformers.json"
        if prompts.exists() and read_json_object(prompts).get("default_prompt_name") is not None:
            raise UnsupportedError(f"read {prompts}: default_prompt_name: got a prompt, expected null or absent")
        modules = _modules(directory)
        pooling = _pooling(directory / modules["Pooling"] / "config.json") if "Pooling" in modules else Pooling.MEAN
        path = directory / "sentence_bert_config.json"
        given = read_json_object(path) if path.exists() else {}
        try:
            limit = given.get("max_seq_length")
            max_tokens = num_positions if limit is None else min(size(limit, "max_seq_length"), num_positions)
            lower_case = flag(given.get("do_lower_case", False), "do_lower_case")
        except ConfigError as error:
            raise InvalidFormatError(f"read {path}: {error.message}") from None
        return SentenceSettings(max_tokens, pooling, "Normalize" in modules, lower_case)


def pool(hidden: TensorRef, pooling: Pooling, backend: ComputeBackend) -> TensorRef:
    """One sequence's `[T, E]` as `[1, E]`; every row counts.  Pure.  [FM-POOL-2]"""
    num_tokens, width = hidden.shape()
    factory, ops = backend.tensor_factory(), backend.tensor_ops()
    if pooling is Pooling.CLS:
        return hidden.view((0, 0), (1, width))
    if pooling is Pooling.MAX:  # a choice among the numbers, no arithmetic
        return factory.from_numpy(hidden.to_numpy().max(axis=0, keepdims=True))
    ones = factory.ones((1, num_tokens), hidden.dtype(), hidden.device())
    total = ops.matmul(ones, hidden)
    divisor = float(num_tokens) if pooling is Pooling.MEAN else math.sqrt(num_tokens)
    return ops.div(total, factory.from_slice([divisor], (1,), hidden.dtype(), hidden.device()))


def normalized(rows: TensorRef, backend: ComputeBackend) -> TensorRef:
    """y = x / sqrt(sum(x**2) + 1e-24), row by row: length 1, and 0 for a row of zeros.  Pure.  [FM-POOL-3]"""
    width = rows.shape()[-1]
    dispatch = KernelOpsDispatch(backend.kernel_ops(), backend.tensor_ops())
    weight = backend.tensor_factory().from_slice([width**-0.5] * width, (width,), rows.dtype(), rows.device())
    return dispatch.rms_norm(rows, weight, _SQUARED_FLOOR / width)


def _modules(directory: Path) -> dict[str, str]:
    """Kind -> folder of each module after the transformer."""
    path = directory / "modules.json"
    if not path.exists():
        return {}
    wrapped = parse_json_object(b'{"modules": ' + _bytes_of(path) + b"}", str(path))  # the file holds a list
    listed = wrapped["modules"] if len(wrapped) == 1 else wrapped
    if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
        raise InvalidFormatError(f"read {path}: got {quoted(listed)}, expected a list of modules")
    kinds = [str(each.get("type")).rpartition(".")[2] for each in listed]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"read {path}: type: got {quoted(kinds)}, expected Transformer, Pooling and perhaps Normalize"
        )
    found: dict[str, str] = {}
    for kind, each in zip(kinds[1:], listed[1:], strict=True):
        folder = each.get("path")
        if not isinstance(folder, str) or Path(folder).name != folder or "\x00" in folder or folder == "..":
            raise InvalidFormatError(f"read {path}: path: got {quoted(folder)}, expected a plain folder name")
        found[kind] = folder
    return found


def _pooling(path: Path) -> Pooling:
    """The one mode that is switched on, as flags (older) or by name (newer)."""
    config: dict[str, Any] = read_json_object(path)
    named = config.get("pooling_mode")
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value] + (
        [] if named is None else [_NAMES.get(str(named), str(named))]
    )
    if len(set(chosen)) != 1 or chosen[0] not in _OLD_KEYS:
        raise UnsupportedError(f"read {path}: got {quoted(chosen)}, expected one of {', '.join(_OLD_KEYS)}")
    return _OLD_KEYS[chosen[0]]


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FerrumIOError(f"read {path}: {error.strerror or error}") from error
