"""What can be built, found out by asking the models room about a small configuration of each family.

So the answer stays true when the models room learns a family.  Clauses: MB-INFO-1..2 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.builder.configuration import model_type_of
from ferrum_ref.errors import FerrumError
from ferrum_ref.interfaces.model_builder import (
    BuilderCapabilities,
    BuilderInfo,
    ModelArchitecture,
    ModelArchitectureFamily,
    OptimizationTechnique,
)
from ferrum_ref.interfaces.weights import WeightFormat
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.types.models import ModelType

# model_type -> the class in `architectures`, and what its config.json always carries beside the common sizes
_FAMILIES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "llama": ("LlamaForCausalLM", {}),
        "mistral": ("MistralForCausalLM", {"sliding_window": None}),
        "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": False}),
        "qwen3": ("Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}),
        "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 1.0}),
        "gemma": ("GemmaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
        "gemma2": ("Gemma2ForCausalLM", {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32}),
    }
)
_SIZES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
)


def supported_architectures() -> list[str]:
    """model_type of every family that the decoder accepts. Pure.  [MB-INFO-1]"""
    return [name for name in _FAMILIES if _is_accepted(name)]


def supported_model_types() -> list[ModelType]:
    """The same as the types crate's families, each once. Pure.  [MB-INFO-1]"""
    return list(dict.fromkeys(model_type_of(name) for name in supported_architectures()))


def builder_info(name: str) -> BuilderInfo:
    """Facts about the builder. Pure.  [MB-INFO-2]"""
    return BuilderInfo(
        name=name,
        version=_version(),
        supported_architectures=[
            ModelArchitecture(
                _FAMILIES[each][0],
                ModelArchitectureFamily.Transformer,
                [each],
                ["causal attention", "rotary positions"],
            )
            for each in supported_architectures()
        ],
        supported_weight_formats=[WeightFormat.SafeTensors, WeightFormat.PyTorch, WeightFormat.Gguf],
        supported_optimizations=[
            OptimizationTechnique.OperatorFusion,
            OptimizationTechnique.ConstantFolding,
            OptimizationTechnique.DeadCodeElimination,
            OptimizationTechnique.Quantization,
        ],
        capabilities=BuilderCapabilities(
            max_model_size=None,
            supports_dynamic_shapes=True,
            supports_custom_ops=True,
            supports_mixed_precision=False,
            supports_model_parallelism=False,
            supports_parallel_build=True,
            supports_incremental_build=True,
        ),
    )


def _is_accepted(name: str) -> bool:
    architecture, extra = _FAMILIES[name]
    try:
        DecoderConfig.from_hf({**_SIZES, **extra, "model_type": name, "architectures": [architecture]})
    except FerrumError:
        return False
    return True


def _version() -> str:
    try:
        return version("ferrum-ref")
    except PackageNotFoundError:
        return "unknown"
