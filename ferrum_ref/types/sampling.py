"""Generation parameters of one request, named presets, special tokens, and why a generation ended.

Upstream: `ferrum_types::sampling`.  Clauses: TY-SAMPLING-1..6 (specs/types.md).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ferrum_ref.errors import InvalidParameterError, RequestValidationError
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.record import F32, U8, U64, Record, Usize


class Priority(enum.IntEnum):
    """Queue priority of a request; larger is more urgent."""

    Low = 0
    Normal = 1
    High = 2
    Critical = 3


class FinishReason(enum.Enum):
    """Why a generation ended."""

    Length = "Length"
    Stop = "Stop"
    EOS = "EOS"
    Cancelled = "Cancelled"
    Error = "Error"
    ContentFilter = "ContentFilter"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Constraint on the output: `ResponseFormat.Text` (default), `.JsonObject`, or `.JsonSchema(schema)`."""

    type: Literal["Text", "JsonObject", "JsonSchema"] = "Text"
    schema: str | None = None

    Text: ClassVar[ResponseFormat]
    JsonObject: ClassVar[ResponseFormat]

    def __post_init__(self) -> None:
        if self.type not in ("Text", "JsonObject", "JsonSchema"):
            raise InvalidParameterError(
                f"ResponseFormat: unknown type {self.type!r}; expected Text, JsonObject, JsonSchema"
            )
        if (self.schema is not None) != (self.type == "JsonSchema"):
            raise InvalidParameterError(f"ResponseFormat: a schema goes with JsonSchema only, got {self!r}")

    @staticmethod
    def JsonSchema(schema: str) -> ResponseFormat:
        return ResponseFormat("JsonSchema", schema)


ResponseFormat.Text = ResponseFormat("Text")
ResponseFormat.JsonObject = ResponseFormat("JsonObject")


@dataclass(frozen=True, slots=True)
class MirostatParams(Record):
    """Mirostat settings: version 1 or 2, target surprise in bits, learning rate."""

    mode: U8
    tau: F32
    eta: F32


@dataclass(frozen=True, slots=True)
class SamplingParams(Record):
    """How tokens are chosen and when generation stops.  [TY-SAMPLING-1..3; D-45]"""

    max_tokens: Usize = 512
    temperature: F32 = 1.0
    top_p: F32 = 1.0
    top_k: Usize | None = None
    repetition_penalty: F32 = 1.0
    presence_penalty: F32 = 0.0
    frequency_penalty: F32 = 0.0
    stop_sequences: list[str] = field(default_factory=list)
    seed: U64 | None = None
    min_p: F32 | None = None
    tfs: F32 | None = None
    typical_p: F32 | None = None
    mirostat: MirostatParams | None = None
    response_format: ResponseFormat = field(default=ResponseFormat.Text, metadata={"json_default": True})

    @staticmethod
    def greedy() -> SamplingParams:
        """Temperature 0, everything else at its default.  [TY-SAMPLING-1]"""
        return SamplingParams(temperature=0.0, top_p=1.0, top_k=None)

    @staticmethod
    def with_temperature(temperature: float) -> SamplingParams:
        """The defaults with that temperature.  [TY-SAMPLING-1]"""
        return SamplingParams(temperature=temperature)

    def validate(self, *, parity_mode: ParityMode = ParityMode.REFERENCE) -> None:
        """Every parameter lies in its domain; NaN lies in none.  [TY-SAMPLING-2..3, TY-SAMPLING-6; D-45]

        Under ParityMode.UPSTREAM only what upstream refuses is refused. Pure.
        Raises RequestValidationError naming the parameter, its domain and what it was.
        """
        if parity_mode is ParityMode.UPSTREAM:
            self._validate_as_upstream()
            return
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1")
        _check_number("temperature", self.temperature, lambda x: x >= 0.0, "finite and >= 0")
        _check_number("top_p", self.top_p, lambda x: 0.0 < x <= 1.0, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None or >= 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0.0, "finite and > 0")
        _check_number("presence_penalty", self.presence_penalty, lambda x: -2.0 <= x <= 2.0, "in [-2, 2]")
        _check_number("frequency_penalty", self.frequency_penalty, lambda x: -2.0 <= x <= 2.0, "in [-2, 2]")
        for name in ("min_p", "tfs", "typical_p"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, lambda x: 0.0 < x <= 1.0, "None or in (0, 1]")
        for text in self.stop_sequences:
            _check("stop_sequences", text, isinstance(text, str) and text != "", "texts that are not empty")
        if self.mirostat is not None:
            _check("mirostat.mode", self.mirostat.mode, self.mirostat.mode in (1, 2), "1 or 2")
            _check_number("mirostat.tau", self.mirostat.tau, lambda x: x > 0.0, "finite and > 0")
            _check_number("mirostat.eta", self.mirostat.eta, lambda x: x > 0.0, "finite and > 0")

    def _validate_as_upstream(self) -> None:
        """Comparisons as upstream writes them, by what is refused: a NaN is never refused.  [TY-SAMPLING-6; D-45]"""
        _check("temperature", self.temperature, not self.temperature < 0.0, ">= 0")
        _check("top_p", self.top_p, not (self.top_p <= 0.0 or self.top_p > 1.0), "in (0, 1]")
        _check("top_k", self.top_k, self.top_k != 0, "None or >= 1")
        _check("repetition_penalty", self.repetition_penalty, not self.repetition_penalty <= 0.0, "> 0")
        for name in ("min_p", "tfs", "typical_p"):
            value = getattr(self, name)
            _check(name, value, value is None or not (value <= 0.0 or value > 1.0), "None or in (0, 1]")


def _check(name: str, value: object, good: bool, domain: str) -> None:
    if not good:
        raise RequestValidationError(f"SamplingParams: {name} must be {domain}, got {value!r}")


def _check_number(name: str, value: object, inside: object, domain: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _check(name, value, number and math.isfinite(value) and inside(value), domain)  # type: ignore[arg-type,operator]


def _standard_presets() -> dict[str, SamplingParams]:
    return {
        "greedy": SamplingParams.greedy(),
        "creative": SamplingParams(temperature=1.2, top_p=0.9, top_k=50, repetition_penalty=1.1),
        "precise": SamplingParams(temperature=0.3, top_p=0.95, top_k=20, repetition_penalty=1.05),
    }


@dataclass(slots=True)
class SamplingPresets:
    """Sampling parameters by name: greedy, creative and precise by default.  [TY-SAMPLING-4]"""

    presets: dict[str, SamplingParams] = field(default_factory=_standard_presets)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of a vocabulary's special tokens; None where the vocabulary has none."""

    bos_token: TokenId | None = None
    eos_token: TokenId | None = None
    unk_token: TokenId | None = None
    pad_token: TokenId | None = None
    sep_token: TokenId | None = None
    cls_token: TokenId | None = None
    mask_token: TokenId | None = None
