"""Bad input to the programs: one clear line, exit code 2, never a traceback."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrum_ref.cli import main as program

pytestmark = pytest.mark.clause("EN-CLI-1", "EN-CLI-2")

Complaint = Callable[..., str]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Run `ferrum-ref WORDS…`, demand exit code 2 and one line on stderr, and return that line."""

    def run(*words: object) -> str:
        try:
            code = program.main([str(word) for word in words])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("ferrum-ref")
        assert " error: " in line
        return line

    return run


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.norm.weight": (8,),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (16, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 16),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {**{f"w{i}": i for i in range(32)}}, "unk_token": "w0"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny valid Hugging Face directory."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def test_the_tiny_model_is_good_so_that_each_complaint_below_has_one_cause(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["generate", str(model), "w1 w2 w3", "--max-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_unknown_command_and_option(complaint: Complaint) -> None:
    assert "frobnicate" in complaint("frobnicate")
    assert "--wurst" in complaint("backends", "--wurst")


def test_unknown_model(complaint: Complaint) -> None:
    line = complaint("generate", "no-such-model", "hi")
    assert "no-such-model" in line
    assert "smollm2-135m" in line  # what would be right
    assert "no-such-model" in complaint("inspect", "no-such-model")
    assert "no-such-model" in complaint("pull", "no-such-model")


def test_unknown_backend(complaint: Complaint, model: Path) -> None:
    line = complaint("generate", model, "w1", "--backend", "abacus")
    assert "abacus" in line
    assert "numpy" in line
    assert "abacus" in complaint("parity", "--backend", "abacus")


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--top-p", "2"), ("--max-tokens", "0"), ("--top-k", "0")])
def test_parameters_outside_their_domain(complaint: Complaint, model: Path, option: tuple[str, str]) -> None:
    line = complaint("generate", model, "w1", *option)
    assert option[0].removeprefix("--").replace("-", "_") in line.replace("-", "_")


def test_empty_prompt(complaint: Complaint, model: Path) -> None:
    assert "prompt" in complaint("generate", model, "")


def test_prompt_longer_than_the_context(complaint: Complaint, model: Path) -> None:
    line = complaint("generate", model, "w1 " * 40)
    assert "40" in line
    assert "16" in line


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ("null", "config.json"),
        ('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}', "mamba"),
        (json.dumps({**CONFIG, "hidden_size": "eight"}), "hidden_size"),
        (json.dumps({**CONFIG, "num_hidden_layers": -1}), "num_hidden_layers"),
        (json.dumps({**CONFIG, "num_attention_heads": 3}), "num_attention_heads"),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}), "vocab_size"),
        (json.dumps({**CONFIG, "rope_scaling": {"rope_type": "spiral", "factor": 2.0}}), "spiral"),
        (json.dumps({**CONFIG, "hidden_act": "swoosh"}), "swoosh"),
    ],
)
def test_broken_config(complaint: Complaint, model: Path, text: str, word: str) -> None:
    (model / "config.json").write_text(text)
    assert word.lower() in complaint("inspect", model).lower()


def test_config_that_is_not_text(complaint: Complaint, model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in complaint("inspect", model)


def test_missing_config(complaint: Complaint, model: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json" in complaint("inspect", model)


@pytest.mark.parametrize("text", ["{", '{"model": {}}', "[]", '{"version": "1.0", "model": {"type": "Quantum"}}'])
def test_broken_tokenizer(complaint: Complaint, model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in complaint("generate", model, "w1")


def test_missing_tokenizer(complaint: Complaint, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer" in complaint("generate", model, "w1")


def test_truncated_safetensors(complaint: Complaint, model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) - 8):
        path.write_bytes(whole[:length])
        assert "model.safetensors" in complaint("inspect", model)


@pytest.mark.parametrize(
    "header",
    [
        {"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 10**12]}},
        {"model.norm.weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 32]}},
        {"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [32, 0]}},
        {"model.norm.weight": {"dtype": "F99", "shape": [8], "data_offsets": [0, 32]}},
    ],
)
def test_lying_safetensors(complaint: Complaint, model: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    assert "model.safetensors" in complaint("inspect", model)


def test_missing_extra_and_misshaped_tensors_are_named(complaint: Complaint, model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    good = tensors()
    save_file({k: v for k, v in good.items() if k != name}, model / "model.safetensors")
    assert name in complaint("generate", model, "w1")
    save_file({**good, "model.layers.7.mlp.up_proj.weight": good[name]}, model / "model.safetensors")
    assert "model.layers.7.mlp.up_proj.weight" in complaint("generate", model, "w1")
    save_file({**good, name: np.zeros((15, 8), np.float32)}, model / "model.safetensors")
    line = complaint("generate", model, "w1")
    assert name in line
    assert "15, 8" in line
    assert "16, 8" in line


def test_not_a_model_file(complaint: Complaint, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"", b"GGUF", b"GGUF" + struct.pack("<I", 3), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        assert "x.gguf" in complaint("inspect", path)


def test_gguf_that_promises_more_than_there_is(complaint: Complaint, tmp_path: Path) -> None:
    path = tmp_path / "lying.gguf"
    for num_tensors, num_keys in ((2**60, 0), (0, 2**60), (2**63, 2**63)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + bytes(64))
        assert "lying.gguf" in complaint("inspect", path)


@pytest.mark.model
def test_truncated_real_gguf(complaint: Complaint, smollm2_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    with smollm2_path.open("rb") as source:
        path.write_bytes(source.read(smollm2_path.stat().st_size // 2))
    line = complaint("generate", path, "hi")
    assert "half.gguf" in line


@pytest.mark.clause("EN-CLI-3")
def test_a_reader_that_goes_away_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m ferrum_ref.cli.main inspect {model} --tensors | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
