"""Model sheets against published parameter counts and transformers' own; config.json files good and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ferrum_sim.cost_model.hardware import find_hardware
from ferrum_sim.cost_model.memory import kv_capacity_blocks
from ferrum_sim.cost_model.model_sheet import MODELS, find_model

from ferrum_ref.errors import ConfigError, FerrumIOError, NotFoundError, ResourceExhaustedError

# "Model size" in the safetensors index of each repository (total_size / 2 for bf16).
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


@pytest.mark.clause("SI-MODEL-1")
@pytest.mark.parametrize("name", list(MODELS))
def test_built_in_sheets_have_the_published_number_of_weights(name: str) -> None:
    assert find_model(name).num_weights == PUBLISHED[name]


@pytest.mark.clause("SI-MODEL-1")
def test_llama_3_caches_128_kib_a_token() -> None:
    assert find_model("Llama-3-8B").kv_bytes_per_token == 2 * 32 * 8 * 128 * 2 == 128 * 1024


@pytest.mark.clause("SI-MODEL-2")
def test_a_config_file_gives_the_sheet_it_describes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    by_file, by_folder, built_in = find_model(str(path)), find_model(str(tmp_path)), find_model("llama-3-8b")
    assert by_file == by_folder
    assert by_file.num_weights == built_in.num_weights
    assert by_file.kv_bytes_per_token == built_in.kv_bytes_per_token
    path.write_text(json.dumps(LLAMA_3_8B | {"num_key_value_heads": None, "dtype": "float32", "torch_dtype": None}))
    assert find_model(str(path)).num_kv_heads == 32
    assert find_model(str(path)).element_bytes == 4


@pytest.mark.clause("SI-MODEL-2")
def test_weights_of_a_qwen2_config_are_counted_with_their_biases(tmp_path: Path) -> None:
    """Per layer q 32*32 + 32, k and v 16*32 + 16 each, o 32*32, three of 32*48, two norms of 32: 7808. Both embeddings
    100*32, the last norm 32."""
    config = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_model(str(tmp_path)).num_weights == 3 * 7808 + 2 * 3200 + 32
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama", "tie_word_embeddings": True}))
    assert find_model(str(tmp_path)).num_weights == 3 * (7808 - 64) + 3200 + 32


@pytest.mark.clause("SI-MODEL-2")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected one JSON object"),
        ("{}", "hidden_size is missing"),
        (json.dumps(LLAMA_3_8B | {"num_hidden_layers": -1}), "num_hidden_layers is -1"),
        (json.dumps(LLAMA_3_8B | {"vocab_size": "big"}), "vocab_size is 'big'"),
        (json.dumps(LLAMA_3_8B | {"vocab_size": 2**40}), "vocab_size is"),
        (json.dumps(LLAMA_3_8B | {"num_local_experts": 8}), "experts"),
        (json.dumps(LLAMA_3_8B | {"torch_dtype": "int3"}), "dtype is 'int3'"),
        (json.dumps(LLAMA_3_8B | {"torch_dtype": ["bfloat16"]}), "dtype is"),
        (json.dumps(LLAMA_3_8B | {"num_attention_heads": 8192}), "head_dim is 0"),
        (json.dumps(LLAMA_3_8B | {"num_key_value_heads": 5}), "num_key_value_heads is 5"),
    ],
)
def test_a_broken_config_is_one_named_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_model(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.clause("SI-MODEL-1", "SI-MODEL-2")
def test_a_name_that_is_neither_sheet_nor_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="llama-3-8b"):
        find_model("gpt-9")
    binary = tmp_path / "config.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises((ConfigError, FerrumIOError), match="config"):
        find_model(str(binary))


@pytest.mark.clause("SI-MEMORY-1")
def test_capacity_of_the_measured_rtx_4090() -> None:
    """vLLM 0.19 reported 2588 blocks of 16 tokens for Llama-3.1-8B at gpu_memory_utilization 0.9."""
    blocks = kv_capacity_blocks(find_model("llama-3.1-8b"), find_hardware("rtx4090"), 16)
    assert abs(blocks - 2588) <= 1


@pytest.mark.clause("SI-MEMORY-1")
def test_capacity_by_hand() -> None:
    """H100: floor((0.9 * 81559 MiB - 16,060,522,496 - 1180 MiB) / 2 MiB) = floor(57,830.8... MiB / 2 MiB)."""
    model, h100 = find_model("llama-3-8b"), find_hardware("h100")
    free_mib = 0.9 * 81559 - 16_060_522_496 / 2**20 - 1180
    assert kv_capacity_blocks(model, h100, 16) == int(free_mib // 2)
    assert kv_capacity_blocks(model, h100, 32) == int(free_mib // 4)
    two_mib = 0.9 * 81559 - 16_060_522_496 / 2 / 2**20 - 1180
    assert kv_capacity_blocks(model, h100, 16, tensor_parallel=2) == int(two_mib // 1)


@pytest.mark.clause("SI-MEMORY-1")
def test_a_model_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(ResourceExhaustedError, match="tensor-parallel"):
        kv_capacity_blocks(find_model("llama-3-70b"), find_hardware("h100"), 16)
    assert kv_capacity_blocks(find_model("llama-3-70b"), find_hardware("h100"), 16, tensor_parallel=4) > 0
