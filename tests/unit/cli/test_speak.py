"""`ferrum-ref speak`: files, JSON, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ferrum_ref.cli import speak
from ferrum_ref.families import load_speech
from ferrum_ref.formats.wav import wav_from_bytes
from ferrum_ref.models.audio import espeak
from ferrum_ref.models.audio.phonemes import PhonemeReader
from ferrum_ref.models.vits_speech import VitsSpeech
from ferrum_ref.program import OneLineParser, run_program


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random voice of the letters a ... e."""
    found = tmp_path_factory.mktemp("voice")
    torch.manual_seed(0)
    config = transformers.VitsConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, flow_size=4,
        spectrogram_bins=5, upsample_initial_channel=4, upsample_rates=[4], upsample_kernel_sizes=[8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], duration_predictor_num_flows=2,
        prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        depth_separable_num_layers=1, sampling_rate=8000,
    )  # fmt: skip
    transformers.VitsModel(config).save_pretrained(found)
    (found / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate("_ abcde")}))
    (found / "tokenizer_config.json").write_text('{"phonemize": false}')
    return found


@pytest.fixture
def phonemes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same voice as if it read phonemes."""
    import ferrum_ref.families

    table = {letter: (index,) for index, letter in enumerate("_ abcde")}

    def load(*args: Any, **options: Any) -> VitsSpeech:
        loaded = load_speech(*args, **options)
        phonemize = espeak.EspeakPhonemizer("en-us", ("/nowhere/espeak-ng",))
        return VitsSpeech(loaded.model, PhonemeReader(table, phonemize), seed=options["seed"])

    monkeypatch.setattr(ferrum_ref.families, "load_speech", load)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        parser = OneLineParser(prog="ferrum-ref")
        speak.add_parser(parser.add_subparsers(dest="command", parser_class=OneLineParser))
        try:
            code = run_program("ferrum-ref", parser.parse_args(["speak", *map(str, arguments)]))
        except SystemExit as ended:
            code = int(str(ended.code))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.clause("FM-CLI-6", "FM-TTS-1")
def test_a_file_is_written(run: Run, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    code, out, err = run("abc de", "--out", path, "--model", directory)
    expected = load_speech(directory).synthesize("abc de", None)
    sound = wav_from_bytes(path.read_bytes())
    assert (code, err) == (0, "")
    assert out == f"{path}: {expected.duration_s:.2f} s at 8000 Hz\n"
    assert sound.sample_rate == 8000
    assert np.abs(sound.mono() - np.clip(expected.samples, -1, 1)).max() <= 1.5 * 2**-15
    content = path.read_bytes()
    code, out, _ = run("abc de", "--out", path, "--model", directory, "--json")
    assert path.read_bytes() == content
    assert json.loads(out) == {
        "model": str(directory),
        "file": str(path),
        "sample_rate": 8000,
        "num_samples": len(expected.samples),
        "duration_s": expected.duration_s,
        "num_sentences": 1,
        "ignored": [],
    }
    run("abc de", "--out", path, "--model", directory, "--seed", "7")
    assert path.read_bytes() != content
    run("abc de", "--out", path, "--model", directory, "--speed", "0.25")
    assert len(path.read_bytes()) > 2 * len(content)


@pytest.mark.clause("FM-CLI-7", "FM-CLI-6")
def test_what_the_voice_does_not_know_is_told(run: Run, directory: Path, tmp_path: Path) -> None:
    code, out, err = run("abz!", "--out", tmp_path / "x.wav", "--model", directory, "--json")
    assert code == 0
    assert err == "ferrum-ref: note: the voice has no sound for z !\n"
    assert json.loads(out)["ignored"] == ["z", "!"]


@pytest.mark.clause("FM-CLI-6")
@pytest.mark.usefixtures("phonemes")
def test_phonemes(run: Run, directory: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.wav", tmp_path / "two.wav"
    assert run("--phonemes", "abc", "--out", one, "--model", directory)[0] == 0
    assert run("[[abc]]", "--out", two, "--model", directory)[0] == 0
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.clause("FM-CLI-7")
@pytest.mark.usefixtures("phonemes")
def test_plain_text_without_espeak(run: Run, directory: Path, tmp_path: Path) -> None:
    code, out, err = run("hello", "--out", tmp_path / "x.wav", "--model", directory)
    assert (code, out) == (2, "")
    assert "install espeak-ng" in err
    assert not (tmp_path / "x.wav").exists()


@pytest.mark.clause("FM-CLI-7")
def test_refusals(run: Run, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    for arguments, message in (
        (("--out", path, "--model", directory), "either a text or --phonemes"),
        (("a", "--phonemes", "a", "--out", path, "--model", directory), "either a text or --phonemes"),
        (("", "--out", path, "--model", directory), "nothing in the text can be spoken"),
        (("xyz", "--out", path, "--model", directory), "no sound for x y z"),
        (("--phonemes", "a", "--out", path, "--model", directory), "this voice reads letters"),
        (("a", "--out", path, "--model", directory, "--speed", "0"), "speed: got 0"),
        (("a", "--out", path, "--model", directory, "--seed", "-1"), "seed -1"),
        (("a", "--out", tmp_path / "no" / "x.wav", "--model", directory), "No such file"),
        (("a", "--out", path, "--cache-dir", tmp_path), "ferrum-ref pull piper-joe"),
        (("a", "--model", directory), "--out"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.count("\n") == 1
    assert not path.exists()
