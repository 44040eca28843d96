"""VITS over KernelOps and TensorOps: ids of letters or phonemes become samples. Any ComputeBackend runs it.

    h, m, s  = text encoder(ids)                              rows, and a Gauss distribution for each
    d_i      = ceil(exp(duration predictor(h_i; noise)) / speed)
    z_t      = m_i + noise exp(s_i) noise_scale               row i for its d_i moments
    samples  = vocoder(flow^-1(z))

Source: Kim, Kong, Son 2021 (VITS).  Clauses: FM-VITS-5..10 (specs/audio.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.models.audio.convolution import ConvolutionOps
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_durations import DurationPredictor
from ferrum_ref.models.vits_flow import CouplingFlows
from ferrum_ref.models.vits_text import TextEncoder
from ferrum_ref.models.vits_vocoder import Vocoder
from ferrum_ref.models.vits_weights import VitsWeights

Noise = Callable[[tuple[int, int]], NDArray[np.float64]]
"""Independent draws from N(0, 1) of the given shape."""

_MAX_ROWS: Final = 1 << 16  # of the flow: about 12 minutes of speech


@dataclass(frozen=True, slots=True)
class SpeechControls:
    """How to speak: `speed` 2 is twice as fast; noise scales as in the model's files where None.  [FM-VITS-9]

    Raises InvalidParameterError unless speed lies in [0.1, 10] and the scales in [0, 4].
    """

    speed: float = 1.0
    noise_scale: float | None = None
    noise_scale_duration: float | None = None

    def __post_init__(self) -> None:
        if not 0.1 <= self.speed <= 10:
            raise InvalidParameterError(f"speech: speed: got {self.speed}, expected 0.1 to 10")
        for name in ("noise_scale", "noise_scale_duration"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 4:
                raise InvalidParameterError(f"speech: {name}: got {value}, expected 0 to 4")


class VitsModel:
    """Stateless: noise comes from the caller. Safe to share between threads."""

    def __init__(self, config: VitsConfig, weights: VitsWeights, backend: ComputeBackend) -> None:
        """Raises UnsupportedError if the backend lacks a kernel, or the activation is unknown."""
        self.config = config
        ops = ConvolutionOps(backend, "VitsModel")
        self._ops = ops
        self.text = TextEncoder(config, weights, backend, ops)
        self.durations = DurationPredictor(config, weights, ops)
        self.flows = CouplingFlows(config, weights, ops)
        self.vocoder = Vocoder(config, weights, ops)

    def speak(self, ids: Sequence[int], noise: Noise, controls: SpeechControls | None = None) -> NDArray[np.float32]:
        """Samples of the ids, at config.sampling_rate.  Pure but for what `noise` does.  [FM-VITS-5..10]

        `noise` is asked twice: for (2, number of ids), then for (flow_size, number of moments).
        Raises ModelError (no id), InvalidParameterError (id outside the vocabulary), ResourceExhaustedError (more than
        65536 moments).
        """
        controls = controls or SpeechControls()
        self._require_ids(ids)
        hidden, means, log_deviations = self.text.encode(ids)
        scale = controls.noise_scale_duration
        scale = self.config.noise_scale_duration if scale is None else scale
        log_durations = self.durations.predict(hidden, scale * noise((2, len(ids))))
        counts = self.row_counts(log_durations, controls.speed)
        owner = np.repeat(np.arange(len(ids)), counts)
        scale = self.config.noise_scale if controls.noise_scale is None else controls.noise_scale
        drawn = noise((self.config.flow_size, len(owner))).T
        latent = means[owner] + drawn * np.exp(log_deviations[owner]) * scale
        return self.vocoder.samples(self.flows.inverse(self._ops.rows(latent)))

    def row_counts(self, log_durations: NDArray[np.float64], speed: float) -> NDArray[np.int64]:
        """ceil(exp(log duration) / (speaking_rate speed)) moments for each id, one in all at least.  [FM-VITS-8]"""
        with np.errstate(over="ignore"):
            lengths = np.ceil(np.exp(log_durations) / (self.config.speaking_rate * speed))
        total = float(lengths.sum())
        if not total <= _MAX_ROWS:
            raise ResourceExhaustedError(
                f"speech: {len(lengths)} ids would take {total:.0f} moments, expected at most {_MAX_ROWS}; "
                "split the text"
            )
        counts = lengths.astype(np.int64)
        if not counts.any():
            counts[-1] = 1
        return counts

    def _require_ids(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise ModelError("speech: no id, expected at least one")
        for each in ids:
            if not 0 <= each < self.config.vocab_size:
                raise InvalidParameterError(f"speech: id must be in [0, {self.config.vocab_size}), got {each}")
