"""`EncoderDecoderLM` over Whisper: sound as 16-bit numbers in, one token at a time out.

Clauses: FM-ENCDEC-1..6 (specs/families.md), FM-WHISPER-9 (specs/audio.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import (
    AlreadyExistsError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    ShapeError,
)
from ferrum_ref.interfaces.families import EncoderDecoderLM
from ferrum_ref.interfaces.families_data import EncoderState, PcmSamples
from ferrum_ref.interfaces.llm import Logits
from ferrum_ref.models.audio.mel import SAMPLE_RATE, log_mel, mel_filters
from ferrum_ref.models.whisper import WhisperCache, WhisperModel

_FULL_SCALE: Final = 2**15


@dataclass(slots=True)
class _Live:
    cache: WhisperCache
    state: EncoderState | None = None


class WhisperLm(EncoderDecoderLM):
    """Caches by id; a call that raises has changed none of them.  [FM-ENCDEC-1..6]"""

    def __init__(self, model: WhisperModel) -> None:
        self.model = model
        self._filters = mel_filters(model.config.num_mel_bins)
        self._live: dict[str, _Live] = {}

    def encode(self, cache_id: str, input: Sequence[int]) -> EncoderState:
        """`input`: mono sound at 16 kHz as 16-bit numbers, -32768 to 32767.  [FM-ENCDEC-1..2, FM-WHISPER-9]"""
        samples = np.asarray(input)
        self._require_new(cache_id, len(samples))
        if samples.ndim != 1 or samples.dtype.kind not in "iu":
            raise InvalidParameterError(
                f"encode: input of shape {samples.shape} and type {samples.dtype}, expected one row of whole numbers"
            )
        wrong = samples[(samples < -_FULL_SCALE) | (samples >= _FULL_SCALE)]
        if len(wrong):
            raise InvalidParameterError(
                f"encode: input: got {wrong[0]}, expected 16-bit samples, {-_FULL_SCALE} to {_FULL_SCALE - 1}"
            )
        return self._encode(cache_id, samples.astype(np.float32) / np.float32(_FULL_SCALE))

    def encode_pcm(self, cache_id: str, pcm: PcmSamples) -> EncoderState:
        """As `encode`, of samples as numbers around 0 (extension).  [FM-WHISPER-9]"""
        self._require_new(cache_id, len(pcm))
        return self._encode(cache_id, pcm)

    def decode_step(self, cache_id: str, token: int, pos: int, encoder: EncoderState) -> Logits:
        """[FM-ENCDEC-3..5]"""
        return self.decode_tokens(cache_id, [token], pos, encoder)

    def decode_tokens(self, cache_id: str, tokens: Sequence[int], pos: int, encoder: EncoderState) -> Logits:
        """Several tokens, the logits after the last (extension): as that many `decode_step`s.  [FM-ENCDEC-3..5]"""
        live = self._existing(cache_id)
        if pos != live.cache.length:
            raise ModelError(
                f"decode_step: position {pos} for {cache_id!r}, but its cache holds {live.cache.length} tokens;"
                " a token's position is the number of tokens before it"
            )
        config = self.model.config
        width = config.hidden_size
        if len(encoder.shape) != 2 or encoder.shape[1] != width or encoder.shape[0] < 1:
            raise ShapeError(f"decode_step: encoder state of shape {encoder.shape}, expected [S, {width}]")
        if live.state is not None and not _same(live.state, encoder):
            raise ModelError(
                f"decode_step: another encoder state than that of {cache_id!r}'s first step; encode under a new id"
            )
        self.model.require_tokens(live.cache, tokens)
        if live.state is None:
            rows = np.array(encoder.hidden, dtype=np.float32).reshape(encoder.shape)
            self.model.attend_to(live.cache, self.model.rows(rows))
            live.state = encoder
        return self.model.decode(live.cache, tokens)

    def release(self, cache_id: str) -> None:
        """[FM-ENCDEC-6]"""
        self._live.pop(cache_id, None)

    def _require_new(self, cache_id: str, num_samples: int) -> None:
        if cache_id in self._live:
            raise AlreadyExistsError(f"encode: cache id {cache_id!r} is live; release it first")
        if not num_samples:
            raise ModelError(f"encode: the input of {cache_id!r} is empty; give at least one sample")
        room = self.model.config.window_samples
        if num_samples > room:
            raise ResourceExhaustedError(
                f"encode: {num_samples} samples, but a window holds {room} ({room / SAMPLE_RATE:g} s); cut the sound"
            )

    def _encode(self, cache_id: str, pcm: PcmSamples) -> EncoderState:
        features = log_mel(pcm, self.model.config.num_frames, self._filters)
        encoded = self.model.encode(features)
        hidden: NDArray[np.float32] = np.asarray(encoded.to_numpy(), dtype=np.float32)
        state = EncoderState(hidden.reshape(-1), list(hidden.shape))
        self._live[cache_id] = _Live(self.model.new_cache())
        return state

    def _existing(self, cache_id: str) -> _Live:
        if cache_id not in self._live:
            raise NotFoundError(f"decode_step: no cache {cache_id!r}; encode under this id first")
        return self._live[cache_id]


def _same(first: EncoderState, other: EncoderState) -> bool:
    """One object, or the same numbers under the same shape."""
    return first is other or (first.shape == other.shape and np.array_equal(first.hidden, other.hidden))
