"""The decoder families, by the `model_type` of their config.json.  Clause: MD-CONFIG-4."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ferrum_ref.models.family import Family
from ferrum_ref.models.family_gemma import GEMMA2, GEMMA3
from ferrum_ref.models.family_gpt import GPT2, GPT_NEOX
from ferrum_ref.models.family_llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from ferrum_ref.models.moe_family import DEEPSEEK_V3, GPT_OSS, MIXTRAL, QWEN3_MOE

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": MISTRAL,
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "phi3": PHI3,
        "gemma2": GEMMA2,
        "gemma3_text": GEMMA3,
        "gpt2": GPT2,
        "gpt_neox": GPT_NEOX,
        "mixtral": MIXTRAL,
        "qwen3_moe": QWEN3_MOE,
        "deepseek_v3": DEEPSEEK_V3,
        "gpt_oss": GPT_OSS,
    }
)
