"""From text to ids: Piper's layout, transformers' VitsTokenizer, espeak-ng."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, UnsupportedError
from ferrum_ref.models.audio.espeak import EspeakPhonemizer
from ferrum_ref.models.audio.phonemes import letter_reader, phoneme_reader, phonemes_of

TABLE = {
    "_": [0],
    "^": [1],
    "$": [2],
    " ": [3],
    "a": [4],
    "b": [5, 6],
    ".": [7],
    "?": [8],
    "ˈ": [9],
    "c": [10],
    "̧": [11],
}
VOICE = {"phoneme_id_map": TABLE}


def no_phonemes(text: str) -> str:
    raise AssertionError(f"phonemised {text!r}")


def reader(**changes: object) -> object:
    return phoneme_reader({**VOICE, **changes}, 12, no_phonemes, "here")


@pytest.mark.clause("FM-PHONEME-1", "FM-PHONEME-3")
def test_ids_of_phonemes() -> None:
    found = phoneme_reader(VOICE, 12, no_phonemes, "here")
    assert found.read_phonemes("ab").sentences == ((1, 0, 4, 0, 5, 6, 0, 2),)
    assert found.read_phonemes("  ˈa b.  a? ").sentences == (
        (1, 0, 9, 0, 4, 0, 3, 0, 5, 6, 0, 7, 0, 2),
        (1, 0, 4, 0, 8, 0, 2),
    )
    assert found.read_phonemes("a.b").sentences == ((1, 0, 4, 0, 7, 0, 5, 6, 0, 2),)  # no space, no end
    assert found.read_phonemes("ç").sentences == ((1, 0, 10, 0, 11, 0, 2),)  # taken apart


@pytest.mark.clause("FM-PHONEME-3")
def test_what_cannot_be_spoken() -> None:
    found = phoneme_reader(VOICE, 12, no_phonemes, "here")
    for silent in ("", " ", ".", "ˈ ?", "%", "? . ."):
        assert found.read_phonemes(silent).sentences == ()
    some = found.read_phonemes("a1%b 1 .. %. a")
    assert some.ignored == ("1", "%")
    assert some.sentences[0][:7] == (1, 0, 4, 0, 5, 6, 0)
    assert len(found.read_phonemes("a. %. b").sentences) == 2


@pytest.mark.clause("FM-PHONEME-2")
def test_phonemes_inside_a_text() -> None:
    asked = []

    def phonemize(text: str) -> str:
        asked.append(text)
        return f" <{text.strip()}> "

    assert phonemes_of("one [[a b]], two [[c]]", phonemize) == "<one> a b <, two> c"
    assert asked == ["one ", ", two "]
    assert phonemes_of("[[a]]. [[b]]!", no_phonemes) == "a . b !"
    assert phonemes_of("[[a\nb]]", no_phonemes) == "a\nb"
    assert phonemes_of("", no_phonemes) == ""
    assert phonemes_of("[[a]", phonemize) == "<[[a]>"


@pytest.mark.clause("FM-PHONEME-1")
def test_voices() -> None:
    as_text = phoneme_reader({**VOICE, "phoneme_type": "text"}, 12, no_phonemes, "here")
    assert as_text.read("A b.") == as_text.read_phonemes("a b.")
    with pytest.raises(UnsupportedError, match="phoneme_type: got 'pinyin'"):
        reader(phoneme_type="pinyin")
    for wrong in (None, {}, []):
        with pytest.raises(InvalidFormatError, match="phoneme_id_map"):
            reader(phoneme_id_map=wrong)
    for ids in ([12], [-1], ["1"], 4, [True]):
        with pytest.raises(InvalidFormatError, match=r"phoneme_id_map: '?a'?: got"):
            reader(phoneme_id_map={"a": ids})


LETTERS = {letter: index for index, letter in enumerate("_ abcdefgh'-Öß")} | {"<unk>": 14}


@pytest.mark.clause("FM-PHONEME-4")
@given(text=st.text(st.sampled_from("abcdefghXÖößA' -.,1Hé"), max_size=20), blanks=st.booleans())
def test_letters_as_transformers(text: str, blanks: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import VitsTokenizer

    path = tmp_path_factory.mktemp("letters") / "vocab.json"
    path.write_text(json.dumps(LETTERS))
    theirs = VitsTokenizer(
        str(path), pad_token="_", unk_token="<unk>", phonemize=False, add_blank=blanks, normalize=True
    )  # fmt: skip
    found = letter_reader(LETTERS, {"phonemize": False, "add_blank": blanks}, 15, "here").read(text)
    if any(each.isalnum() and (each in LETTERS or each.lower() in LETTERS) for each in text):
        assert [list(each) for each in found.sentences] == [theirs(text).input_ids]
    else:
        assert found.sentences == ()
    assert set(found.ignored) <= set(".,1Xxéö")


@pytest.mark.clause("FM-PHONEME-4")
def test_tokenizers_that_are_refused() -> None:
    for settings, field in (({}, "phonemize"), ({"phonemize": False, "is_uroman": True}, "is_uroman")):
        with pytest.raises(UnsupportedError, match=f"here: {field}"):
            letter_reader(LETTERS, settings, 15, "here")
    for wrong in ("1", 15, -1, None):
        with pytest.raises(InvalidFormatError, match="expected an id below 15"):
            letter_reader({"a": wrong}, {"phonemize": False}, 15, "here")


@pytest.fixture
def espeak(tmp_path: Path) -> str:
    """A program that behaves as espeak-ng does: one line a clause, marks of a change of language."""
    script = tmp_path / "espeak-ng"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "words = sys.stdin.read()\n"
        "if 'fail' in words: sys.exit('no such voice')\n"
        "assert sys.argv[1:] == ['-q', '--ipa', '-v', 'en-us', '--stdin'], sys.argv\n"
        "print(' (en)' + words.upper() + '(fr-be)\\n')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.mark.clause("FM-PHONEME-5")
def test_espeak(espeak: str) -> None:
    phonemize = EspeakPhonemizer("en-us", ("/nowhere/espeak-ng", espeak))
    assert phonemize("One two,  three;\nfour... five?!") == "ONE TWO, THREE; FOUR... FIVE?!"
    assert phonemize(" ... ") == ""
    with pytest.raises(FerrumIOError, match="exit code 1: no such voice"):
        phonemize("fail")


@pytest.mark.clause("FM-PHONEME-5")
def test_without_espeak() -> None:
    phonemize = EspeakPhonemizer("en-us", ("/nowhere/espeak-ng", "/nowhere/espeak"))
    with pytest.raises(UnsupportedError, match=r"install espeak-ng .*or give phonemes: \[\["):
        phonemize("one")
    with pytest.raises(FerrumIOError, match="PermissionError"):
        EspeakPhonemizer("en-us", ("/",))("one")
