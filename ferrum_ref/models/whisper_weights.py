"""A Whisper model's weights on a backend, from any source that knows their Hugging Face names.

Clauses: FM-WHISPER-3..4 (specs/audio.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import Convolution, ConvolutionOps
from ferrum_ref.models.encoder_ops import Affine, Norm
from ferrum_ref.models.encoder_weights import AffineReader, Shapes, TensorSource, affine_shapes
from ferrum_ref.models.tensor_directory import TensorDirectory
from ferrum_ref.models.whisper_config import WhisperConfig

_EPS: Final = 1e-5
_PREFIX: Final = "model."


@dataclass(frozen=True, slots=True)
class WhisperAttention:
    """Attention to the encoder: projections of the query, of key and value `[2E, E]`, and of the result."""

    norm: Norm
    query: Affine
    key_value: Affine
    output: Affine


@dataclass(frozen=True, slots=True)
class WhisperLayer:
    """One layer; `cross` in the decoder only. `qkv` `[3E, E]` is the self-attention's."""

    self_norm: Norm
    qkv: Affine
    output: Affine
    cross: WhisperAttention | None
    norm: Norm
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True)
class WhisperWeights:
    """All weights: positions `[max_source_positions, E]`, `[max_target_positions, E]`, words `[V, E]`."""

    conv1: Convolution
    conv2: Convolution
    encoder_positions: TensorRef
    encoder_layers: tuple[WhisperLayer, ...]
    encoder_norm: Norm
    words: TensorRef
    decoder_positions: TensorRef
    decoder_layers: tuple[WhisperLayer, ...]
    decoder_norm: Norm


def whisper_tensors(config: WhisperConfig) -> Shapes:
    """Canonical name and shape of every stored tensor: Hugging Face's, without "model."; lazy.  [FM-WHISPER-3]"""
    hidden = config.hidden_size
    yield "encoder.conv1.weight", (hidden, config.num_mel_bins, 3)
    yield "encoder.conv1.bias", (hidden,)
    yield "encoder.conv2.weight", (hidden, hidden, 3)
    yield "encoder.conv2.bias", (hidden,)
    yield "encoder.embed_positions.weight", (config.max_source_positions, hidden)
    yield "decoder.embed_tokens.weight", (config.vocab_size, hidden)
    yield "decoder.embed_positions.weight", (config.max_target_positions, hidden)
    halves = (
        ("encoder", config.num_encoder_layers, config.encoder_ffn_size, ("self_attn",)),
        ("decoder", config.num_decoder_layers, config.decoder_ffn_size, ("self_attn", "encoder_attn")),
    )
    for half, num_layers, inner, attentions in halves:
        yield from affine_shapes({f"{half}.layer_norm": (hidden,)})
        for index in range(num_layers):
            parts: dict[str, tuple[int, ...]] = {"fc1": (inner, hidden), "fc2": (hidden, inner)}
            parts["final_layer_norm"] = (hidden,)
            for attention in attentions:
                parts[f"{attention}_layer_norm"] = (hidden,)
                parts |= {f"{attention}.{each}_proj": (hidden, hidden) for each in ("q", "v", "out")}
                yield f"{half}.layers.{index}.{attention}.k_proj.weight", (hidden, hidden)
            yield from affine_shapes({f"{half}.layers.{index}.{part}": shape for part, shape in parts.items()})


class HfWhisperTensors:
    """A Hugging Face directory; keys have no bias there: zeros.  [FM-WHISPER-3]"""

    def __init__(self, directory: Path, config: WhisperConfig) -> None:
        """Raises what TensorDirectory raises."""
        self._hidden = config.hidden_size
        self._tensors = TensorDirectory(directory, whisper_tensors(config), _canonical)

    def read(self, name: str, dtype: Any = np.float32, /) -> NDArray[Any]:
        if name.endswith("k_proj.bias"):
            return np.zeros(self._hidden, dtype)
        return self._tensors.read(name, dtype)

    def close(self) -> None:
        self._tensors.close()


def _canonical(stored: str) -> str | None:
    """Without "model."; the output matrix is the word table, whether it is stored again or not."""
    return None if stored == "proj_out.weight" else stored.removeprefix(_PREFIX)


def read_whisper_weights(
    source: TensorSource, config: WhisperConfig, backend: ComputeBackend, element: Any
) -> WhisperWeights:
    """All weights, each number rounded once to `element`.  [FM-WHISPER-4]

    Raises what reading the source raises; UnsupportedError if the backend lacks a kernel.
    """
    reader = AffineReader(source, backend, element, _EPS)
    ops = ConvolutionOps(backend, "Whisper")
    conv1, conv2 = (
        ops.read(
            source.read(f"encoder.{name}.weight", element),
            source.read(f"encoder.{name}.bias", element),
            stride=stride,
            padding=(1, 1),
        )
        for name, stride in (("conv1", 1), ("conv2", 2))
    )
    return WhisperWeights(
        conv1=conv1,
        conv2=conv2,
        encoder_positions=reader.tensor("encoder.embed_positions.weight"),
        encoder_layers=tuple(_layer(reader, f"encoder.layers.{i}", False) for i in range(config.num_encoder_layers)),
        encoder_norm=reader.norm("encoder.layer_norm"),
        words=reader.tensor("decoder.embed_tokens.weight"),
        decoder_positions=reader.tensor("decoder.embed_positions.weight"),
        decoder_layers=tuple(_layer(reader, f"decoder.layers.{i}", True) for i in range(config.num_decoder_layers)),
        decoder_norm=reader.norm("decoder.layer_norm"),
    )


def _layer(reader: AffineReader, prefix: str, has_cross: bool) -> WhisperLayer:
    cross = None
    if has_cross:
        inner = f"{prefix}.encoder_attn"
        cross = WhisperAttention(
            norm=reader.norm(f"{inner}_layer_norm"),
            query=reader.affine(f"{inner}.q_proj"),
            key_value=reader.stacked((f"{inner}.k_proj", f"{inner}.v_proj")),
            output=reader.affine(f"{inner}.out_proj"),
        )
    own = f"{prefix}.self_attn"
    return WhisperLayer(
        self_norm=reader.norm(f"{own}_layer_norm"),
        qkv=reader.stacked((f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")),
        output=reader.affine(f"{own}.out_proj"),
        cross=cross,
        norm=reader.norm(f"{prefix}.final_layer_norm"),
        up=reader.affine(f"{prefix}.fc1"),
        down=reader.affine(f"{prefix}.fc2"),
    )
