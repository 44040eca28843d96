"""The tensors of a LLaVA directory, in the three spellings that checkpoints use.  Clause: FM-LLAVA-3."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.encoder_weights import Shapes
from ferrum_ref.models.multimodal_config import MultimodalConfig
from ferrum_ref.models.tensor_directory import TensorDirectory
from ferrum_ref.models.tensor_names import LM_HEAD, expected_tensors
from ferrum_ref.models.vision_weights import vision_tensors

VISION: Final = "vision."
PROJECTOR: Final = "projector."
LANGUAGE: Final = "language."
_UNUSED: Final = re.compile(
    r"vision\.(post_layernorm\.(weight|bias)|embeddings\.position_ids)|.*\.rotary_emb\.inv_freq"
)


class LanguageTensors:
    """The decoder's part of the directory, as the decoder's own weight reader wants it."""

    def __init__(self, tensors: TensorDirectory, config: DecoderConfig) -> None:
        self._tensors = tensors
        self._config = config

    @property
    def config(self) -> DecoderConfig:
        return self._config

    def read(self, name: str, dtype: Any = np.float32, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        return self._tensors.read(LANGUAGE + name, dtype, out)


def open_multimodal(directory: Path, config: MultimodalConfig) -> TensorDirectory:
    """All tensors of the model under `vision.`, `projector.` and `language.`; the caller closes them.  [FM-LLAVA-3]"""
    return TensorDirectory(directory, multimodal_tensors(config), canonical_multimodal_name(config.text))


def multimodal_tensors(config: MultimodalConfig) -> Shapes:
    """Canonical name and shape of every tensor; lazy."""
    yield from vision_tensors(config.vision, VISION)
    hidden, seen = config.text.hidden_size, config.vision.hidden_size * len(config.feature_layers)
    for name, columns in (("linear_1", seen), ("linear_2", hidden)):
        yield f"{PROJECTOR}{name}.weight", (hidden, columns)
        if config.projector_bias:
            yield f"{PROJECTOR}{name}.bias", (hidden,)
    for name, shape in expected_tensors(config.text):
        yield LANGUAGE + name, shape


def canonical_multimodal_name(text: DecoderConfig) -> Callable[[str], str | None]:
    """Stored name -> canonical name, None for what the model does not use.  [FM-LLAVA-3]

    language_model.model.X and model.language_model.X are language.model.X; language_model.lm_head and lm_head are
    language.lm_head, unused when tied; vision_tower.vision_model.X, vision_tower.X and model.vision_tower.X are
    vision.X; (model.)multi_modal_projector.X is projector.X.
    """

    def rename(stored: str) -> str | None:
        name = stored
        if name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        name = name.removeprefix("model.")
        for theirs, ours in (
            ("vision_tower.vision_model.", VISION),
            ("vision_tower.", VISION),
            ("multi_modal_projector.", PROJECTOR),
            ("language_model.", LANGUAGE),
            ("lm_head.", f"{LANGUAGE}lm_head."),
        ):
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        if _UNUSED.fullmatch(name) or (text.tie_word_embeddings and name == LANGUAGE + LM_HEAD):
            return None
        return name

    return rename
