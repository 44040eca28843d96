"""A VITS voice's weights on a backend, from any source that knows their Hugging Face names.

Clauses: FM-VITS-3..4 (specs/audio.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.audio.convolution import (
    Convolution,
    ConvolutionOps,
    DepthConvolution,
    Upsampling,
    same_padding,
)
from ferrum_ref.models.encoder_ops import Affine, Norm
from ferrum_ref.models.encoder_weights import AffineReader, Shapes, TensorSource, affine_shapes
from ferrum_ref.models.tensor_directory import TensorDirectory
from ferrum_ref.models.vits_config import VitsConfig

_NORM_EPS: Final = 1e-5  # of the duration predictor's norms, whatever layer_norm_eps is
_TRAINING: Final = re.compile(r"posterior_encoder\..*|duration_predictor\.post_.*|duration_predictor\.flows\.1\..*")
_WEIGHT_NORM: Final = MappingProxyType(
    {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
)


@dataclass(frozen=True, slots=True)
class TextLayer:
    """One layer of the text encoder; the tables `[2 w + 1, D]` hold a row for each distance -w .. w."""

    qkv: Affine
    output: Affine
    near_keys: NDArray[np.float32]
    near_values: NDArray[np.float32]
    norm: Norm
    up: Convolution
    down: Convolution
    final_norm: Norm


@dataclass(frozen=True, slots=True)
class SeparableStack:
    """Per layer: a convolution along time, a norm, one across channels, a norm."""

    layers: tuple[tuple[DepthConvolution, Norm, Affine, Norm], ...]


@dataclass(frozen=True, slots=True)
class SplineFlow:
    """One step of the duration predictor."""

    before: Affine
    stack: SeparableStack
    after: Affine


@dataclass(frozen=True, slots=True)
class CouplingFlow:
    """One step of the flow; `wave` holds each layer's dilated convolution and its projection."""

    before: Affine
    wave: tuple[tuple[Convolution, Affine], ...]
    after: Affine


@dataclass(frozen=True, slots=True)
class UpStage:
    """One stage of the vocoder; a block is a list of (dilated convolution, its undilated follower or None)."""

    up: Upsampling
    blocks: tuple[tuple[tuple[Convolution, Convolution | None], ...], ...]


@dataclass(frozen=True, slots=True)
class VitsWeights:
    """All weights that speaking needs. `translate`, `log_scale` `[2, 1]` end the duration predictor."""

    words: TensorRef
    text_layers: tuple[TextLayer, ...]
    statistics: Affine
    duration_before: Affine
    duration_stack: SeparableStack
    duration_after: Affine
    translate: NDArray[np.float64]
    log_scale: NDArray[np.float64]
    splines: tuple[SplineFlow, ...]
    couplings: tuple[CouplingFlow, ...]
    vocoder_before: Convolution
    stages: tuple[UpStage, ...]
    vocoder_after: Convolution


def vits_tensors(config: VitsConfig) -> Shapes:
    """Canonical name and shape of every tensor that speaking needs: transformers' names; lazy.  [FM-VITS-3]"""
    yield from _text_tensors(config)
    yield from _duration_tensors(config)
    yield from _flow_tensors(config)
    yield from _vocoder_tensors(config)


def _text_tensors(config: VitsConfig) -> Shapes:
    hidden, inner, taps = config.hidden_size, config.ffn_dim, config.ffn_kernel_size
    near = (1, 2 * config.window_size + 1, hidden // config.num_attention_heads)
    yield "text_encoder.embed_tokens.weight", (config.vocab_size, hidden)
    yield from affine_shapes({"text_encoder.project": (2 * config.flow_size, hidden, 1)})
    for index in range(config.num_hidden_layers):
        layer = f"text_encoder.encoder.layers.{index}"
        yield f"{layer}.attention.emb_rel_k", near
        yield f"{layer}.attention.emb_rel_v", near
        parts: dict[str, tuple[int, ...]] = {f"attention.{each}_proj": (hidden, hidden) for each in "qkv"}
        parts |= {"attention.out_proj": (hidden, hidden), "layer_norm": (hidden,), "final_layer_norm": (hidden,)}
        parts |= {"feed_forward.conv_1": (inner, hidden, taps), "feed_forward.conv_2": (hidden, inner, taps)}
        yield from affine_shapes({f"{layer}.{part}": shape for part, shape in parts.items()})


def _duration_tensors(config: VitsConfig) -> Shapes:
    hidden, root = config.hidden_size, "duration_predictor"
    yield from affine_shapes({f"{root}.conv_pre": (hidden, hidden, 1), f"{root}.conv_proj": (hidden, hidden, 1)})
    yield from _stack_tensors(config, f"{root}.conv_dds")
    yield f"{root}.flows.0.translate", (2, 1)
    yield f"{root}.flows.0.log_scale", (2, 1)
    for index in range(2, config.duration_predictor_num_flows + 1):  # the first one is not needed to speak
        flow = f"{root}.flows.{index}"
        outputs = 3 * config.duration_predictor_flow_bins - 1
        yield from affine_shapes({f"{flow}.conv_pre": (hidden, 1, 1), f"{flow}.conv_proj": (outputs, hidden, 1)})
        yield from _stack_tensors(config, f"{flow}.conv_dds")


def _stack_tensors(config: VitsConfig, prefix: str) -> Shapes:
    hidden = config.hidden_size
    parts: dict[str, tuple[int, ...]] = {}
    for index in range(config.depth_separable_num_layers):
        parts[f"{prefix}.convs_dilated.{index}"] = (hidden, 1, config.duration_predictor_kernel_size)
        parts[f"{prefix}.convs_pointwise.{index}"] = (hidden, hidden, 1)
        parts |= {f"{prefix}.norms_{each}.{index}": (hidden,) for each in (1, 2)}
    yield from affine_shapes(parts)


def _flow_tensors(config: VitsConfig) -> Shapes:
    hidden, half = config.hidden_size, config.flow_size // 2
    last = config.prior_encoder_num_wavenet_layers - 1
    for index in range(config.prior_encoder_num_flows):
        flow = f"flow.flows.{index}"
        yield from affine_shapes({f"{flow}.conv_pre": (hidden, half, 1), f"{flow}.conv_post": (half, hidden, 1)})
        for layer in range(last + 1):
            inner, outer = f"{flow}.wavenet.in_layers.{layer}", f"{flow}.wavenet.res_skip_layers.{layer}"
            for name, rows, taps in (
                (inner, 2 * hidden, config.wavenet_kernel_size),
                (outer, hidden if layer == last else 2 * hidden, 1),
            ):
                yield f"{name}.weight_g", (rows, 1, 1)
                yield f"{name}.weight_v", (rows, hidden, taps)
                yield f"{name}.bias", (rows,)


def _vocoder_tensors(config: VitsConfig) -> Shapes:
    channels = config.upsample_initial_channel
    yield from affine_shapes({"decoder.conv_pre": (channels, config.flow_size, 7)})
    for stage, taps in enumerate(config.upsample_kernel_sizes):
        yield f"decoder.upsampler.{stage}.weight", (channels, channels // 2, taps)
        channels //= 2
        yield f"decoder.upsampler.{stage}.bias", (channels,)
        for name, width, _ in _blocks(config, stage):
            yield from affine_shapes({name: (channels, channels, width)})
    yield "decoder.conv_post.weight", (1, channels, 7)


def _blocks(config: VitsConfig, stage: int) -> list[tuple[str, int, int]]:
    """Name, taps and dilation of the residual blocks' convolutions of one stage."""
    found = []
    count = len(config.resblock_kernel_sizes)
    pairs = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    for block, (taps, dilations) in enumerate(pairs, stage * count):
        for index, dilation in enumerate(dilations):
            found.append((f"decoder.resblocks.{block}.convs1.{index}", taps, dilation))
            if config.paired_resblocks:
                found.append((f"decoder.resblocks.{block}.convs2.{index}", taps, 1))
    return found


class HfVitsTensors:
    """A Hugging Face directory; what only training needs is not read.  [FM-VITS-3]"""

    def __init__(self, directory: Path, config: VitsConfig) -> None:
        """Raises what TensorDirectory raises."""
        self._tensors = TensorDirectory(directory, vits_tensors(config), _canonical)

    def read(self, name: str, dtype: Any = np.float32, /) -> NDArray[Any]:
        """A tensor; of a normalised weight, g v / |v|, in float64, the norm over all axes but the first."""
        if ".wavenet." in name and name.endswith(".weight"):
            v = self._tensors.read(f"{name}_v", np.float64)
            g = self._tensors.read(f"{name}_g", np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(g * v / np.sqrt((v**2).sum(axis=(1, 2), keepdims=True)), dtype=dtype)
        return self._tensors.read(name, dtype)

    def close(self) -> None:
        self._tensors.close()


def _canonical(stored: str) -> str | None:
    name = stored.removeprefix("vits.")
    if _TRAINING.fullmatch(name):
        return None
    for spelling, short in _WEIGHT_NORM.items():
        name = name.replace(spelling, short)
    return name


class VitsReader:
    """Builds the parts out of a source's tensors.  [FM-VITS-4]"""

    def __init__(self, source: TensorSource, config: VitsConfig, backend: ComputeBackend) -> None:
        self._source = source
        self._config = config
        self._ops = ConvolutionOps(backend, "VITS")
        self._reader = AffineReader(source, backend, np.float32, _NORM_EPS)
        self._text_reader = AffineReader(source, backend, np.float32, config.layer_norm_eps)

    def weights(self) -> VitsWeights:
        """All of them, each number rounded once to float32."""
        config, root = self._config, "duration_predictor"
        return VitsWeights(
            words=self._reader.tensor("text_encoder.embed_tokens.weight"),
            text_layers=tuple(self._text_layer(index) for index in range(config.num_hidden_layers)),
            statistics=self._pointwise("text_encoder.project"),
            duration_before=self._pointwise(f"{root}.conv_pre"),
            duration_stack=self._stack(f"{root}.conv_dds"),
            duration_after=self._pointwise(f"{root}.conv_proj"),
            translate=self._source.read(f"{root}.flows.0.translate", np.float64),
            log_scale=self._source.read(f"{root}.flows.0.log_scale", np.float64),
            splines=tuple(self._spline(f"{root}.flows.{i}") for i in range(2, config.duration_predictor_num_flows + 1)),
            couplings=tuple(self._coupling(f"flow.flows.{i}") for i in range(config.prior_encoder_num_flows)),
            vocoder_before=self._convolution("decoder.conv_pre"),
            stages=tuple(self._stage(index) for index in range(len(config.upsample_rates))),
            vocoder_after=self._convolution("decoder.conv_post", has_bias=False),
        )

    def _array(self, name: str) -> NDArray[np.float32]:
        return self._source.read(name, np.float32)

    def _pointwise(self, name: str) -> Affine:
        """A convolution of one tap is a projection."""
        return self._ops.read(self._array(f"{name}.weight"), self._array(f"{name}.bias")).affine

    def _convolution(self, name: str, dilation: int = 1, *, has_bias: bool = True) -> Convolution:
        """One that keeps the length."""
        weight = self._array(f"{name}.weight")
        bias = self._array(f"{name}.bias") if has_bias else None
        return self._ops.read(weight, bias, dilation=dilation, padding=same_padding(weight.shape[2], dilation))

    def _text_layer(self, index: int) -> TextLayer:
        layer = f"text_encoder.encoder.layers.{index}"
        attention = f"{layer}.attention"
        return TextLayer(
            qkv=self._reader.stacked((f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")),
            output=self._reader.affine(f"{attention}.out_proj"),
            near_keys=self._array(f"{attention}.emb_rel_k")[0],
            near_values=self._array(f"{attention}.emb_rel_v")[0],
            norm=self._text_reader.norm(f"{layer}.layer_norm"),
            up=self._convolution(f"{layer}.feed_forward.conv_1"),
            down=self._convolution(f"{layer}.feed_forward.conv_2"),
            final_norm=self._text_reader.norm(f"{layer}.final_layer_norm"),
        )

    def _stack(self, prefix: str) -> SeparableStack:
        layers = []
        for index in range(self._config.depth_separable_num_layers):
            along = f"{prefix}.convs_dilated.{index}"
            dilation = self._config.duration_predictor_kernel_size**index
            layers.append(
                (
                    self._ops.read_depthwise(self._array(f"{along}.weight"), self._array(f"{along}.bias"), dilation),
                    self._reader.norm(f"{prefix}.norms_1.{index}"),
                    self._pointwise(f"{prefix}.convs_pointwise.{index}"),
                    self._reader.norm(f"{prefix}.norms_2.{index}"),
                )
            )
        return SeparableStack(tuple(layers))

    def _spline(self, prefix: str) -> SplineFlow:
        before, after = self._pointwise(f"{prefix}.conv_pre"), self._pointwise(f"{prefix}.conv_proj")
        return SplineFlow(before, self._stack(f"{prefix}.conv_dds"), after)

    def _coupling(self, prefix: str) -> CouplingFlow:
        wave = tuple(
            (
                self._convolution(f"{prefix}.wavenet.in_layers.{i}", self._config.wavenet_dilation_rate**i),
                self._pointwise(f"{prefix}.wavenet.res_skip_layers.{i}"),
            )
            for i in range(self._config.prior_encoder_num_wavenet_layers)
        )
        return CouplingFlow(self._pointwise(f"{prefix}.conv_pre"), wave, self._pointwise(f"{prefix}.conv_post"))

    def _stage(self, index: int) -> UpStage:
        config = self._config
        rate, taps = config.upsample_rates[index], config.upsample_kernel_sizes[index]
        name = f"decoder.upsampler.{index}"
        up = self._ops.read_upsampling(
            self._array(f"{name}.weight"), self._array(f"{name}.bias"), rate, (taps - rate) // 2
        )
        convolutions = iter([self._convolution(each, dilation) for each, _, dilation in _blocks(config, index)])
        blocks = tuple(
            tuple((next(convolutions), next(convolutions) if config.paired_resblocks else None) for _ in dilations)
            for dilations in config.resblock_dilation_sizes
        )
        return UpStage(up, blocks)
