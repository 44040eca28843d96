"""Weights of a CLIP vision tower as a backend's tensors.  Clause: FM-VISION-3 (specs/families.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.encoder_ops import Affine, Norm
from ferrum_ref.models.encoder_weights import AffineReader, Shapes, affine_shapes
from ferrum_ref.models.vision_config import VisionConfig

_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class VisionLayer:
    """One layer. qkv `[3E, E]`: the rows of query, key, value."""

    attention_norm: Norm
    qkv: Affine
    output: Affine
    norm: Norm
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True)
class VisionWeights:
    """patch `[E, 3 * p * p]`: channel, row, column; class_row `[1, E]`; positions `[1 + P, E]`."""

    patch: TensorRef
    class_row: TensorRef
    positions: TensorRef
    norm: Norm
    layers: tuple[VisionLayer, ...]


def vision_tensors(config: VisionConfig, prefix: str) -> Shapes:
    """Name and shape of every tensor that the tower's hidden states depend on; lazy.  [FM-VISION-3]"""
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    yield f"{prefix}embeddings.class_embedding", (hidden,)
    yield f"{prefix}embeddings.patch_embedding.weight", (hidden, 3, patch, patch)
    yield f"{prefix}embeddings.position_embedding.weight", (1 + config.num_patches, hidden)
    yield from affine_shapes({f"{prefix}pre_layrnorm": (hidden,)})
    for index in range(config.num_layers):
        parts: dict[str, tuple[int, ...]] = {"layer_norm1": (hidden,), "layer_norm2": (hidden,)}
        parts |= dict.fromkeys((*_QKV, "self_attn.out_proj"), (hidden, hidden))
        parts |= {"mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
        layer = f"{prefix}encoder.layers.{index}"
        yield from affine_shapes({f"{layer}.{part}": shape for part, shape in parts.items()})


def read_vision_weights(reader: AffineReader, config: VisionConfig, prefix: str, num_layers: int) -> VisionWeights:
    """The embeddings and the first `num_layers` layers."""
    columns = 3 * config.patch_size**2
    return VisionWeights(
        patch=reader.tensor(f"{prefix}embeddings.patch_embedding.weight").reshape((config.hidden_size, columns)),
        class_row=reader.tensor(f"{prefix}embeddings.class_embedding").reshape((1, config.hidden_size)),
        positions=reader.tensor(f"{prefix}embeddings.position_embedding.weight"),
        norm=reader.norm(f"{prefix}pre_layrnorm"),
        layers=tuple(_layer(reader, f"{prefix}encoder.layers.{index}") for index in range(num_layers)),
    )


def _layer(reader: AffineReader, prefix: str) -> VisionLayer:
    return VisionLayer(
        attention_norm=reader.norm(f"{prefix}.layer_norm1"),
        qkv=reader.stacked(tuple(f"{prefix}.{part}" for part in _QKV)),
        output=reader.affine(f"{prefix}.self_attn.out_proj"),
        norm=reader.norm(f"{prefix}.layer_norm2"),
        up=reader.affine(f"{prefix}.mlp.fc1"),
        down=reader.affine(f"{prefix}.mlp.fc2"),
    )
