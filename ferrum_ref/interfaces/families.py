"""Models beside the plain decoder: pictures and sound into a decoder, encoder-decoders, embeddings, speech in and out.

Upstream: `ferrum-models` `common/families`; nothing there implements these traits, so their meaning is written here and
in specs/families.md.  Dims: E hidden size, V vocabulary, S encoded positions.  Clauses: FM-* (specs/families.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.families_data import (
    AudioBuffer,
    AudioTokens,
    Embedding,
    EncoderState,
    ImageBuffer,
    PcmSamples,
    SpeakerRef,
    TranscriptSegment,
    VisualTokens,
)
from ferrum_ref.interfaces.llm import DecoderOnlyLLM, Logits

__all__ = [
    "AudioBuffer",
    "AudioTokens",
    "Embedding",
    "EmbeddingModel",
    "EncoderDecoderLM",
    "EncoderState",
    "ImageBuffer",
    "MultimodalLLM",
    "PcmSamples",
    "SpeakerRef",
    "TranscriptSegment",
    "Transcriber",
    "TtsModel",
    "VisualTokens",
]


class MultimodalLLM(DecoderOnlyLLM):
    """A decoder that also reads pictures, and perhaps sound.  [FM-IMAGE-1..5, FM-AUDIO-1]"""

    @abstractmethod
    def encode_image(self, pixels: ImageBuffer) -> VisualTokens:
        """One picture as rows for the decoder, flat float32, num_visual_tokens * E.  [FM-IMAGE-1..3]

        `pixels`: raw RGB, 8 bits each, rows from the top, each from the left: size * size * 3 bytes, where the model
        gives the size. Changes no cache.
        Raises ModelError for another number of bytes.
        """

    def encode_audio(self, pcm: PcmSamples) -> AudioTokens:
        """Sound as rows for the decoder; a model without ears gives none: shape (0,).  [FM-AUDIO-1]"""
        return np.empty(0, dtype=np.float32)

    def prefill_with_images(self, cache_id: str, tokens: Sequence[int], images: Sequence[VisualTokens]) -> Logits:
        """`prefill` of a prompt whose image placeholders stand for `images`, in order (extension).  [FM-IMAGE-4..5]

        The k-th placeholder of the prompt takes the k-th row of all images' rows laid end to end.
        Raises ModelError unless there are as many placeholders as rows, and everything that `prefill` raises;
        UnsupportedError (this default body).
        """
        raise UnsupportedError(f"MultimodalLLM.prefill_with_images: not offered by {type(self).__name__}")


class EncoderDecoderLM(ABC):
    """An encoder whose result a decoder attends to; decoder caches keyed by text id.  [FM-ENCDEC-1..6]

    Every error is raised before any cache changes. InvalidParameterError: a token id outside the vocabulary.
    """

    @abstractmethod
    def encode(self, cache_id: str, input: Sequence[int]) -> EncoderState:
        """Run the encoder over ids and start an empty decoder cache `cache_id`.  [FM-ENCDEC-1..2]

        A model that hears takes 16-bit samples for ids (FM-WHISPER-9).
        The state's shape is [S, E]. It depends on `input` alone and may be used with any id.
        Raises ModelError (empty input), AlreadyExistsError (live id), ResourceExhaustedError (input too long).
        """

    @abstractmethod
    def decode_step(self, cache_id: str, token: int, pos: int, encoder: EncoderState) -> Logits:
        """One decoder token at `pos`, attending to `encoder`; logits `[V]` float32.  [FM-ENCDEC-3..5]

        `pos` is the cache's length. A cache belongs to the state of its first step.
        Raises NotFoundError (id never encoded), ModelError (position; another state than the first step's),
        BackendError (state's shape), ResourceExhaustedError (decoder context full).
        """

    @abstractmethod
    def release(self, cache_id: str) -> None:
        """Drop a decoder cache; an unknown id is no error.  [FM-ENCDEC-6]"""


class EmbeddingModel(ABC):
    """Text (as ids) to one vector.  [FM-EMBED-1..5]"""

    @abstractmethod
    def embed(self, tokens: Sequence[int]) -> Embedding:
        """The pooled vector `[E]`, float32, of ids that already carry their special tokens.  [FM-EMBED-1..3]

        Pure: equal ids give equal vectors, whatever was embedded before.
        Raises ModelError (no token), InvalidParameterError (id outside the vocabulary), ResourceExhaustedError (more
        tokens than positions).
        """


class Transcriber(ABC):
    """Speech to text.  [FM-SPEECH-1..3]"""

    @abstractmethod
    def transcribe(self, pcm: PcmSamples, language: str | None) -> list[TranscriptSegment]:
        """What is said in mono PCM at the model's sample rate, in order of time.  [FM-SPEECH-1..3]

        `language`: a code the model knows ("en"), or None to let it decide. No samples: no segments. Pure.
        Raises InvalidParameterError (samples not finite, not one-dimensional), UnsupportedError (language).
        """


class TtsModel(ABC):
    """Text to speech.  [FM-TTS-1..3]"""

    @abstractmethod
    def synthesize(self, text: str, speaker: SpeakerRef | None) -> AudioBuffer:
        """`text` as sound at the model's sample rate, in the voice of `speaker` or the model's own.  [FM-TTS-1..3]

        Raises ModelError (nothing in the text can be spoken), UnsupportedError (a speaker, where the model has only
        its own voice).
        """
