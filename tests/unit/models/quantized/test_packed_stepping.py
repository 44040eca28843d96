"""`generate --packed` and the decode step: stepped where the backend's step reads packed matrices, else by kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ferrum_ref.assembly import load_model
from ferrum_ref.cli import main
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.models.matrix import PackedWeight


@pytest.fixture
def folder(make_quantized: Callable[[str], Any]) -> Path:
    """A quantised directory with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = Path(make_quantized("gptq 4").write())
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.clause("EN-GENERATE-5", "EN-GENERATE-6", "LM-LOAD-5")
def test_packed_matrices_that_the_step_does_not_take(folder: Path, capsys: Any) -> None:
    loaded = load_model(folder, "torch", packed=True)
    assert isinstance(loaded.decoder.weights.layers[0].qkv, PackedWeight)
    with pytest.raises(UnsupportedError, match="packed matrix"):
        loaded.new_stepped_llm()
    words = ["generate", str(folder), "w5 w6 w7", "--backend", "torch", "--max-tokens", "9", "--json"]
    answers = []
    for options in (["--packed"], []):
        assert main.main([*words, *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer["decode"] for answer in answers] == ["kernels", "step"]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert main.main([*words, "--packed", "--decode", "step"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "packed matrix" in captured.err


@pytest.mark.clause("EN-GENERATE-5", "LM-LOAD-5")
def test_packed_matrices_are_stepped_as_they_lie(folder: Path, capsys: Any) -> None:
    pytest.importorskip("numba")
    words = ["generate", str(folder), "w5 w6 w7", "--backend", "numba-cpu", "--packed", "--max-tokens", "9", "--json"]
    answers = []
    for decode in ("kernels", "step"):
        assert main.main([*words, "--decode", decode]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer.pop("decode") for answer in answers] == ["kernels", "step"]
    assert answers[0] == answers[1]
