"""The architectures of GGUF files that decoders are read from, and what each leaves unsaid.  Clause: MD-CONFIG-6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

_GEMMA: Final[Mapping[str, Any]] = MappingProxyType(
    {"hidden_act": "gelu_tanh", "tensor_layout": "gemma", "post_norms": True}  # norms are stored with their 1 added
)
_GPT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "hidden_act": "gelu_tanh",  # what llama.cpp computes: the file does not say
        "norm": "layer",
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """One `general.architecture`: its family, what it fixes, and the keys it reads beyond the common ones."""

    family: str
    fixed: Mapping[str, Any]
    knows: frozenset[str] = frozenset()
    scalings: tuple[str, ...] = ("linear", "yarn")
    turns_parts: bool = False  # rope.dimension_count may be less than a head
    pattern: int = 0  # of so many layers all but the last slide; 0: all do
    large_layers: int = 0  # the model of so many layers scales by hidden size / heads in place of the head size


ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = MappingProxyType(
    {
        "llama": GgufArchitecture(family="llama", fixed=MappingProxyType({})),
        "qwen2": GgufArchitecture(family="qwen2", fixed=MappingProxyType({})),
        "qwen3": GgufArchitecture(family="qwen3", fixed=MappingProxyType({"qk_norm": True})),
        "gemma2": GgufArchitecture(
            family="gemma2",
            fixed=_GEMMA,
            knows=frozenset({"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}),
            scalings=(),
            pattern=2,
            large_layers=46,
        ),
        "gemma3": GgufArchitecture(
            family="gemma3_text",
            fixed=MappingProxyType({**_GEMMA, "qk_norm": True}),
            knows=frozenset({"attention.sliding_window", "final_logit_softcapping"}),
            scalings=("linear",),
            pattern=6,
            large_layers=62,
        ),
        "phi3": GgufArchitecture(
            family="phi3",
            fixed=MappingProxyType({"tensor_layout": "phi3"}),
            knows=frozenset({"attention.sliding_window"}),
            scalings=("longrope",),
            turns_parts=True,
        ),
        "gpt2": GgufArchitecture(
            family="gpt2",
            fixed=MappingProxyType({**_GPT, "tensor_layout": "gpt2-rows", "learned_positions": True}),
            scalings=(),
        ),
        "gptneox": GgufArchitecture(
            family="gpt_neox",
            fixed=MappingProxyType({**_GPT, "tensor_layout": "gpt_neox-rows"}),
            knows=frozenset({"use_parallel_residual"}),
            scalings=(),
            turns_parts=True,
        ),
    }
)
