"""How a mixture of experts routes and what its experts look like, whichever configuration said it.

Clauses: LM-MOE-1..8 (specs/decoder_families.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ferrum_ref.errors import ConfigError
from ferrum_ref.models.config_fields import finite_number, flag, positive_number, size

SCORINGS: Final = ("softmax", "sigmoid")
MIXTRAL_EXPERTS: Final = 8
GPT_OSS_ALPHA: Final = 1.702
GPT_OSS_LIMIT: Final = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSettings:
    """One router and its experts; the same in every sparse layer.  [LM-MOE-1]

    Raises ConfigError, naming the field, on numbers that cannot belong together.
    """

    num_experts: int
    experts_per_token: int
    feed_forward_size: int  # of one expert
    scoring: str = "softmax"  # of the router's logits, over all experts
    normalised: bool = True  # the chosen experts' scores are divided by their sum
    scale: float = 1.0  # of the weights, last
    num_groups: int = 1  # experts compete within the best `num_chosen_groups` of these
    num_chosen_groups: int = 1
    has_correction: bool = False  # a bias that takes part in choosing only
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0  # feed-forward size of the expert that every token gets; 0: none
    clip_limit: float | None = None  # of the clipped SwiGLU; None: the plain one
    clip_alpha: float = GPT_OSS_ALPHA
    dense_layers: frozenset[int] = frozenset()  # layers with one plain feed-forward instead

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "feed_forward_size", "num_groups", "num_chosen_groups"):
            size(getattr(self, name), name)
        if self.scoring not in SCORINGS:
            raise ConfigError(f"scoring: got {self.scoring!r:.40}, expected one of {', '.join(SCORINGS)}")
        if self.num_experts % self.num_groups:
            raise ConfigError(f"n_group: got {self.num_groups}, expected a divisor of the {self.num_experts} experts")
        if self.num_groups > 1 and self.group_size < 2:
            raise ConfigError(
                f"n_group: got {self.num_groups}, expected at least 2 of the {self.num_experts} experts each"
            )
        if self.num_chosen_groups > self.num_groups:
            raise ConfigError(f"topk_group: got {self.num_chosen_groups}, expected at most n_group {self.num_groups}")
        if self.experts_per_token > self.num_chosen_groups * self.group_size:
            raise ConfigError(
                f"num_experts_per_tok: got {self.experts_per_token}, expected at most "
                f"{self.num_chosen_groups * self.group_size} of {self.num_experts} experts"
            )
        object.__setattr__(self, "scale", finite_number(self.scale, "routed_scaling_factor"))
        if self.clip_limit is not None:
            object.__setattr__(self, "clip_limit", positive_number(self.clip_limit, "swiglu_limit"))
        object.__setattr__(self, "clip_alpha", positive_number(self.clip_alpha, "swiglu_alpha"))

    @property
    def group_size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups

    def is_sparse(self, layer: int) -> bool:
        """Whether that layer has experts."""
        return layer not in self.dense_layers


def mixtral_moe(config: Mapping[str, Any]) -> MoeSettings:
    """From Mixtral's config.json: softmax over all experts, the chosen ones' scores sum to 1.  [LM-MOE-5]"""
    return MoeSettings(
        num_experts=_num_experts(config, MIXTRAL_EXPERTS),
        experts_per_token=size(config.get("num_experts_per_tok", 2), "num_experts_per_tok"),
        feed_forward_size=size(config.get("intermediate_size"), "intermediate_size"),
    )


def qwen3_moe(config: Mapping[str, Any]) -> MoeSettings:
    """From Qwen3-MoE's config.json.  [LM-MOE-6]

    A layer is dense if it is listed in mlp_only_layers or if decoder_sparse_step does not divide its number, from 1.
    """
    num_layers = size(config.get("num_hidden_layers"), "num_hidden_layers")
    step = size(config.get("decoder_sparse_step", 1), "decoder_sparse_step")
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        raise ConfigError(f"mlp_only_layers: got {listed!r:.80}, expected a list of layer numbers")
    skipped = {layer for layer in range(min(num_layers, 2**20)) if (layer + 1) % step}
    return MoeSettings(
        num_experts=_num_experts(config, 128),
        experts_per_token=size(config.get("num_experts_per_tok", 8), "num_experts_per_tok"),
        feed_forward_size=size(config.get("moe_intermediate_size", 768), "moe_intermediate_size"),
        normalised=flag(config.get("norm_topk_prob", False), "norm_topk_prob"),
        dense_layers=frozenset(listed) | skipped,
    )


def deepseek_moe(config: Mapping[str, Any]) -> MoeSettings:
    """From DeepSeek-V3's config.json: sigmoid scores, groups, a correction that only chooses.  [LM-MOE-7]"""
    for field, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        if config.get(field, only) != only:
            raise ConfigError(f"{field}: got {config[field]!r:.40}, expected {only!r}")
    feed_forward = size(config.get("moe_intermediate_size", 2048), "moe_intermediate_size")
    num_dense = config.get("first_k_dense_replace", 3)
    if not isinstance(num_dense, int) or isinstance(num_dense, bool) or not 0 <= num_dense < 2**20:
        raise ConfigError(f"first_k_dense_replace: got {num_dense!r:.40}, expected a number of layers")
    return MoeSettings(
        num_experts=size(_first(config, ("n_routed_experts", "num_local_experts"), 256), "n_routed_experts"),
        experts_per_token=size(config.get("num_experts_per_tok", 8), "num_experts_per_tok"),
        feed_forward_size=feed_forward,
        scoring="sigmoid",
        normalised=flag(config.get("norm_topk_prob", True), "norm_topk_prob"),
        scale=config.get("routed_scaling_factor", 2.5),
        num_groups=size(config.get("n_group", 8), "n_group"),
        num_chosen_groups=size(config.get("topk_group", 4), "topk_group"),
        has_correction=True,
        shared_size=feed_forward * size(config.get("n_shared_experts", 1), "n_shared_experts"),
        dense_layers=frozenset(range(num_dense)),
    )


def gpt_oss_moe(config: Mapping[str, Any]) -> MoeSettings:
    """From gpt-oss's config.json: biases everywhere, SwiGLU with clipped inputs.  [LM-MOE-8]

    The softmax over the chosen experts' logits equals all scores divided by the chosen ones' sum.
    """
    return MoeSettings(
        num_experts=_num_experts(config, 128),
        experts_per_token=size(_first(config, ("num_experts_per_tok", "experts_per_token"), 4), "num_experts_per_tok"),
        feed_forward_size=size(config.get("intermediate_size", 2880), "intermediate_size"),
        router_bias=True,
        expert_bias=True,
        clip_limit=config.get("swiglu_limit", GPT_OSS_LIMIT),
        clip_alpha=config.get("swiglu_alpha", GPT_OSS_ALPHA),
    )


def _num_experts(config: Mapping[str, Any], default: int) -> int:
    return size(_first(config, ("num_local_experts", "num_experts"), default), "num_experts")


def _first(config: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value of the first of these fields that is there."""
    return next((config[name] for name in names if config.get(name) is not None), default)
