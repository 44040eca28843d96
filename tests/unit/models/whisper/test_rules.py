"""Which token may follow, against transformers' logits processors; what a window's tokens tell of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.whisper_rules import Span, allowed, log_probability, spans
from ferrum_ref.models.whisper_tokens import WhisperTokens

FIRST, VOCAB = 70, 140  # 70 timestamps: 0.00 to 1.38 s
TEXTS = {
    60: "<|endoftext|>", 61: "<|startoftranscript|>", 62: "<|en|>", 63: "<|haw|>", 64: "<|translate|>",
    65: "<|transcribe|>", 66: "<|startoflm|>", 67: "<|startofprev|>", 68: "<|nocaptions|>", 69: "<|notimestamps|>",
}  # fmt: skip
SUPPRESSED, BEGIN = [1, 2, 7], [3, 60]


def tokens(**changes: Any) -> WhisperTokens:
    generation = {"suppress_tokens": SUPPRESSED, "begin_suppress_tokens": BEGIN, **changes}
    ids = {text: number for number, text in TEXTS.items()}
    return WhisperTokens.from_vocabulary(ids.get, TEXTS.get, VOCAB, generation, "here")


def transformers_mask(logits: np.ndarray, written: list[int]) -> np.ndarray:
    """The three processors that generate() uses for transcripts with times."""
    config = transformers.GenerationConfig(eos_token_id=60, bos_token_id=60)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = 69, 50
    prompt = [61, 62, 65]
    ids = torch.tensor([prompt + written])
    scores = torch.from_numpy(logits)[None]
    always = [*SUPPRESSED, 61, 64, 65, 66, 67, 68]
    for process in (
        transformers.SuppressTokensLogitsProcessor(always),
        transformers.SuppressTokensAtBeginLogitsProcessor(BEGIN, 3),
        transformers.WhisperTimeStampLogitsProcessor(config, begin_index=3),
    ):
        scores = process(ids, scores)
    return scores[0].numpy()


TOKEN = st.one_of(st.integers(0, 60), st.integers(FIRST, VOCAB - 1))


@pytest.mark.clause("FM-WHISPER-12", "FM-WHISPER-11")
@given(written=st.lists(TOKEN, max_size=6), seed=st.integers(0, 10**6), lift=st.floats(-6, 6))
def test_what_transformers_allows(written: list[int], seed: int, lift: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
    logits[FIRST:] += np.float32(lift)  # so that the weight of all timestamps falls on either side
    expected = transformers_mask(logits.astype(np.float64), written)
    found = allowed(logits, written, tokens())
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    kept = ~np.isneginf(found)
    np.testing.assert_array_equal(found[kept], logits[kept])


@pytest.mark.clause("FM-WHISPER-12")
def test_examples() -> None:
    def may_follow(*written: int) -> set[int]:
        return set(np.flatnonzero(np.isfinite(allowed(np.zeros(VOCAB, np.float32) + text, written, tokens()))).tolist())

    text = np.where(np.arange(VOCAB) < FIRST, 9, 0).astype(np.float32)  # text is likelier than all timestamps
    assert may_follow() == set(range(FIRST, FIRST + 51))
    assert may_follow(FIRST) == set(range(61)) - {1, 2, 7} | {62, 63}
    assert max(may_follow(FIRST, 5)) == VOCAB - 1
    assert may_follow(FIRST, 5, 80) == {60, 62, 63, *range(80, VOCAB)}
    assert FIRST not in may_follow(FIRST, 5)
    assert 80 not in may_follow(FIRST, 5, 80, 80, 6)
    text[FIRST:] = 9  # seventy together outweigh each text
    assert min(may_follow(FIRST, 5)) == FIRST + 1


@pytest.mark.clause("FM-WHISPER-13")
@pytest.mark.parametrize(
    ("written", "found", "settled"),
    [
        ([], [Span(0, 20, ())], 20),
        ([FIRST, 5, 6, FIRST + 9], [Span(0, 9, (5, 6))], 20),  # closed by one timestamp
        ([FIRST + 2, 5, 6], [Span(0, 2, (5, 6))], 20),  # never closed: its only timestamp ends it
        ([FIRST, 5, 6], [Span(0, 20, (5, 6))], 20),
        ([FIRST, 5, FIRST + 4, FIRST + 6, 6, FIRST + 9], [Span(0, 4, (5,)), Span(6, 9, (6,))], 20),
        ([FIRST, 5, FIRST + 4, FIRST + 4, 6], [Span(0, 4, (5,))], 4),  # the rest is heard again
        ([FIRST, 5, FIRST + 4, FIRST + 6], [Span(0, 4, (5,))], 4),
        ([FIRST, 5, FIRST + 4, FIRST + 4, 6, FIRST + 8, FIRST + 9, 7],
         [Span(0, 4, (5,)), Span(4, 8, (6,))], 8),
    ],
)  # fmt: skip
def test_spans(written: list[int], found: list[Span], settled: int) -> None:
    assert spans(written, tokens(), 20) == (found, settled)


@pytest.mark.clause("FM-WHISPER-13")
@given(st.lists(TOKEN, max_size=12))
def test_any_tokens_make_spans(written: list[int]) -> None:
    found, settled = spans(written, tokens(), 20)
    assert all(each.start <= each.end for each in found)
    assert settled >= 0


@pytest.mark.clause("FM-WHISPER-14")
def test_log_probability() -> None:
    values = np.array([1.0, -np.inf, 3.0, 700.0])
    for token in (0, 2, 3):
        assert log_probability(values, token) == pytest.approx(log_softmax(values)[token])


@pytest.mark.clause("FM-WHISPER-10", "FM-WHISPER-11")
def test_roles() -> None:
    found = tokens()
    assert dict(found.languages) == {"en": 62, "haw": 63}
    assert (found.start, found.end, found.transcribe, found.no_speech, found.first_timestamp) == (61, 60, 65, 68, 70)
    assert found.suppressed == (1, 2, 7, 61, 64, 65, 66, 67, 68, 69)
    assert found.suppressed_first == (3, 60)
    by_other_names = tokens(suppress_tokens=None, begin_suppress_tokens=[-1])
    assert by_other_names.suppressed == (61, 64, 65, 66, 67, 68, 69)
    assert by_other_names.suppressed_first == ()
    ids = {text: number for number, text in TEXTS.items()}
    settings = {"suppress_ids": [4], "suppress_ids_begin": [5]}
    ct2 = WhisperTokens.from_vocabulary(ids.get, TEXTS.get, VOCAB, settings, "here")
    assert 4 in ct2.suppressed
    assert ct2.suppressed_first == (5,)
    plain = WhisperTokens.from_vocabulary(ids.get, TEXTS.get, VOCAB, {}, "here")
    assert plain.suppressed == by_other_names.suppressed


@pytest.mark.clause("FM-WHISPER-10", "FM-SPEECH-2")
def test_a_model_of_one_language() -> None:
    texts = {number: text for number, text in TEXTS.items() if number not in (62, 63, 64, 65)}
    ids = {text: number for number, text in texts.items()}
    found = WhisperTokens.from_vocabulary(ids.get, texts.get, VOCAB, {}, "here")
    assert found.transcribe is None
    assert found.language_token("en") is None
    with pytest.raises(UnsupportedError, match="'de', expected 'en'"):
        found.language_token("de")
    with pytest.raises(UnsupportedError, match="'xx', expected one of en, haw"):
        tokens().language_token("xx")
    assert tokens().language_token("haw") == 63


@pytest.mark.clause("FM-WHISPER-10", "FM-WHISPER-11")
def test_vocabularies_that_are_refused() -> None:
    ids = {text: number for number, text in TEXTS.items()}
    for missing in ("<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>", "<|transcribe|>"):
        fewer = {text: number for text, number in ids.items() if text != missing}
        with pytest.raises(InvalidFormatError, match="got None, expected an id"):
            WhisperTokens.from_vocabulary(fewer.get, TEXTS.get, VOCAB, {}, "here")
    with pytest.raises(InvalidFormatError, match="got 69, expected an id below 65"):
        WhisperTokens.from_vocabulary(ids.get, TEXTS.get, 65, {}, "here")
    for wrong in ([VOCAB], [-2], ["1"], 5, [True], {}):
        with pytest.raises(InvalidFormatError, match="here: suppress_tokens: got"):
            tokens(suppress_tokens=wrong)
