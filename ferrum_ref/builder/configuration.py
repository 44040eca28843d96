"""The configuration a build goes by: config.json as it is, or read the way upstream reads it.

Clauses: MB-UPSTREAM-1..2 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.models import ModelType
from ferrum_ref.types.parity_mode import ParityMode

# D-80: upstream's base where config.json names none; ours is 10000 for every family.
_UPSTREAM_THETA: Final[Mapping[str, float]] = MappingProxyType(
    {"llama": 500000.0, "qwen2": 1000000.0, "qwen3": 1000000.0, "mistral": 10000.0}
)
_UPSTREAM_ACTIVATIONS: Final = ("silu", "swish", "gelu", "gelu_new", "relu")
_TYPES: Final[Mapping[str, ModelType]] = MappingProxyType(
    {
        "llama": ModelType.Llama,
        "mistral": ModelType.Mistral,
        "qwen": ModelType.Qwen,
        "phi": ModelType.Phi,
        "gemma": ModelType.Gemma,
    }
)


def decoder_config(config: Mapping[str, Any], source: str, parity_mode: ParityMode) -> DecoderConfig:
    """The decoder's configuration. Pure.  [MB-UPSTREAM-1..2; D-80, D-81]

    UPSTREAM fills a missing rope_theta with the family's own base and takes an unknown activation for SiLU.
    Raises InvalidFormatError, UnsupportedError.
    """
    if parity_mode is ParityMode.UPSTREAM:
        config = _as_upstream(config)
    return DecoderConfig.from_hf(config, source)


def model_type_of(architecture: str) -> ModelType:
    """The types crate's family of an architecture; Custom for one it has no name for. Pure."""
    for family, kind in _TYPES.items():
        if architecture == family or architecture.rstrip("0123456789") == family:
            return kind
    return ModelType.Custom(architecture)


def _as_upstream(config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config)
    parameters = found.get("rope_parameters")
    has_theta = found.get("rope_theta") is not None or (
        isinstance(parameters, Mapping) and parameters.get("rope_theta") is not None
    )
    theta = _UPSTREAM_THETA.get(str(found.get("model_type")))
    if not has_theta and theta is not None:
        found["rope_theta"] = theta
    if found.get("hidden_act", "silu") not in _UPSTREAM_ACTIVATIONS:
        found["hidden_act"] = "silu"
    return found
