"""Windows, segments, languages: a scripted model for what is written, a random one against transformers' generate()."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.families import load_transcriber
from ferrum_ref.interfaces.families import Transcriber
from ferrum_ref.interfaces.families_data import TranscriptSegment
from ferrum_ref.models.audio.mel import log_mel, mel_filters
from ferrum_ref.models.whisper_tokens import WhisperTokens
from ferrum_ref.models.whisper_transcriber import WhisperTranscriber

END, START, EN, DE, TRANSCRIBE, SILENCE, FIRST, VOCAB = 60, 61, 62, 63, 65, 68, 70, 91
TOKENS = WhisperTokens(
    vocab_size=VOCAB, start=START, end=END, transcribe=TRANSCRIBE, no_timestamps=69, no_speech=SILENCE,
    languages={"en": EN, "de": DE}, suppressed=(START, 64, TRANSCRIBE, 66, 67, SILENCE, 69), suppressed_first=(END,),
)  # fmt: skip
WINDOW = 6400  # samples: 0.4 s, 20 steps


class Script:
    """A model that writes, window by window, what it is told; it remembers the prompts and the windows it was given."""

    def __init__(self, *windows: Sequence[int], language: int = DE, silence: float = 0.0, margin: float = 20.0) -> None:
        self.config = SimpleNamespace(num_mel_bins=8, num_frames=40, window_samples=WINDOW, max_target_positions=32)
        self.windows = [list(each) for each in windows]
        self.language, self.silence, self.margin = language, silence, margin
        self.prompts: list[list[int]] = []
        self.heard: list[Any] = []
        self.left: list[int] = []

    def encode(self, features: Any) -> None:
        self.heard.append(features)

    def new_cache(self) -> Any:
        return SimpleNamespace(length=0)

    def attend_to(self, cache: Any, encoded: Any) -> None:
        self.left = [*self.windows.pop(0), END]

    def decode(self, cache: Any, tokens: Sequence[int]) -> Any:
        cache.length += len(tokens)
        logits = np.zeros(VOCAB, np.float32)
        if list(tokens) == [START]:
            logits[self.language] = 5
            others = np.delete(logits, SILENCE)
            logits[SILENCE] = np.log(np.exp(others).sum() * self.silence / max(1e-9, 1 - self.silence) + 1e-9)
            return logits
        if len(tokens) > 1:
            self.prompts.append(list(tokens))
        logits[self.left.pop(0) if self.left else END] = self.margin
        return logits


def listen(script: Script, samples: int, language: str | None = None) -> list[tuple[float, float, str]]:
    transcriber = WhisperTranscriber(script, TOKENS, lambda ids: " ".join(f"w{each}" for each in ids))  # type: ignore[arg-type]
    found = transcriber.transcribe(np.full(samples, 0.1, np.float32), language)
    return [(round(each.start_sec, 6), round(each.end_sec, 6), each.text) for each in found]


@pytest.mark.clause("FM-WHISPER-15", "FM-WHISPER-13", "FM-SPEECH-1")
def test_windows_follow_what_was_settled() -> None:
    script = Script(
        [FIRST, 5, FIRST + 4, FIRST + 4, 6],  # settled up to step 4: 0.08 s
        [FIRST + 1, 6, FIRST + 12],  # from 0.08 s on, all of it
        [FIRST, 7, FIRST + 20],
    )
    assert listen(script, 2 * WINDOW) == [(0, 0.08, "w5"), (0.1, 0.32, "w6"), (0.48, 0.8, "w7")]
    filters = mel_filters(8)
    for start, features in zip((0, 1280, 7680), script.heard, strict=True):
        piece = np.full(min(WINDOW, 2 * WINDOW - start), 0.1, np.float32)
        np.testing.assert_array_equal(features, log_mel(piece, 40, filters))


@pytest.mark.clause("FM-WHISPER-15")
def test_rests_that_are_not_heard() -> None:
    assert listen(Script(), 0) == []
    assert listen(Script(), 1599) == []
    assert listen(Script([FIRST, 5, FIRST + 5]), 1600) == [(0, 0.1, "w5")]
    assert len(listen(Script([FIRST, 5, FIRST + 20]), WINDOW + 1599)) == 1
    assert len(listen(Script([FIRST, 5, FIRST + 20], [FIRST, 6]), WINDOW + 1600)) == 2


@pytest.mark.clause("FM-WHISPER-15")
def test_a_window_that_settles_nothing_is_not_heard_forever() -> None:
    script = Script([FIRST, 5], [FIRST, 6], silence=0.7, margin=2.0)
    assert listen(script, 2 * WINDOW) == []
    assert len(script.heard) == 2


@pytest.mark.clause("FM-SPEECH-1")
def test_times_lie_within_the_sound_and_never_go_back() -> None:
    script = Script([FIRST + 2, 5, FIRST + 12, FIRST + 12, 6, FIRST + 20])  # the sound ends at step 10
    assert listen(script, 3200) == [(0.04, 0.2, "w5"), (0.2, 0.2, "w6")]


@pytest.mark.clause("FM-WHISPER-15")
def test_spans_without_text_are_left_out() -> None:
    script = Script([FIRST, 5, FIRST + 4, FIRST + 4, 6, FIRST + 8])
    transcriber = WhisperTranscriber(script, TOKENS, lambda ids: "  \n" if ids == (5,) else " b ")  # type: ignore[arg-type]
    (segment,) = transcriber.transcribe(np.ones(WINDOW, np.float32), None)
    assert (segment.text, round(segment.start_sec, 6)) == ("b", 0.08)


@pytest.mark.clause("FM-WHISPER-16", "FM-SPEECH-2")
def test_the_language_is_decided_once() -> None:
    script = Script([FIRST, 5], [FIRST, 6])
    script.language = DE
    listen(script, 2 * WINDOW)
    assert script.prompts == [[DE, TRANSCRIBE]] * 2
    given_language = Script([FIRST, 5])
    listen(given_language, WINDOW, "en")
    assert given_language.prompts == [[EN, TRANSCRIBE]]
    transcriber = WhisperTranscriber(Script([]), TOKENS, str)  # type: ignore[arg-type]
    assert transcriber.detect_language(np.ones(WINDOW, np.float32)) == "de"

    class Undecided(Script):
        def attend_to(self, cache: Any, encoded: Any) -> None:
            self.language = (EN, DE)[len(self.heard) - 1]
            super().attend_to(cache, encoded)

    undecided = Undecided([FIRST, 5], [FIRST, 6])
    listen(undecided, 2 * WINDOW)
    assert undecided.prompts == [[EN, TRANSCRIBE]] * 2


@pytest.mark.clause("FM-WHISPER-14")
@pytest.mark.parametrize(
    ("silence", "margin", "heard"), [(0.7, 2.0, False), (0.7, 20.0, True), (0.5, 2.0, True), (0.0, 2.0, True)]
)
def test_windows_in_which_nobody_speaks(silence: float, margin: float, heard: bool) -> None:
    # a margin of 2 over 90 others: each token has a log probability far below -1
    script = Script([FIRST, 5, FIRST + 20], silence=silence, margin=margin)
    assert bool(listen(script, WINDOW)) is heard


@pytest.mark.clause("FM-WHISPER-14", "FM-WHISPER-16")
def test_digital_silence_is_not_even_listened_to() -> None:
    script = Script([FIRST, 5])
    transcriber = WhisperTranscriber(script, TOKENS, lambda ids: "text")  # type: ignore[arg-type]
    sound = np.zeros(2 * WINDOW, np.float32)
    sound[WINDOW + 9] = 0.1
    windows = list(transcriber.windows(sound, None))
    assert [(len(each.segments), each.language, each.heard_samples) for each in windows] == [
        (0, None, WINDOW),
        (1, "de", 2 * WINDOW),
    ]
    assert len(script.heard) == 1


@pytest.mark.clause("FM-WHISPER-12")
def test_a_window_holds_so_many_tokens() -> None:
    script = Script([FIRST, *range(40)])
    ((_, _, text),) = listen(script, WINDOW)
    assert len(text.split()) == 15  # 16 tokens, half of 32, with the timestamp


@pytest.mark.clause("FM-SPEECH-1")
@settings(max_examples=40)
@given(data=st.data(), count=st.integers(0, 30_000))
def test_segments_are_in_order_whatever_is_written(data: st.DataObject, count: int) -> None:
    token = st.one_of(st.integers(0, 59), st.integers(FIRST, VOCAB - 1))
    script = Script(*data.draw(st.lists(st.lists(token, max_size=9), min_size=20, max_size=20)))
    script.windows += [[FIRST, 5, FIRST + 20]] * 1000
    found = listen(script, count)
    times = [time for start, end, _ in found for time in (start, end)]
    assert times == sorted(times)
    assert not times or (times[0] >= 0 and times[-1] <= np.float32(count / 16000) + 2**-20)


@pytest.mark.clause("FM-SPEECH-2", "FM-SPEECH-3")
def test_arguments_that_are_refused_at_once(whisper_directory: Path) -> None:
    transcriber = load_transcriber(whisper_directory)
    assert isinstance(transcriber, Transcriber)
    assert transcriber.sample_rate == 16000
    with pytest.raises(UnsupportedError, match="language 'xx', expected one of de, en"):
        transcriber.windows(np.zeros(100, np.float32), "xx")
    with pytest.raises(UnsupportedError, match="language 'EN'"):
        transcriber.transcribe(np.zeros(0, np.float32), "EN")
    for wrong in (np.array([0, np.inf]), np.array([np.nan]), np.zeros((2, 2))):
        with pytest.raises(InvalidParameterError, match="transcribe: sample"):
            transcriber.transcribe(wrong.astype(np.float32), None)
        with pytest.raises(InvalidParameterError, match="detect_language"):
            transcriber.detect_language(wrong.astype(np.float32))


def sound(seed: int, count: int) -> Any:
    return (np.random.default_rng(seed).standard_normal(count) * 0.2).astype(np.float32)


@pytest.mark.clause("FM-SPEECH-3", "FM-SPEECH-1")
def test_pure(whisper_directory: Path) -> None:
    transcriber = load_transcriber(whisper_directory)
    heard = sound(0, 9000)
    kept = heard.copy()
    first = transcriber.transcribe(heard, None)
    transcriber.transcribe(sound(1, 5000), "en")
    assert transcriber.transcribe(heard, None) == first
    np.testing.assert_array_equal(heard, kept)
    assert transcriber.transcribe(np.zeros(0, np.float32), None) == []
    assert all(isinstance(each, TranscriptSegment) for each in first)


@pytest.mark.clause("FM-WHISPER-12", "FM-WHISPER-16", "FM-WHISPER-10")
@pytest.mark.parametrize("seed", range(6))
def test_the_tokens_that_generate_writes(
    whisper_directory: Path,
    new_whisper: Callable[..., Any],
    save_whisper: Callable[..., Path],
    tmp_path: Path,
    seed: int,
) -> None:
    """transformers' greedy generate(), in float64, of one window, with its own language detection."""
    import torch

    model = new_whisper(seed)
    transcriber = load_transcriber(save_whisper(tmp_path, model))
    written: list[tuple[int, ...]] = []
    inner = transcriber._write
    transcriber._write = lambda *args: written.append(found := inner(*args)) or found  # type: ignore
    heard = sound(seed, 6400)
    list(transcriber.windows(heard, None))
    settings = {
        "suppress_tokens": [1, 2, 64, 66, 67, 68, 61, 65],
        "begin_suppress_tokens": [3, END],
        "no_timestamps_token_id": 69,
        "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": 64},
        "is_multilingual": True,
        "max_initial_timestamp_index": 50,
        "max_length": 19,
        "eos_token_id": END,
        "pad_token_id": END,
        "bos_token_id": END,
        "decoder_start_token_id": START,
        "forced_decoder_ids": None,
        "return_timestamps": True,
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    features = torch.from_numpy(log_mel(heard, 40, mel_filters(8)))[None].double()
    with torch.no_grad():
        ids = model.double().generate(features, return_timestamps=True, task="transcribe", do_sample=False, num_beams=1)
    expected = [token for token in ids[0].tolist() if token not in (START, EN, DE, TRANSCRIBE, END)]
    found = [token for token in written[0] if token not in (EN, DE)]
    pairs = [index for index in range(1, len(found)) if min(found[index - 1 : index + 1]) >= FIRST]
    length = min([len(expected), len(found), *pairs[-1:]])  # what follows the last pair is heard again, there and here
    assert length >= 3
    assert found[:length] == expected[:length]
