"""`TtsModel` over VITS: a text's sentences one behind the other.  Clauses: FM-TTS-1..3 (specs/families.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import ModelError, UnsupportedError
from ferrum_ref.interfaces.families import TtsModel
from ferrum_ref.interfaces.families_data import AudioBuffer, SpeakerRef
from ferrum_ref.models.audio.phonemes import TextReader, Utterance
from ferrum_ref.models.vits import SpeechControls, VitsModel

_PAUSE_S: Final = 0.2  # between sentences


class VitsSpeech(TtsModel):
    """One voice. Equal arguments and seeds give equal sound. Safe to share between threads.  [FM-TTS-1..3]"""

    def __init__(
        self, model: VitsModel, reader: TextReader, *, seed: int = 0, controls: SpeechControls | None = None
    ) -> None:
        """`seed`: of the generator that every call starts anew."""
        self.model = model
        self.reader = reader
        self._seed = seed
        self._controls = controls

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.model.config.sampling_rate

    def synthesize(self, text: str, speaker: SpeakerRef | None) -> AudioBuffer:
        """[FM-TTS-1..3]"""
        if speaker is not None:
            raise UnsupportedError("synthesize: got a speaker, expected None: this model has only its own voice")
        return AudioBuffer(self.sample_rate, np.concatenate(list(self.pieces(self.reader.read(text)))))

    def pieces(self, utterance: Utterance) -> Iterator[NDArray[np.float32]]:
        """The same as it is spoken: sentence, pause, sentence (extension).  [FM-VITS-11]

        Raises ModelError at once if there is nothing to speak.
        """
        if not utterance.sentences:
            ignored = f"; no sound for {' '.join(utterance.ignored[:20])}" if utterance.ignored else ""
            raise ModelError(f"synthesize: nothing in the text can be spoken{ignored:.200}")
        return self._pieces(utterance)

    def _pieces(self, utterance: Utterance) -> Iterator[NDArray[np.float32]]:
        generator = np.random.default_rng(self._seed)
        for index, ids in enumerate(utterance.sentences):
            if index:
                yield np.zeros(round(_PAUSE_S * self.sample_rate), np.float32)
            yield self.model.speak(ids, generator.standard_normal, self._controls)
