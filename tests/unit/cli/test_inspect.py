"""`ferrum-ref inspect`: the numbers of a real and of a made-up model, as tables and as JSON."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from ferrum_ref.cli import inspect
from ferrum_ref.errors import InvalidFormatError, NotFoundError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", *arguments])
    return int(args.func(args))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("inspect") / "tiny [bold]"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.clause("MD-INSPECT-1")
def test_json_of_a_directory(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(directory), "--json", "--tensors") == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert facts["num_parameters"] == num_parameters
    assert facts["memory"] == {
        "file_bytes": os.path.getsize(directory / "model.safetensors"),
        "stored_weight_bytes": 4 * num_parameters,
        "float32_weight_bytes": 4 * num_parameters,
        "float32_kv_bytes_per_token": 2 * 2 * 2 * 16 * 4,
        "float32_kv_bytes_full_context": 2 * 2 * 2 * 16 * 4 * 2048,
    }
    assert facts["formats"] == [
        {"dtype": "F32", "num_tensors": 20, "num_parameters": num_parameters, "num_bytes": 4 * num_parameters}
    ]
    assert {each["name"]: each["shape"] for each in facts["tensors"]} == {
        name: list(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert facts["tokenizer"]["available"] is False
    assert "tokenizer.json" in facts["tokenizer"]["reason"]


@pytest.mark.clause("MD-INSPECT-1")
def test_tables_of_a_directory(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(directory), "--tensors") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(directory)  # not taken for markup
    for text in ("llama, from safetensors", "model.layers.1.mlp.down_proj.weight", "64 x 96", "512 B a token", "none:"):
        assert text in out


@pytest.mark.clause("MD-INSPECT-1")
@pytest.mark.model
def test_the_real_model(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(smollm2_path), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["architecture"] == "llama"
    assert [(each["dtype"], each["num_tensors"]) for each in facts["formats"]] == [
        ("Q4_1", 210),
        ("Q8_0", 1),
        ("F32", 61),
    ]
    assert facts["num_parameters"] == 134_515_008
    assert facts["memory"]["file_bytes"] == 98_362_432
    assert facts["memory"]["float32_kv_bytes_per_token"] == 46_080
    assert facts["tokenizer"]["stop_token_ids"] == [2]
    assert facts["tokenizer"]["special_tokens"]["eos_token"] == {"id": 2, "text": "<|im_end|>"}
    assert facts["tokenizer"]["chat_template"] is True
    assert run(str(smollm2_path)) == 0
    assert "134,515,008 in 272 tensors" in capsys.readouterr().out


@pytest.mark.clause("MD-INSPECT-1", "MD-PULL-1")
def test_bad_models_are_errors(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(NotFoundError):
        run("no-such-model", "--cache-dir", str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in os.listdir(directory):
        (broken / name).write_bytes((directory / name).read_bytes())
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidFormatError, match=r"tokenizer\.json"):
        run(str(broken))
