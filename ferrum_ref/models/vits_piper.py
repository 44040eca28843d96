"""A Piper voice: VITS as an ONNX file, and a JSON file beside it with its phonemes and constants.

Convolutions are found by the graph's nodes ("/dec/ups.0/ConvTranspose"), because exporters rename folded weights;
sizes come from the weights' shapes, dilations and strides from the nodes.  Clauses: FM-PIPER-1..4 (specs/audio.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ConfigError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.onnx_nodes import OnnxNode, read_onnx_graph
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import finite_number, positive_number, size
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_weights import vits_tensors

_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")
_MAX_TENSOR_BYTES: Final = 2**30
_ROOTS: Final = (
    (
        re.compile(r"text_encoder\.encoder\.layers\.(\d+)\.attention\.([qkv])_proj"),
        r"enc_p/encoder/attn_layers.\1/conv_\2",
    ),
    (re.compile(r"text_encoder\.encoder\.layers\.(\d+)\.attention\.out_proj"), r"enc_p/encoder/attn_layers.\1/conv_o"),
    (re.compile(r"text_encoder\.encoder\.layers\.(\d+)\.feed_forward\.(conv_\d)"), r"enc_p/encoder/ffn_layers.\1/\2"),
    (re.compile(r"text_encoder\.project"), "enc_p/proj"),
    (re.compile(r"duration_predictor\.conv_pre"), "dp/pre"),
    (re.compile(r"duration_predictor\.conv_proj"), "dp/proj"),
    (re.compile(r"duration_predictor\.conv_dds\.convs_dilated\.(\d+)"), r"dp/convs/convs_sep.\1"),
    (re.compile(r"duration_predictor\.conv_dds\.convs_pointwise\.(\d+)"), r"dp/convs/convs_1x1.\1"),
    (re.compile(r"decoder\.upsampler\.(\d+)"), r"dec/ups.\1"),
    (re.compile(r"decoder\.(conv_pre|conv_post)"), r"dec/\1"),
)  # canonical part -> path of its convolution
_NORMS: Final = (
    (re.compile(r"text_encoder\.encoder\.layers\.(\d+)\.layer_norm"), r"enc_p.encoder.norm_layers_1.\1"),
    (re.compile(r"text_encoder\.encoder\.layers\.(\d+)\.final_layer_norm"), r"enc_p.encoder.norm_layers_2.\1"),
    (re.compile(r"duration_predictor\.conv_dds\.(norms_\d\.\d+)"), r"dp.convs.\1"),
)  # canonical part -> the gamma's and beta's common name
_SPLINE: Final = re.compile(r"duration_predictor\.flows\.(\d+)\.(.+)")
_COUPLING: Final = re.compile(r"flow\.flows\.(\d+)\.(.+)")
_RESBLOCK: Final = re.compile(r"decoder\.resblocks\.(\d+)\.(convs\d)\.(\d+)")


class PiperTensors:
    """A TensorSource over a Piper voice; `config` is read from the graph.  [FM-PIPER-1..3]"""

    def __init__(self, source: ByteSource, voice: Mapping[str, Any]) -> None:
        """`voice`: the JSON file's object.

        Raises UnsupportedError (no onnx package, several speakers, a graph that is no such voice), InvalidFormatError.
        """
        self._name = source.name
        self._file, nodes = read_onnx_graph(source)
        self._convolutions = {
            node.name.strip("/").rpartition("/")[0]: node for node in nodes.values() if node.kind in _CONVOLUTIONS
        }
        words = [node for node in nodes.values() if node.kind == "Gather" and node.name == "/enc_p/emb/Gather"]
        self._words = words[0].inputs[0] if words and words[0].inputs else ""
        try:
            self.config = self._config(voice)
        except ConfigError as error:
            raise InvalidFormatError(f"read {source.name}: {error.message}") from None
        for name, shape in vits_tensors(self.config):
            self._require(name, shape)

    def read(self, name: str, dtype: Any = np.float32, /) -> NDArray[Any]:
        """A tensor by its canonical name, rounded once to `dtype`.  [FM-PIPER-2]  Raises NotFoundError."""
        if name.endswith("flows.0.log_scale"):
            return self._log_scale(dtype)
        values = self._initialiser(self._place(name))
        if name.endswith("_proj.weight") and ".attention." in name:
            values = values[:, :, 0]  # a projection is a convolution of one tap here
        return np.ascontiguousarray(values.astype(dtype))

    def close(self) -> None:
        """Nothing is held open."""

    def _initialiser(self, name: str) -> NDArray[Any]:
        return self._file.read(name, _MAX_TENSOR_BYTES)

    def _log_scale(self, dtype: Any) -> NDArray[Any]:
        """Stored, or folded into exp(-log_scale)."""
        if "dp.flows.0.logs" in self._file.tensors:
            return self._initialiser("dp.flows.0.logs").astype(dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(-np.log(self._initialiser("/dp/flows.0/Exp_output_0").astype(np.float64)), dtype=dtype)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        """Present, of this shape, and of a float type."""
        if name.endswith(("weight_g", "weight_v")):  # folded into one weight
            if name.endswith("weight_g"):
                return
            name = name.removesuffix("_v")
        if name.endswith("flows.0.log_scale"):
            stored = "dp.flows.0.logs" if "dp.flows.0.logs" in self._file.tensors else "/dp/flows.0/Exp_output_0"
        else:
            stored = self._place(name)
        tensor = self._file.tensors.get(stored)
        if tensor is None:
            raise InvalidFormatError(f"read {self._name}: {name}: got no initialiser {quoted(stored)}, expected one")
        expected = (*shape, 1) if name.endswith("_proj.weight") and ".attention." in name else shape
        if tensor.shape != expected or not tensor.element.startswith(("F", "BF")):
            got = f"{tensor.element}{list(tensor.shape)}"
            raise InvalidFormatError(f"read {self._name}: {name}: got {got}, expected floats {list(expected)}")

    def _place(self, name: str) -> str:
        """The initialiser behind a canonical name."""
        if name == "text_encoder.embed_tokens.weight":
            return self._words
        if name == "duration_predictor.flows.0.translate":
            return "dp.flows.0.m"
        part, _, kind = name.rpartition(".")
        if kind.startswith("emb_rel"):
            return f"enc_p.encoder.attn_layers.{part.split('.')[3]}.{kind}"
        norm = _norm_name(part)
        if norm is not None:
            return f"{norm}.{ {'weight': 'gamma', 'bias': 'beta'}[kind] }"
        node = self._node(self._path(part))
        index = {"weight": 1, "bias": 2}.get(kind, 0)
        if not 0 < index < len(node.inputs):
            raise NotFoundError(f"read {self._name}: {quoted(name)}: node {quoted(node.name)} has no such input")
        return node.inputs[index]

    def _path(self, part: str) -> str:
        found = _path_of(part)
        match = _RESBLOCK.fullmatch(part)
        if match is not None:
            kind = match[2] if self._is_paired() else "convs"
            found = f"dec/resblocks.{match[1]}/{kind}.{match[3]}"
        if found is None:
            raise NotFoundError(f"read {self._name}: {quoted(part)}: VITS has no such part")
        return found

    def _is_paired(self) -> bool:
        return "dec/resblocks.0/convs1.0" in self._convolutions

    def _node(self, path: str) -> OnnxNode:
        node = self._convolutions.get(path)
        if node is None:
            raise UnsupportedError(
                f"read {self._name}: got no convolution {path!r}, expected the graph of a Piper voice of one speaker"
            )
        return node

    def _shape(self, path: str, rank: int = 3) -> tuple[int, ...]:
        """Of a convolution's weight."""
        node = self._node(path)
        name = node.inputs[1] if len(node.inputs) > 1 else ""
        return self._shape_of(name, rank)

    def _shape_of(self, name: str, rank: int) -> tuple[int, ...]:
        tensor = self._file.tensors.get(name)
        if tensor is None or len(tensor.shape) != rank:
            got = "nothing" if tensor is None else list(tensor.shape)
            raise InvalidFormatError(f"read {self._name}: {quoted(name)}: got {got}, expected {rank} dimensions")
        return tensor.shape

    def _count(self, pattern: str) -> int:
        """How many of a numbered path follow one another from 0."""
        count = 0
        while count < 1024 and pattern.format(count) in self._convolutions:
            count += 1
        return count

    def _config(self, voice: Mapping[str, Any]) -> VitsConfig:
        """Sizes from the graph, constants from the JSON file.  [FM-PIPER-3]"""
        if voice.get("num_speakers", 1) != 1:
            raise UnsupportedError(f"read {self._name}: num_speakers: got {quoted(voice['num_speakers'])}, expected 1")
        audio, inference = (_object(voice, name) for name in ("audio", "inference"))
        words = self._shape_of(self._words, 2)
        near = self._shape_of("enc_p.encoder.attn_layers.0.emb_rel_k", 3)
        inner, _, taps = self._shape("enc_p/encoder/ffn_layers.0/conv_1")
        num_stages = self._count("dec/ups.{}")
        stages = [self._node(f"dec/ups.{index}") for index in range(num_stages)]
        kind = "convs1" if self._is_paired() else "convs"
        num_blocks = self._count("dec/resblocks.{}/" + kind + ".0") // max(1, num_stages)
        blocks = [f"dec/resblocks.{index}/{kind}" for index in range(num_blocks)]
        flows = [i for i in range(1, 64) if f"dp/flows.{2 * i - 1}/pre" in self._convolutions]
        outputs = self._shape(f"dp/flows.{2 * max(flows, default=2) - 1}/proj")[0]
        return VitsConfig(
            vocab_size=words[0],
            hidden_size=words[1],
            num_hidden_layers=self._count("enc_p/encoder/attn_layers.{}/conv_q"),
            num_attention_heads=max(1, words[1] // max(1, near[2])),
            window_size=near[1] // 2,
            ffn_dim=inner,
            ffn_kernel_size=taps,
            flow_size=self._shape("enc_p/proj")[0] // 2,
            upsample_initial_channel=self._shape("dec/conv_pre")[0],
            depth_separable_num_layers=self._count("dp/convs/convs_sep.{}"),
            duration_predictor_flow_bins=(outputs + 1) // 3,
            duration_predictor_kernel_size=self._shape("dp/convs/convs_sep.0")[2],
            duration_predictor_num_flows=max(flows, default=1),
            prior_encoder_num_flows=self._num_couplings(),
            prior_encoder_num_wavenet_layers=self._count("flow/flows.0/enc/in_layers.{}"),
            wavenet_kernel_size=self._shape("flow/flows.0/enc/in_layers.0")[2],
            wavenet_dilation_rate=self._wave_dilation(),
            sampling_rate=size(audio.get("sample_rate"), "audio.sample_rate"),
            upsample_rates=tuple(stage.ints("strides", (1,))[0] for stage in stages),
            upsample_kernel_sizes=tuple(self._shape(f"dec/ups.{i}")[2] for i in range(num_stages)),
            resblock_kernel_sizes=tuple(self._shape(f"{block}.0")[2] for block in blocks),
            resblock_dilation_sizes=tuple(self._dilations(block) for block in blocks),
            paired_resblocks=self._is_paired(),
            speaking_rate=1 / positive_number(inference.get("length_scale", 1), "inference.length_scale"),
            noise_scale=finite_number(inference.get("noise_scale", 0.667), "inference.noise_scale"),
            noise_scale_duration=finite_number(inference.get("noise_w", 0.8), "inference.noise_w"),
        )

    def _wave_dilation(self) -> int:
        """Of the second layer; the first one's is 1."""
        node = self._convolutions.get("flow/flows.0/enc/in_layers.1")
        return 1 if node is None else node.ints("dilations", (1,))[0]

    def _num_couplings(self) -> int:
        return sum(1 for index in range(64) if f"flow/flows.{2 * index}/pre" in self._convolutions)

    def _dilations(self, block: str) -> tuple[int, ...]:
        return tuple(self._node(f"{block}.{i}").ints("dilations", (1,))[0] for i in range(self._count(block + ".{}")))


def _path_of(part: str) -> str | None:
    """The convolution of a canonical part outside the residual blocks."""
    for pattern, path in _ROOTS:
        match = pattern.fullmatch(part)
        if match is not None:
            return match.expand(path)
    match = _SPLINE.fullmatch(part)
    if match is not None and int(match[1]) > 0:
        inner = (
            match[2]
            .replace("conv_dds.convs_dilated", "convs/convs_sep")
            .replace("conv_dds.convs_pointwise", "convs/convs_1x1")
        )
        inner = {"conv_pre": "pre", "conv_proj": "proj"}.get(inner, inner)
        return f"dp/flows.{2 * int(match[1]) - 1}/{inner}"
    match = _COUPLING.fullmatch(part)
    if match is not None:
        inner = {"conv_pre": "pre", "conv_post": "post"}.get(match[2], match[2].replace("wavenet.", "enc/"))
        return f"flow/flows.{2 * int(match[1])}/{inner}"
    return None


def _norm_name(part: str) -> str | None:
    for pattern, name in _NORMS:
        match = pattern.fullmatch(part)
        if match is not None:
            return match.expand(name)
    match = _SPLINE.fullmatch(part)
    if match is not None and match[2].startswith("conv_dds.norms"):
        return f"dp.flows.{2 * int(match[1]) - 1}.{match[2].replace('conv_dds', 'convs')}"
    return None


def _object(voice: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = voice.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name}: got {quoted(found)}, expected an object")
    return found
