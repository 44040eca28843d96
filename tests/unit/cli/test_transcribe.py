"""`ferrum-ref transcribe`: lines, JSON, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ferrum_ref.cli import transcribe
from ferrum_ref.families import load_transcriber
from ferrum_ref.formats.wav import wav_bytes
from ferrum_ref.models.audio.resample import resample
from ferrum_ref.program import OneLineParser, run_program

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of the words "w0" ... "w9"."""
    found = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=40, num_mel_bins=4, d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, max_source_positions=20,
        max_target_positions=16, pad_token_id=10, bos_token_id=10, eos_token_id=10, decoder_start_token_id=11,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    model.save_pretrained(found)
    (found / "generation_config.json").write_text("{}")
    added = [{"id": 10 + index, "content": text, "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False} for index, text in enumerate(SPECIAL)]  # fmt: skip
    words = {"type": "WordLevel", "vocab": {f"w{index}": index for index in range(10)}, "unk_token": "w0"}
    (found / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": words}))
    return found


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.wav"
    samples = np.random.default_rng(0).standard_normal(22050) * 0.2
    path.write_bytes(wav_bytes(samples.astype(np.float32), 22050))
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        parser = OneLineParser(prog="ferrum-ref")
        transcribe.add_parser(parser.add_subparsers(dest="command", parser_class=OneLineParser))
        try:
            code = run_program("ferrum-ref", parser.parse_args(["transcribe", *map(str, arguments)]))
        except SystemExit as ended:
            code = int(str(ended.code))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.clause("FM-CLI-4")
def test_lines_and_json(run: Run, directory: Path, sound: Path) -> None:
    from ferrum_ref.formats.wav import wav_from_bytes

    transcriber = load_transcriber(directory)
    pcm = resample(wav_from_bytes(sound.read_bytes()).mono(), 22050, 16000)
    segments = transcriber.transcribe(pcm, None)
    assert segments
    code, out, err = run(sound, "--model", directory)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len(segments)
    for line, segment in zip(lines, segments, strict=True):
        match = re.fullmatch(r"00:(\d\d\.\d\d) - 00:(\d\d\.\d\d)  (.+)", line)
        assert match is not None
        assert (float(match[1]), float(match[2])) == (round(segment.start_sec, 2), round(segment.end_sec, 2))
        assert match[3] == segment.text
    code, out, _ = run(sound, "--model", directory, "--json", "--language", "en")
    facts = json.loads(out)
    assert (code, facts["language"], facts["duration_s"], facts["model"]) == (0, "en", 1.0, str(directory))
    assert facts["text"] == " ".join(each.text for each in segments)
    assert facts["segments"] == [
        {"start_s": round(each.start_sec, 2), "end_s": round(each.end_sec, 2), "text": each.text} for each in segments
    ]
    assert facts["file"] == str(sound)


@pytest.mark.clause("FM-CLI-4")
def test_silence_has_no_lines(run: Run, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    path.write_bytes(wav_bytes(np.zeros(16000, np.float32), 16000))
    assert run(path, "--model", directory) == (0, "", "")
    code, out, _ = run(path, "--model", directory, "--json")
    facts = json.loads(out)
    assert (code, facts["language"], facts["segments"], facts["text"]) == (0, None, [], "")


@pytest.mark.clause("FM-CLI-4")
def test_clock() -> None:
    assert transcribe._clock(0) == "00:00.00"
    assert transcribe._clock(59.999) == "01:00.00"
    assert transcribe._clock(3725.5) == "62:05.50"


@pytest.mark.clause("FM-CLI-5")
def test_refusals(run: Run, directory: Path, sound: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    for arguments, message in (
        ((text, "--model", directory), "read WAV"),
        ((tmp_path / "nowhere.wav", "--model", directory), "no such file"),
        ((tmp_path, "--model", directory), "expected a regular file"),
        ((sound, "--model", directory, "--language", "xx"), "language 'xx', expected one of en"),
        ((sound, "--cache-dir", tmp_path), "ferrum-ref pull whisper-base"),
        ((sound, "--model", tmp_path), "config.json"),
        ((), "FILE.wav"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
