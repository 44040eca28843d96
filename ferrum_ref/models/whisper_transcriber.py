"""`Transcriber` over Whisper: window after window, greedily, with timestamps.

Clauses: FM-SPEECH-1..3 (specs/families.md), FM-WHISPER-12..17 (specs/audio.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.interfaces.families import Transcriber
from ferrum_ref.interfaces.families_data import PcmSamples, TranscriptSegment, mono_samples
from ferrum_ref.models.audio.mel import HOP_SAMPLES, SAMPLE_RATE, log_mel, mel_filters
from ferrum_ref.models.whisper import WhisperCache, WhisperModel
from ferrum_ref.models.whisper_rules import Span, allowed, log_probability, spans
from ferrum_ref.models.whisper_tokens import WhisperTokens

_STEP_SAMPLES: Final = 2 * HOP_SAMPLES  # of one timestamp, and of one encoded row
_SHORTEST_SAMPLES: Final = SAMPLE_RATE // 10  # a shorter rest is not listened to
_SILENT_PROBABILITY: Final = 0.6
_UNSURE_LOG_PROBABILITY: Final = -1.0  # a token, on average

DecodeText = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Window:
    """What was heard up to `heard_samples`, in which language."""

    segments: list[TranscriptSegment]
    language: str | None  # None: nothing but silence so far
    heard_samples: int


class WhisperTranscriber(Transcriber):
    """Pure: no call leaves anything behind. Safe to share between threads where the tokenizer is.  [FM-SPEECH-1..3]"""

    def __init__(self, model: WhisperModel, tokens: WhisperTokens, decode_text: DecodeText) -> None:
        """`decode_text`: the text of ordinary tokens."""
        self.model = model
        self.tokens = tokens
        self._decode_text = decode_text
        self._filters = mel_filters(model.config.num_mel_bins)

    @property
    def sample_rate(self) -> int:
        """Hz: 16000."""
        return SAMPLE_RATE

    def transcribe(self, pcm: PcmSamples, language: str | None) -> list[TranscriptSegment]:
        """[FM-SPEECH-1..3]"""
        return [segment for window in self.windows(pcm, language) for segment in window.segments]

    def windows(self, pcm: PcmSamples, language: str | None) -> Iterator[Window]:
        """The same, as it is heard: one item for each window of at most 30 s (extension).  [FM-WHISPER-15]

        Checks its arguments at once, before the first item is asked for.
        """
        samples = mono_samples(pcm, "transcribe")
        if language is not None:
            self.tokens.language_token(language)
        return self._windows(samples, language)

    def detect_language(self, pcm: PcmSamples) -> str:
        """The likeliest language of the first window; "en" where the model knows no other (extension).  [FM-WHISPER-16]

        Raises InvalidParameterError as `transcribe`.
        """
        samples = mono_samples(pcm, "detect_language")[: self.model.config.window_samples]
        return self._likeliest(self._started(samples)[1]) if self.tokens.languages else "en"

    def _windows(self, samples: PcmSamples, language: str | None) -> Iterator[Window]:
        position, previous_end_s = 0, 0.0
        duration_s = len(samples) / SAMPLE_RATE
        while len(samples) - position >= _SHORTEST_SAMPLES:
            piece = samples[position : position + self.model.config.window_samples]
            found: list[Span] = []
            settled = 0
            if piece.any():  # digital silence holds nothing, whatever the model makes of it
                cache, logits = self._started(piece)
                language = language or self._likeliest(logits)
                written = self._write(cache, logits, self.tokens.language_token(language))
                if written is not None:
                    found, settled = spans(written, self.tokens, -(-len(piece) // _STEP_SAMPLES))
            start_s = position / SAMPLE_RATE
            segments: list[TranscriptSegment] = []
            for span in found:
                segment = self._segment(span, start_s, previous_end_s, duration_s)
                if segment is not None:
                    segments.append(segment)
                    previous_end_s = segment.end_sec
            position += min(settled * _STEP_SAMPLES or len(piece), len(piece))
            yield Window(segments, language, position)

    def _started(self, piece: PcmSamples) -> tuple[WhisperCache, NDArray[np.float32]]:
        """A cache that has heard the window and read the start token, and the logits after it."""
        encoded = self.model.encode(log_mel(piece, self.model.config.num_frames, self._filters))
        cache = self.model.new_cache()
        self.model.attend_to(cache, encoded)
        return cache, self.model.decode(cache, [self.tokens.start])

    def _likeliest(self, logits: NDArray[np.float32]) -> str:
        if not self.tokens.languages:
            return "en"
        return max(self.tokens.languages, key=lambda code: float(logits[self.tokens.languages[code]]))

    def _write(self, cache: WhisperCache, after_start: NDArray[np.float32], language: int | None) -> list[int] | None:
        """The window's tokens, the likeliest each time; None where nobody speaks.  [FM-WHISPER-12, FM-WHISPER-14]"""
        prompt = [token for token in (language, self.tokens.transcribe) if token is not None]
        logits = self.model.decode(cache, prompt) if prompt else after_start
        room = min(self.model.config.max_target_positions // 2, self.model.config.max_target_positions - cache.length)
        written: list[int] = []
        total = 0.0
        while True:
            masked = allowed(logits, written, self.tokens)
            token = int(masked.argmax())
            total += log_probability(masked, token)
            if token == self.tokens.end:
                break
            written.append(token)
            if len(written) >= room:
                break
            logits = self.model.decode(cache, [token])
        mean = total / (len(written) + 1)
        silent = self._silence(after_start) > _SILENT_PROBABILITY and mean < _UNSURE_LOG_PROBABILITY
        return None if silent else written

    def _silence(self, after_start: NDArray[np.float32]) -> float:
        if self.tokens.no_speech is None:
            return 0.0
        return float(np.exp(log_probability(after_start.astype(np.float64), self.tokens.no_speech)))

    def _segment(self, span: Span, start_s: float, earliest_s: float, latest_s: float) -> TranscriptSegment | None:
        """Within the sound and after what came before; None without text.  [FM-SPEECH-1]"""
        text = self._decode_text(span.tokens).strip()
        if not text:
            return None
        step_s = _STEP_SAMPLES / SAMPLE_RATE
        begin = min(max(start_s + span.start * step_s, earliest_s), latest_s)
        end = min(max(start_s + span.end * step_s, begin), latest_s)
        return TranscriptSegment(begin, end, text)
