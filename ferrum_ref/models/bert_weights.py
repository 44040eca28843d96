"""Weights of a BERT encoder as a backend's tensors, and their names in checkpoints.  Clauses: FM-BERT-3..4."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.decoder_weights import element_type
from ferrum_ref.models.encoder_ops import Affine, Norm
from ferrum_ref.models.encoder_weights import AffineReader, Shapes, affine_shapes
from ferrum_ref.models.tensor_directory import TensorDirectory
from ferrum_ref.types.devices import DataType

_HEADS: Final = re.compile(r"(pooler|cls|classifier|qa_outputs)\..*|embeddings\.(position|token_type)_ids")
_OLD_NORM: Final = re.compile(r"(.*LayerNorm)\.(gamma|beta)")
_ATTENTION: Final = ("attention.self.query", "attention.self.key", "attention.self.value")


@dataclass(frozen=True, slots=True)
class BertLayer:
    """One layer. qkv `[3E, E]`: the rows of query, key, value."""

    qkv: Affine
    output: Affine
    attention_norm: Norm
    up: Affine
    down: Affine
    norm: Norm


@dataclass(frozen=True, slots=True)
class BertWeights:
    """All weights: tables `[V, E]`, `[positions, E]`, `[types, E]`."""

    words: TensorRef
    positions: TensorRef
    types: TensorRef
    norm: Norm
    layers: tuple[BertLayer, ...]


def bert_tensors(config: BertConfig) -> Shapes:
    """Canonical name and shape of every tensor; lazy.  [FM-BERT-3]"""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "embeddings.word_embeddings.weight", (config.vocab_size, hidden)
    yield "embeddings.position_embeddings.weight", (config.max_position_embeddings, hidden)
    yield "embeddings.token_type_embeddings.weight", (config.type_vocab_size, hidden)
    yield from affine_shapes({"embeddings.LayerNorm": (hidden,)})
    for index in range(config.num_layers):
        parts: dict[str, tuple[int, ...]] = dict.fromkeys((*_ATTENTION, "attention.output.dense"), (hidden, hidden))
        parts |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
        parts |= {"attention.output.LayerNorm": (hidden,), "output.LayerNorm": (hidden,)}
        yield from affine_shapes({f"encoder.layer.{index}.{part}": shape for part, shape in parts.items()})


def canonical_bert_name(stored: str) -> str | None:
    """Without the "bert." of task models, the norms as weight and bias; None for the heads on top.  [FM-BERT-3]"""
    name = stored.removeprefix("bert.")
    if _HEADS.fullmatch(name):
        return None
    old = _OLD_NORM.fullmatch(name)
    return name if old is None else f"{old[1]}.{'weight' if old[2] == 'gamma' else 'bias'}"


def read_bert_weights(
    directory: Path, config: BertConfig, backend: ComputeBackend, dtype: DataType = DataType.FP32
) -> BertWeights:
    """Read the weights of a Hugging Face directory.  [FM-BERT-3..4]

    Raises what TensorDirectory raises; InvalidParameterError for a dtype that is not a float type.
    """
    element = element_type(dtype)
    with TensorDirectory(directory, bert_tensors(config), canonical_bert_name) as tensors:
        reader = AffineReader(tensors, backend, element, config.layer_norm_eps)
        return BertWeights(
            words=reader.tensor("embeddings.word_embeddings.weight"),
            positions=reader.tensor("embeddings.position_embeddings.weight"),
            types=reader.tensor("embeddings.token_type_embeddings.weight"),
            norm=reader.norm("embeddings.LayerNorm"),
            layers=tuple(_layer(reader, f"encoder.layer.{index}") for index in range(config.num_layers)),
        )


def _layer(reader: AffineReader, prefix: str) -> BertLayer:
    return BertLayer(
        qkv=reader.stacked(tuple(f"{prefix}.{part}" for part in _ATTENTION)),
        output=reader.affine(f"{prefix}.attention.output.dense"),
        attention_norm=reader.norm(f"{prefix}.attention.output.LayerNorm"),
        up=reader.affine(f"{prefix}.intermediate.dense"),
        down=reader.affine(f"{prefix}.output.dense"),
        norm=reader.norm(f"{prefix}.output.LayerNorm"),
    )
