"""`ferrum-ref embed`: tables, JSON, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.cli import embed
from ferrum_ref.program import OneLineParser, run_program


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of the words "a" ... "e", not normalised."""
    import torch
    from transformers import BertConfig, BertModel

    found = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=6,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=4,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    model.save_pretrained(found)
    vocabulary = {word: index for index, word in enumerate("?abcde")}
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }
    (found / "tokenizer.json").write_text(json.dumps(tokenizer))
    return found


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        parser = OneLineParser(prog="ferrum-ref")
        embed.add_parser(parser.add_subparsers(dest="command", parser_class=OneLineParser))
        try:
            code = run_program("ferrum-ref", parser.parse_args(["embed", *arguments]))
        except SystemExit as ended:
            code = int(str(ended.code))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.clause("FM-CLI-1")
def test_json_holds_every_number(run: Run, directory: Path) -> None:
    from ferrum_ref.families import load_embedder

    texts = ["a b c", "é", "a b c d e"]
    code, out, err = run(str(directory), *texts, "--json")
    assert (code, err) == (0, "")
    facts: dict[str, Any] = json.loads(out)
    assert (facts["dim"], facts["pooling"], facts["normalized"], facts["max_tokens"]) == (8, "mean", False, 4)
    assert [each["num_tokens"] for each in facts["embeddings"]] == [3, 1, 4]
    assert [each["text"] for each in facts["embeddings"]] == texts
    exact = load_embedder(directory).embed_texts(texts)
    read = np.array([each["embedding"] for each in facts["embeddings"]])
    assert np.array_equal(read.astype(np.float32), exact)
    assert max(len(str(number)) for each in facts["embeddings"] for number in each["embedding"]) <= 16
    lengths = np.sqrt((exact.astype(np.float64) ** 2).sum(-1))
    some_roundings = 2**-40  # of float64 numbers near 1
    assert np.abs([each["norm"] for each in facts["embeddings"]] - lengths).max() <= some_roundings
    unit = exact / lengths[:, None]
    assert np.abs(facts["cosine"] - unit @ unit.T).max() <= some_roundings


@pytest.mark.clause("FM-CLI-2")
def test_normalize_overrides(run: Run, directory: Path) -> None:
    for option, wanted in (("--normalize", True), ("--no-normalize", False)):
        facts = json.loads(run(str(directory), "a b", "--json", option)[1])
        assert facts["normalized"] is wanted
        assert (abs(facts["embeddings"][0]["norm"] - 1) < 2**-20) is wanted


@pytest.mark.clause("FM-CLI-1")
def test_tables(run: Run, directory: Path) -> None:
    code, out, err = run(str(directory), "a [bold]b[/bold]", "c " * 60)
    assert (code, err) == (0, "")
    assert "Vectors of 8 numbers" in out
    assert "a [bold]b[/bold]" in out
    assert "..." in out
    assert "Cosine" in out
    assert "1.000" in out
    assert "Cosine" not in run(str(directory), "a")[1]


@pytest.mark.clause("FM-CLI-3")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("MODEL", "a", ""), "text 2 is empty"),
        (("no such model", "a"), "neither a file, nor a directory"),
        (("FILE", "a"), "expected the Hugging Face directory of an embedding model"),
        (("MODEL",), "TEXT"),
        (("MODEL", "a", "--backend", "abacus"), "abacus"),
    ],
)
def test_one_line_and_exit_code_2(run: Run, directory: Path, arguments: tuple[str, ...], text: str) -> None:
    places = {"MODEL": str(directory), "FILE": str(directory / "config.json")}
    code, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
