"""A Whisper model in a CTranslate2 file: its sizes, and its tensors under their Hugging Face names.

Queries, keys and values lie below each other in one matrix ("linear_0"); of the attention to the encoder, keys and
values do ("linear_1").  Clauses: FM-CT2-5..7 (specs/audio.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ConfigError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.ctranslate2 import CTranslate2File
from ferrum_ref.formats.elements import StoredTensor
from ferrum_ref.models.config import quoted
from ferrum_ref.models.whisper_config import WhisperConfig
from ferrum_ref.models.whisper_weights import whisper_tensors

_KIND: Final = "WhisperSpec"
_FLOATS: Final = ("F32", "F16", "BF16")
_ACTIVATIONS: Final = MappingProxyType({0: "relu", 1: "gelu_new", 2: "silu", 3: "gelu", 4: "quick_gelu"})
_LAYER: Final = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS: Final[Mapping[str, tuple[str, int | None]]] = MappingProxyType(
    {
        "self_attn.q_proj": ("self_attention/linear_0", 0),
        "self_attn.k_proj": ("self_attention/linear_0", 1),
        "self_attn.v_proj": ("self_attention/linear_0", 2),
        "self_attn.out_proj": ("self_attention/linear_1", None),
        "encoder_attn.q_proj": ("attention/linear_0", None),
        "encoder_attn.k_proj": ("attention/linear_1", 0),
        "encoder_attn.v_proj": ("attention/linear_1", 1),
        "encoder_attn.out_proj": ("attention/linear_2", None),
        "fc1": ("ffn/linear_0", None),
        "fc2": ("ffn/linear_1", None),
        "self_attn_layer_norm": ("self_attention/layer_norm", None),
        "encoder_attn_layer_norm": ("attention/layer_norm", None),
        "final_layer_norm": ("ffn/layer_norm", None),
    }
)  # canonical part -> (variable, which block of E rows)
_OUTER: Final = MappingProxyType(
    {
        "encoder.embed_positions.weight": "encoder/position_encodings/encodings",
        "decoder.embed_positions.weight": "decoder/position_encodings/encodings",
        "decoder.embed_tokens.weight": "decoder/embeddings/weight",
    }
)
_NEUTRAL: Final = MappingProxyType(
    {
        "decoder/alibi": 0,
        "decoder/pre_norm": 1,
        "encoder/pre_norm": 1,
        "decoder/scale_embeddings": 0,
        "decoder/start_from_zero_embedding": 0,
    }
)


class Ct2WhisperTensors:
    """A TensorSource over a CTranslate2 file of kind "WhisperSpec"; `config` is read from its shapes.  [FM-CT2-5..7]"""

    def __init__(self, file: CTranslate2File, source: str) -> None:
        """Raises UnsupportedError (another kind, quantised weights, an option that is not offered), InvalidFormatError
        (a variable missing, foreign, or of another shape)."""
        self._file, self._source = file, source
        if file.kind != _KIND:
            raise UnsupportedError(f"read {source}: kind: got {quoted(file.kind)}, expected {_KIND!r}")
        self._require_neutral()
        try:
            self.config = self._config()
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None
        self._require_tensors()

    def read(self, name: str, dtype: Any = np.float32, /) -> NDArray[Any]:
        """A tensor by its canonical name, rounded once to `dtype`.  [FM-CT2-6]  Raises NotFoundError."""
        variable, block = _place(name)
        values = self._file.read(variable)
        if block is not None:
            rows = self.config.hidden_size
            values = values[block * rows : (block + 1) * rows]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.ascontiguousarray(values.astype(dtype))

    def close(self) -> None:
        self._file.close()

    def _require_neutral(self) -> None:
        for name, expected in _NEUTRAL.items():
            if name in self._file.variables and self._number(name) != expected:
                raise UnsupportedError(f"read {self._source}: {name}: got {self._number(name)}, expected {expected}")

    def _config(self) -> WhisperConfig:
        words, mels = self._shape("decoder/embeddings/weight", 2), self._shape("encoder/conv1/weight", 3)
        activation = self._number("decoder/activation") if "decoder/activation" in self._file.variables else 3
        if activation not in _ACTIVATIONS:
            expected = ", ".join(f"{number} ({name})" for number, name in _ACTIVATIONS.items())
            raise UnsupportedError(f"read {self._source}: decoder/activation: got {activation}, expected {expected}")
        return WhisperConfig(
            vocab_size=words[0],
            hidden_size=words[1],
            num_mel_bins=mels[1],
            num_encoder_layers=self._num_layers("encoder"),
            num_encoder_heads=self._number("encoder/num_heads"),
            encoder_ffn_size=self._shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
            num_decoder_layers=self._num_layers("decoder"),
            num_decoder_heads=self._number("decoder/num_heads"),
            decoder_ffn_size=self._shape("decoder/layer_0/ffn/linear_0/weight", 2)[0],
            max_source_positions=self._shape("encoder/position_encodings/encodings", 2)[0],
            max_target_positions=self._shape("decoder/position_encodings/encodings", 2)[0],
            hidden_act=_ACTIVATIONS[activation],
        )

    def _require_tensors(self) -> None:
        """Every expected tensor with its shape, and no weight that the model has no place for."""
        expected = dict(whisper_tensors(self.config))
        expected |= {
            name.replace(".weight", ".bias"): shape[:1] for name, shape in expected.items() if "k_proj" in name
        }
        used = set()
        for name, shape in expected.items():
            variable, block = _place(name)
            used.add(variable)
            stored = self._variable(variable)
            num_blocks = 1 if block is None else 3 if "self_attention" in variable else 2
            whole = (num_blocks * shape[0], *shape[1:])
            if stored.shape != whole:
                got, wanted = list(stored.shape), list(whole)
                raise InvalidFormatError(f"read {self._source}: {variable}: got shape {got}, expected {wanted}")
            if stored.element not in _FLOATS:
                raise UnsupportedError(
                    f"read {self._source}: {variable}: got element type {stored.element}, expected one of"
                    f" {', '.join(_FLOATS)}; convert the model with --quantization float16"
                )
        foreign = [name for name, each in self._file.variables.items() if each.shape and name not in used]
        foreign = [name for name in foreign if not name.startswith("decoder/alignment_")]
        if foreign:
            raise InvalidFormatError(
                f"read {self._source}: got {len(foreign)} variables that the model has no place for"
                f" ({', '.join(quoted(name) for name in foreign[:3])})"
            )

    def _num_layers(self, half: str) -> int:
        """Layers 0, 1, 2, ...: as many as follow one another."""
        found = set()
        for name in self._file.variables:
            match = re.match(rf"{half}/layer_(\d{{1,4}})/", name)
            if match:
                found.add(int(match[1]))
        return next(index for index in range(len(found) + 1) if index not in found)

    def _variable(self, name: str) -> StoredTensor:
        name = self._file.aliases.get(name, name)
        if name not in self._file.variables:
            raise InvalidFormatError(f"read {self._source}: {quoted(name)}: got nothing, expected that variable")
        return self._file.variables[name]

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self._variable(name).shape
        if len(shape) != rank:
            raise InvalidFormatError(
                f"read {self._source}: {name}: got shape {list(shape)}, expected {rank} dimensions"
            )
        return shape

    def _number(self, name: str) -> int:
        found = self._variable(name)
        if found.num_elements != 1 or not found.element.startswith("I"):
            got = f"{found.element}{list(found.shape)}"
            raise InvalidFormatError(f"read {self._source}: {name}: got {got}, expected one whole number")
        return int(self._file.read(name).reshape(-1)[0])


def _place(name: str) -> tuple[str, int | None]:
    """Where a canonical tensor lies: the variable, and which block of its rows."""
    if name in _OUTER:
        return _OUTER[name], None
    match = _LAYER.fullmatch(name)
    if match is not None and match[3] in _PARTS:
        part, block = _PARTS[match[3]]
        return f"{match[1]}/layer_{match[2]}/{part}/{_kind(part, match[4])}", block
    half, _, rest = name.partition(".")
    part, _, kind = rest.rpartition(".")
    if part not in ("conv1", "conv2", "layer_norm") or kind not in ("weight", "bias"):
        raise NotFoundError(f"read tensor {quoted(name)}: Whisper has no such tensor")
    return f"{half}/{part}/{_kind(part, kind)}", None


def _kind(part: str, kind: str) -> str:
    """Norms have gamma and beta."""
    return {"weight": "gamma", "bias": "beta"}[kind] if part.endswith("layer_norm") else kind
