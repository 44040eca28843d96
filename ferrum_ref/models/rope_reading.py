"""Rotary settings from the fields of a config.json, in both spellings of transformers.

    4: rope_theta, rope_scaling {type | rope_type, factor, ...}, partial_rotary_factor, original_max_position_embeddings
    5: rope_parameters {rope_type, rope_theta, factor, ...}, in Gemma 3 one such object for each layer type

Clauses: MD-CONFIG-5, LM-ROPE-3..9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config import DEFAULT_ROPE_THETA, LAYER_TYPES, quoted
from ferrum_ref.models.config_fields import finite_number, positive_number, size
from ferrum_ref.models.config_hf import HfFields
from ferrum_ref.models.rope_config import RopeSettings

ALL_KINDS: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_KNOWN: Final = frozenset(
    {
        "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
        "long_factor", "low_freq_factor", "high_freq_factor", "short_mscale", "long_mscale",
    }
)  # fmt: skip


def rope_fields(
    fields: HfFields,
    head_dim: int,
    *,
    kinds: tuple[str, ...] = ALL_KINDS,
    partial: float | None = None,
    theta: float | None = None,
) -> dict[str, Any]:
    """`rope_theta` and, unless it is the plain table of whole heads, `rope`.  [MD-CONFIG-5]

    `partial`: the share of a head that is turned where rope_parameters does not say (None: whole heads only); `theta`:
    the family's own spelling of the base, if there. Raises ConfigError, UnsupportedError.
    """
    field, parameters = _parameters(fields)
    if any(isinstance(parameters.get(kind), Mapping) for kind in LAYER_TYPES):
        fields.refuse(field, "one set per layer type", "one for all layers")
    bases = {"rope_theta": fields.get("rope_theta"), f"{field}.rope_theta": parameters.get("rope_theta")}
    for other in ("rope_parameters", "rope_scaling"):
        beside = fields.get(other)
        if other != field and isinstance(beside, Mapping):
            bases[f"{other}.rope_theta"] = beside.get("rope_theta")
    found = {name: base for name, base in bases.items() if base is not None}
    values = list(found.values())
    if any(base != values[0] for base in values[1:]):
        raise ConfigError(f"rope_theta: got {quoted(found)}, expected one value")
    base = values[0] if values else DEFAULT_ROPE_THETA if theta is None else theta
    settings = rope_settings(fields, field, {**parameters, "rope_theta": base}, head_dim, kinds, partial)
    if settings.kind == "default" and settings.rotary_dim == head_dim:
        return {"rope_theta": settings.theta}
    return {"rope_theta": settings.theta, "rope": settings}


def _parameters(fields: HfFields) -> tuple[str, Mapping[str, Any]]:
    """The object that transformers goes by, and its name: rope_scaling if there is any, else rope_parameters."""
    found: dict[str, Mapping[str, Any]] = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = fields.get(field)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{field}: got {quoted(value)}, expected an object or null")
        if value:
            found[field] = value
    kinds = {_kind_of(value) for value in found.values()}
    if len(kinds) > 1:
        raise ConfigError(f"rope_scaling: got {quoted(found['rope_scaling'])}, but rope_parameters says otherwise")
    return next(iter(found.items())) if found else ("rope_parameters", {})


def _kind_of(parameters: Mapping[str, Any]) -> Any:
    kind = parameters.get("rope_type", parameters.get("type"))
    return "default" if kind is None else kind


def rope_settings(
    fields: HfFields,
    field: str,
    parameters: Mapping[str, Any],
    head_dim: int,
    kinds: tuple[str, ...] = ALL_KINDS,
    partial: float | None = None,
) -> RopeSettings:
    """One object of rotary parameters, called `field`.  [MD-CONFIG-5]  Raises ConfigError, UnsupportedError."""
    kind = _kind_of(parameters)
    if not isinstance(kind, str) or kind not in kinds:
        fields.refuse(field, kind, f"one of {', '.join(kinds)}, or absent")
    for name, value in parameters.items():
        if name not in _KNOWN and value is not None:
            fields.refuse(f"{field}.{name}", value, "it absent")
    share = parameters.get("partial_rotary_factor")
    if partial is None and share not in (None, 1):
        fields.refuse(f"{field}.partial_rotary_factor", share, "1")
    whole = 1.0 if partial is None else partial
    turned = int(head_dim * (whole if share is None else positive_number(share, f"{field}.partial_rotary_factor")))
    if turned % 2:
        name = "head_dim" if turned == head_dim else "partial_rotary_factor"
        found = turned if turned == head_dim else f"{quoted(share)}, which turns {turned} of {head_dim} entries"
        raise ConfigError(f"{name}: got {found}, expected an even number (rotary pairs)")
    given: dict[str, Any] = {"kind": kind, "theta": parameters["rope_theta"], "rotary_dim": turned}
    if kind in ("linear", "dynamic", "llama3"):
        given["factor"] = _need(parameters, field, "factor")
    if kind == "dynamic":
        given["original_positions"] = fields.size("max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3"):
        given["original_positions"] = _original(fields, parameters)
    if kind == "llama3":
        given |= {name: _need(parameters, field, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        given |= _yarn(fields, parameters, given["original_positions"])
    if kind == "longrope":
        given |= _longrope(fields, field, parameters, given["original_positions"])
    return RopeSettings(**given)


def _need(parameters: Mapping[str, Any], field: str, name: str) -> Any:
    if parameters.get(name) is None:
        raise ConfigError(f"{field}.{name}: got nothing, expected a value")
    return parameters[name]


def _original(fields: HfFields, parameters: Mapping[str, Any]) -> int:
    """The context before scaling: the top-level field first, then the object's, then the whole context."""
    outer = fields.get("original_max_position_embeddings")
    inner = parameters.get("original_max_position_embeddings")
    found = outer if outer is not None else inner if inner is not None else fields.size("max_position_embeddings")
    return size(found, "original_max_position_embeddings")


def _ratio(fields: HfFields, parameters: Mapping[str, Any], original: int) -> float:
    factor = parameters.get("factor")
    if factor is None:
        return fields.size("max_position_embeddings") / original
    return positive_number(factor, "factor")


def _yarn(fields: HfFields, parameters: Mapping[str, Any], original: int) -> dict[str, Any]:
    factor = _ratio(fields, parameters, original)
    attention = parameters.get("attention_factor")
    if attention is None:
        one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if one and all_dim:
            attention = _mscale(factor, finite_number(one, "mscale")) / _mscale(
                factor, finite_number(all_dim, "mscale_all_dim")
            )
        else:
            attention = _mscale(factor, 1.0)
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"truncate: got {quoted(truncate)}, expected true or false")
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "truncate": truncate,
    }


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(fields: HfFields, field: str, parameters: Mapping[str, Any], original: int) -> dict[str, Any]:
    factor = _ratio(fields, parameters, original)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        values = _need(parameters, field, name)
        if not isinstance(values, list):
            raise ConfigError(f"{field}.{name}: got {quoted(values)}, expected a list of numbers")
        factors[f"{name}s"] = tuple(positive_number(value, f"{field}.{name}") for value in values)
    return {"factor": factor, "attention_factor": attention, **factors}
