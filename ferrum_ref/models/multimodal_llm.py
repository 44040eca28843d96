"""`MultimodalLLM` over a vision tower, a projector and the decoder (LLaVA).

    visual rows = W_2 act(W_1 features),     features = chosen hidden states of the tower, side by side

Source: Liu et al. 2023 (LLaVA-1.5), section 3.  Clauses: FM-IMAGE-1..6, FM-LLAVA-1..3 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.families import MultimodalLLM
from ferrum_ref.interfaces.families_data import ImageBuffer, VisualTokens
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.kv_storage import SequenceKv, SequenceKvFactory
from ferrum_ref.interfaces.llm import Logits
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_llm import DecoderLlm
from ferrum_ref.models.encoder_ops import Affine, EncoderOps
from ferrum_ref.models.hidden_activation import hidden_activation
from ferrum_ref.models.multimodal_config import MultimodalConfig
from ferrum_ref.models.vision import VisionTower

Cache = TypeVar("Cache", bound=SequenceKv)


class ImageEncoder:
    """Pictures to decoder rows: tower, choice of hidden states, projector. Stateless."""

    def __init__(
        self, config: MultimodalConfig, tower: VisionTower, projector: tuple[Affine, Affine], backend: ComputeBackend
    ) -> None:
        self.config = config
        self._tower = tower
        self._first, self._second = projector
        self.ops = EncoderOps(backend, "ImageEncoder")
        self._activation = hidden_activation(config.projector_act, backend, self._first.weight.dtype())

    def encode(self, pixels: ImageBuffer) -> TensorRef:
        """`[num_visual_tokens, E]` of one picture.  Pure.  [FM-IMAGE-3]"""
        states = self._tower.hidden_states(pixels, self.config.feature_layers)
        if not self.config.keep_class_row:
            states = [state.view((1, 0), state.shape()) for state in states]
        features = states[0] if len(states) == 1 else self.ops.tensor.concat(states, 1)
        return self.ops.affine(self._activation(self.ops.affine(features, self._first)), self._second)


class LlavaLlm(DecoderLlm[Cache], MultimodalLLM):
    """A decoder whose prompts may hold pictures; everything else is DecoderLlm's.  [FM-IMAGE-1..6]"""

    def __init__(self, decoder: Decoder, caches: SequenceKvFactory[Cache], images: ImageEncoder) -> None:
        super().__init__(decoder, caches)
        self._images = images

    @property
    def image_token_id(self) -> int:
        """The placeholder's id."""
        return self._images.config.image_token_id

    @property
    def num_visual_tokens(self) -> int:
        """Placeholders that one picture needs."""
        return self._images.config.num_visual_tokens

    def encode_image(self, pixels: ImageBuffer) -> VisualTokens:
        """[FM-IMAGE-1..3]"""
        return np.array(self._images.encode(pixels).to_numpy(), dtype=np.float32).reshape(-1)

    def prefill(self, cache_id: str, tokens: Sequence[int]) -> Logits:
        """A prompt without pictures.  Raises ModelError for a placeholder in it.  [FM-IMAGE-5]"""
        return self.prefill_with_images(cache_id, tokens, ())

    def prefill_with_images(self, cache_id: str, tokens: Sequence[int], images: Sequence[VisualTokens]) -> Logits:
        """[FM-IMAGE-4..5]"""
        self._require_new(cache_id, tokens)
        places = np.flatnonzero(np.asarray(tokens) == self.image_token_id)
        width = self.decoder.config.hidden_size
        rows = [np.asarray(image, dtype=np.float32) for image in images]
        wrong = [row.shape for row in rows if row.ndim != 1 or row.size % width]
        if wrong:
            raise ModelError(f"prefill: visual tokens of shape {wrong[0]}, expected flat rows of {width}")
        num_rows = sum(row.size for row in rows) // width
        if num_rows != len(places):
            raise ModelError(
                f"prefill: {len(places)} image placeholders (id {self.image_token_id}) for {num_rows} visual rows of"
                f" {len(rows)} pictures; a picture takes {self.num_visual_tokens} placeholders"
            )
        if not num_rows:
            return super().prefill(cache_id, tokens)
        batch = ForwardBatch.build([tokens], [0])
        self.decoder.check(batch)
        order = np.arange(len(tokens))
        order[places] = len(tokens) + np.arange(num_rows)
        visual = np.concatenate(rows).reshape(num_rows, width)
        return self._prefill(cache_id, batch, self._merged(batch, visual, order))

    def _merged(self, batch: ForwardBatch, visual: VisualTokens, order: npt.NDArray[np.int64]) -> TensorRef:
        """Row i is row order[i] of the tokens' own rows followed by the visual ones."""
        own = self.decoder.embed(batch.token_ids)
        seen = self.decoder.backend.tensor_factory().from_numpy(visual).to_dtype(self.decoder.dtype)
        return self._images.ops.gather(self._images.ops.tensor.concat([own, seen], 0), order)
