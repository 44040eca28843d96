"""Everything that is wrong with settings and the configuration they point at, each with its place and a way out.

Clauses: MB-VALIDATE-1..5 (specs/model_builder.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.builder.configuration import decoder_config, model_type_of
from ferrum_ref.builder.places import CONFIG, WEIGHT_FILES, place_of
from ferrum_ref.builder.settings import BUILD_DTYPES, CONFIG_KEYS, weight_quantization
from ferrum_ref.errors import ConfigError, FerrumError, InvalidFormatError, UnsupportedError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.interfaces.model_builder import ValidationIssue, ValidationSeverity
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.models import ModelConfig, ModelSource, ModelType
from ferrum_ref.types.parity_mode import ParityMode

_REQUIRED: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_SPELLED: Final[Mapping[str, str]] = MappingProxyType(
    {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
)
_FIELD: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*): got ")
_MAX_ISSUES: Final = 32

Finding = ValidationIssue
_WARNING, _ERROR, _CRITICAL = ValidationSeverity.Warning, ValidationSeverity.Error, ValidationSeverity.Critical


def find_issues(config: ModelConfig, parity_mode: ParityMode = ParityMode.REFERENCE) -> list[ValidationIssue]:
    """All findings, the settings' before the configuration's; empty means that a build may begin.  Never raises.

    [MB-VALIDATE-1..5]  Reads config.json where model_path is local.
    """
    issues = list(_settings(config))
    if not config.model_path:
        return issues
    found = config.extra_config.get("config")
    if found is None:
        try:
            place = place_of(ModelSource.Local(config.model_path))
            if place.gguf is not None:
                with open_checkpoint(place.gguf) as checkpoint:
                    return [*issues, *_against(config, checkpoint.config)]
            found = read_json_object((place.directory or Path()) / CONFIG)
        except FerrumError as error:
            fix = f"point model_path at a directory with {CONFIG} and weights, or at a GGUF file"
            return [*issues, Finding(_CRITICAL, "files", error.message, fix, "ModelConfig.model_path")]
        issues += _files(config, place.directory, place.weights)
    if not isinstance(found, Mapping):
        fix = "give the object that config.json would hold"
        said = f"got {type(found).__name__}"
        return [*issues, Finding(_CRITICAL, "settings", said, fix, "ModelConfig.extra_config.config")]
    issues += architecture_issues(found, parity_mode)
    if not any(issue.config_path.startswith("$") for issue in issues):
        issues += _against(config, decoder_config(found, CONFIG, parity_mode))
    return issues


def require_sound(issues: list[ValidationIssue]) -> None:
    """Raises UnsupportedError or ConfigError for the worst finding, unless all are warnings.  [MB-VALIDATE-3]"""
    bad = [issue for issue in issues if issue.severity > _WARNING]
    if not bad:
        return
    worst = max(bad, key=lambda issue: issue.severity)
    others = f" ({len(bad) - 1} more)" if len(bad) > 1 else ""
    fix = f"; {worst.suggested_fix}" if worst.suggested_fix else ""
    message = f"build: {worst.config_path}: {worst.description}{fix}{others}"
    raise UnsupportedError(message) if worst.category == "unsupported" else ConfigError(message)


def architecture_issues(config: Mapping[str, Any], parity_mode: ParityMode) -> list[ValidationIssue]:
    """Every field of config.json that is missing, impossible, or more than the decoder does. Pure.  [MB-VALIDATE-4]

    A field that is refused is taken out, and the rest is read again, until nothing is refused.
    """
    issues = [*_sizes(config), *_relations(config)]
    trial = dict(config)
    for issue in issues:
        trial.pop(issue.config_path.removeprefix("$."), None)
    if any(issue.config_path.removeprefix("$.") in _REQUIRED for issue in issues):
        trial = {**_plausible(trial), **trial}
        if any(issue.config_path == "$.num_attention_heads" for issue in issues):
            trial.pop("num_key_value_heads", None)  # its relation to what is not known says nothing
    seen = {issue.config_path for issue in issues}
    while len(issues) < _MAX_ISSUES:
        try:
            decoder_config(trial, CONFIG, parity_mode)
            return issues
        except (InvalidFormatError, UnsupportedError, ConfigError) as error:
            found = _FIELD.search(error.message)
            name = _SPELLED.get(found[1], found[1]) if found else ""
            path = f"$.{name}" if name else "$"
            if path not in seen:
                issues.append(_refusal(error, name, path))
            seen.add(path)
            top = name.split(".")[0]
            if top == "model_type" or top not in trial:
                return issues
            del trial[top]
    return issues


def _refusal(error: FerrumError, name: str, path: str) -> ValidationIssue:
    unsupported = isinstance(error, UnsupportedError)
    expected = error.message.rpartition("expected ")[2] if "expected " in error.message else None
    fix = f"set {name} to {expected}" if expected and name else None
    if name == "model_type":
        fix = "choose a model of a supported family; see supported_model_types()"
    said = error.message.partition(": ")[2] or error.message
    severity, category = (_CRITICAL, "unsupported") if unsupported else (_ERROR, "architecture")
    return Finding(severity, category, said, fix, path)


def _settings(config: ModelConfig) -> Iterator[ValidationIssue]:
    def issue(name: str, said: str, fix: str, severity: ValidationSeverity = _ERROR, kind: str = "settings") -> Finding:
        return Finding(severity, kind, said, fix, f"ModelConfig.{name}")

    if not config.model_path:
        yield issue("model_path", "got an empty path", "say where the model lies", _CRITICAL)
    for name in ("max_batch_size", "max_sequence_length", "tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(config, name) == 0:
            yield issue(name, "got 0, expected at least 1", f"set {name} to 1 or more")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (getattr(config, name) or 1) > 1:
            yield issue(name, "a build has one device", f"set {name} to 1 or None", kind="unsupported")
    if config.dtype not in BUILD_DTYPES:
        yield issue("dtype", f"got {config.dtype.name}, expected FP32, FP16 or BF16", "set dtype to FP32")
    if config.quantization is not None:
        try:
            weight_quantization(config.quantization)
        except UnsupportedError as error:
            yield issue("quantization", error.message, "set quantization to None", kind="unsupported")
    for name, value in config.extra_config.items():
        if name not in CONFIG_KEYS:
            yield issue(f"extra_config.{name}", "this builder does not read it", "remove it", _WARNING)
        elif name != "config" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield issue(f"extra_config.{name}", f"got {value!r:.80}", "give a whole number of 1 or more")


def _files(config: ModelConfig, directory: Path | None, weights: str | None) -> Iterator[ValidationIssue]:
    names = (weights,) if weights else WEIGHT_FILES
    if directory is not None and not any((directory / name).is_file() for name in names):
        said = f"got none of {', '.join(names)} in {directory}"
        yield Finding(_ERROR, "files", said, "fetch the model again", "ModelConfig.model_path")


def _sizes(config: Mapping[str, Any]) -> Iterator[ValidationIssue]:
    for name in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = config.get(name)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            said = "it is missing" if value is None else f"got {value!r:.80}, expected a positive integer"
            yield Finding(_ERROR, "architecture", said, f"give the model's {name}", f"$.{name}")


def _relations(config: Mapping[str, Any]) -> Iterator[ValidationIssue]:
    heads, groups, hidden, head_dim = (
        config.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    )
    is_size = [isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in (heads, groups, hidden)]
    if is_size[0] and is_size[1] and heads % groups:  # type: ignore[operator]
        divisors = [str(n) for n in range(1, min(heads, 4096) + 1) if heads % n == 0]  # type: ignore[operator,type-var]
        said = f"got {groups}, which does not divide the {heads} query heads"
        yield Finding(_ERROR, "architecture", said, f"set it to one of {', '.join(divisors)}", "$.num_key_value_heads")
    if head_dim is None and is_size[0] and is_size[2] and hidden % heads:  # type: ignore[operator]
        said = f"got {hidden}, which the {heads} heads do not divide, and no head_dim"
        yield Finding(_ERROR, "architecture", said, "give head_dim, or a hidden_size that divides", "$.hidden_size")


def _plausible(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that fit together, for reading the rest of a configuration that lacks some."""
    return dict.fromkeys(_REQUIRED, 64) | {"num_attention_heads": 1, "head_dim": config.get("head_dim", 64)}


def _against(config: ModelConfig, found: DecoderConfig) -> Iterator[ValidationIssue]:
    """The settings beside the model they are for.  [MB-VALIDATE-5]"""
    if config.max_sequence_length > found.max_position_embeddings:
        yield Finding(
            _WARNING, "settings",
            f"got {config.max_sequence_length}, the model's context has {found.max_position_embeddings} tokens",
            f"set it to {found.max_position_embeddings}; the build shortens it to that",
            "ModelConfig.max_sequence_length",
        )  # fmt: skip
    actual = model_type_of(found.architecture)
    if config.model_type not in (ModelType.Custom("unknown"), ModelType.Custom(found.architecture), actual):
        yield Finding(
            _ERROR, "settings", f"got {config.model_type}, the model is {actual}", f"set it to {actual}",
            "ModelConfig.model_type",
        )  # fmt: skip
