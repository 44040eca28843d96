"""Tiny random checkpoints, here and in transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ferrum_ref.cli.main import main
from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.verification.comparison import compare
from ferrum_ref.verification.own_run import OwnModel
from ferrum_ref.verification.transformers_run import run_transformers

TOKENS = [5, 17, 60, 3, 3, 91, 8, 40, 22, 1, 77]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=2,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("verify") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.clause("VE-RUN-1", "VE-RUN-2")
def test_a_sound_checkpoint_passes_at_every_layer(tiny: Path) -> None:
    wide, narrow, margins = run_transformers(tiny, TOKENS, 6)
    ours = OwnModel(tiny, make_backend("cpu")).run(TOKENS, wide.greedy)
    assert list(wide.points) == ["layers.0.hidden", "layers.1.hidden", "layers.2.hidden", "logits"]
    assert ours.points["layers.2.hidden"].shape == (len(TOKENS), 32)
    found = compare(ours, wide, narrow, margins)
    assert found.passed, found.faults
    assert found.greedy_prefix == len(wide.greedy) == 6
    assert all(0 < point.floor < 1e-5 for point in found.points)


@pytest.mark.clause("VE-RUN-2")
def test_the_float64_run_is_float64(tiny: Path) -> None:
    """Its hidden states are no float32 numbers; the float32 run's are."""
    wide, narrow, _ = run_transformers(tiny, TOKENS, 0)
    for run, exact in ((wide, False), (narrow, True)):
        values = run.points["layers.1.hidden"]
        assert bool(np.array_equal(values, values.astype(np.float32))) is exact


@pytest.mark.clause("VE-COMPARE-2", "VE-RUN-1")
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_damaged_layer_is_named(tiny: Path, tmp_path: Path, layer: int) -> None:
    damaged = copied(tiny, tmp_path)
    tensors = load_file(damaged / "model.safetensors")
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"][3, 4] += 0.01
    save_file(tensors, damaged / "model.safetensors")
    wide, narrow, margins = run_transformers(tiny, TOKENS, 0)
    found = compare(OwnModel(damaged, make_backend("cpu")).run(TOKENS, ()), wide, narrow, margins)
    assert found.first_outside == f"layers.{layer}.hidden"
    assert not found.passed


@pytest.mark.clause("VE-RUN-2")
def test_a_gguf_file_is_read_by_both(tmp_path: Path) -> None:
    """Written by the gguf package; q and k with their rows in ggml's order."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    heads, size = 4, 8
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=heads, max_position_embeddings=64, initializer_range=0.2)
    state = {name: tensor.numpy() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    for name, values in state.items():
        if ".q_proj." in name or ".k_proj." in name:
            values = values.reshape(heads, 2, size // 2, 32).swapaxes(1, 2).reshape(heads * size, 32)
        writer.add_tensor(str(names.get_name(name, (".weight",))), np.ascontiguousarray(values))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    path = tmp_path / "tiny.gguf"
    wide, narrow, margins = run_transformers(path, TOKENS[:2], 3)
    found = compare(OwnModel(path, make_backend("cpu")).run(TOKENS[:2], wide.greedy), wide, narrow, margins)
    assert found.passed, found.faults


@pytest.mark.clause("VE-RUN-4")
def test_files_that_transformers_refuses(tiny: Path, tmp_path: Path) -> None:
    broken = copied(tiny, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]  # transformers alone would go on with random numbers
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidFormatError, match=r"does not load this: tensors missing.*layers\.1\.mlp\.up_proj"):
        run_transformers(broken, TOKENS, 0)
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises((InvalidFormatError, UnsupportedError), match="transformers does not load this"):
        run_transformers(broken, TOKENS, 0)


@pytest.mark.clause("VE-RUN-4")
def test_without_transformers_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"transformers is not installed; pip install 'ferrum-ref\[verify\]'"):
        run_transformers(tiny, TOKENS, 0)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["verify", *arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.clause("VE-CLI-1", "VE-CLI-2", "VE-CLI-3")
def test_the_command_line_on_a_sound_model(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, str(tiny), "--generate", "3", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["status"] == "passed"
    assert facts["num_tokens"] == 48  # made up: the directory has no tokenizer
    assert facts["greedy_prefix"] == 3
    assert [point["name"] for point in facts["points"]][-1] == "logits"
    code, out, _ = outcome(capsys, str(tiny), "--generate", "0", "--token-ids", "1,2,3", "--against", "transformers")
    assert code == 0
    assert "transformers in float64, 3 tokens" in " ".join(out.split())


@pytest.mark.clause("VE-CLI-1")
def test_a_fault_is_exit_code_1(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ferrum_ref.kernels import norm

    honest = norm.rms_norm
    monkeypatch.setattr("ferrum_ref.numpy_backend.kernel_ops.rms_norm", lambda x, w, eps: honest(x, w, eps + 1e-3))
    code, out, _ = outcome(capsys, str(tiny), "--generate", "0")
    assert code == 1
    assert "FAILED: layers.0.hidden is the first point outside the float32 noise floor" in out


@pytest.mark.clause("VE-CLI-1", "VE-CLI-2")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--token-ids", "1,x"], "expected numbers with commas"),
        (["--token-ids", "1,97"], "must be in [0, 97)"),
        (["--token-ids", ",".join(["1"] * 60), "--generate", "8"], "60 tokens are given, there is room for 56"),
        (["--generate", "64"], "leaves no room for a prompt"),
        (["--generate", "-1"], "expected 0 or more"),
        (["--prompt", "a", "--token-ids", "1"], "not allowed with"),
        (["--against", "llama.cpp"], "invalid choice"),
        (["--prompt", "text"], "tokenizer"),
    ],
)
def test_bad_input(tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = outcome(capsys, str(tiny), *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not out


def packed_in_eights(weight: Any, group: int) -> dict[str, Any]:
    """GPTQ's first layout at 8 bits: four bytes an int32, symmetric about 128, zero points stored one too low."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, inputs // group, group)
    scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
    quanta = np.rint(groups / scales.astype(np.float32)[..., None]).clip(-128, 127).astype(np.int64) + 128
    columns = quanta.reshape(outputs, inputs).T.astype(np.uint8)
    return {
        "qweight": np.ascontiguousarray(columns.reshape(inputs // 4, 4, outputs).swapaxes(1, 2)).view(np.int32)[..., 0],
        "qzeros": np.full((inputs // group, outputs), 127, np.uint8).view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(inputs) // group).astype(np.int32),
    }


@pytest.mark.clause("VE-RUN-3")
def test_packed_weights_are_unpacked_for_transformers(tiny: Path, tmp_path: Path) -> None:
    path = copied(tiny, tmp_path)
    tensors = {}
    for name, values in load_file(path / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts = packed_in_eights(values, 16)
            tensors |= {f"{name.removesuffix('weight')}{part}": found for part, found in parts.items()}
        else:
            tensors[name] = values
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": True, "desc_act": False}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    wide, narrow, margins = run_transformers(path, TOKENS, 4)
    found = compare(OwnModel(path, make_backend("cpu")).run(TOKENS, wide.greedy), wide, narrow, margins)
    assert found.passed, found.faults
    whole, _, _ = run_transformers(tiny, TOKENS, 0)
    change = np.abs(whole.points["logits"] - wide.points["logits"]).max()
    assert 0 < change < 0.2  # packed to 8 bits: near the model it came from, and not it


def families() -> dict[str, Any]:
    import transformers

    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "qwen3": transformers.Qwen3Config(**sizes, head_dim=16),
        "gemma3": transformers.Gemma3TextConfig(**sizes, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
        "mixtral": transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
        "gpt_neox": transformers.GPTNeoXConfig(**{k: v for k, v in sizes.items() if k != "num_key_value_heads"}),
    }


@pytest.mark.clause("VE-RUN-1", "VE-RUN-2")
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral", "gpt_neox"])
def test_other_families(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(8)
    AutoModelForCausalLM.from_config(families()[family]).save_pretrained(tmp_path)
    wide, narrow, margins = run_transformers(tmp_path, TOKENS, 2)
    found = compare(OwnModel(tmp_path, make_backend("cpu")).run(TOKENS, wide.greedy), wide, narrow, margins)
    assert found.passed, found.faults
    assert len(found.points) == 3
