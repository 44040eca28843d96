"""Thousands of damaged and malicious weight files: a FerrumError or a correct load, and nothing else.

A child process loads them: address space limited to 1 GiB above what the imports take, 2 s of processor time a file,
and an audit hook that reports any import, compilation, program start, unpickled global or file outside the folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("hostile_files.py")
NUM_DEFAULT, NUM_SLOW = 70, 520  # per kind; there are ten


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_files", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = program().KINDS


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["a b c abc"] * 4, trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>", "</s>"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_model(folder: Path) -> None:
    """A Hugging Face directory of a tiny Llama."""
    from safetensors.numpy import save_file

    from ferrum_ref.models.config import DecoderConfig
    from ferrum_ref.models.tensor_names import expected_tensors

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 12,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": [1, 2],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_tensors(DecoderConfig.from_hf(config, source="config.json"))
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes}, folder / "model.safetensors")


def write_gguf(folder: Path, matrix: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "w.gguf", "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("a", matrix)
    writer.add_tensor(
        "q", gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def write_onnx(folder: Path, matrix: Any) -> None:
    import onnx
    from onnx import helper, numpy_helper

    external = helper.make_tensor("e", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    external.ClearField("float_data")
    external.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "e.bin"), ("offset", "0"), ("length", "16")):
        entry = external.external_data.add()
        entry.key, entry.value = key, value
    (folder / "e.bin").write_bytes(bytes(range(16)))
    initializers = [numpy_helper.from_array(matrix, "a"), helper.make_tensor("t", 1, [2, 2], [1.0, 2, 3, 4]), external]
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=initializers)), folder / "w.onnx")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound file of every kind, each in a folder of its own; a secret beside the folders."""
    import torch
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("hostile")
    (root / "secret").write_bytes(b"TOP-SECRET" * 20)
    for kind in KINDS:
        (root / kind).mkdir()
        (root / kind / "link").symlink_to(root / "secret")
    matrix = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    two = {"a": matrix, "b": matrix[0].astype(np.float16)}
    save_file(two, root / "safetensors" / "w.safetensors", metadata={"format": "pt"})
    for number in (1, 2):
        save_file({f"a{number}": matrix}, root / "index" / f"model-{number}.safetensors")
    index = {"metadata": {"total_size": 1024}, "weight_map": {f"a{n}": f"model-{n}.safetensors" for n in (1, 2)}}
    (root / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    write_gguf(root / "gguf", matrix)
    np.save(root / "npy" / "w.npy", matrix)
    np.savez_compressed(root / "npz" / "w.npz", **two)
    tensor = torch.from_numpy(matrix)
    state = {
        "a": tensor,
        "part": {"b": tensor[1:3].T, "bf": tensor.bfloat16()},
        "step": 3,
        "p": torch.nn.Parameter(tensor),
    }
    torch.save(state, root / "pytorch" / "w.pt")
    torch.save(state, root / "pytorch_legacy" / "w.bin", _use_new_zipfile_serialization=False)
    write_onnx(root / "onnx", matrix)
    write_model(root / "config")
    write_tokenizer(root / "tokenizer")
    return root


Results = dict[str, dict[str, Any]]


def run(first: int, count: int, sound: Path, kinds: tuple[str, ...]) -> Results:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(first), str(count), str(sound), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results: Results = json.loads(done.stdout.splitlines()[-1])
    return results


def check(result: dict[str, Any], count: int) -> None:
    assert not result["faults"], "\n".join(result["faults"][:5])
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == count
    assert count - outcomes.get("loaded", 0) > count // 6  # the mutations do harm
    assert not set(outcomes) & {"Internal", "Network", "Timeout"}


@pytest.fixture(scope="module")
def some(sound: Path) -> Results:
    """A few hundred files of all kinds, in one child."""
    return run(0, NUM_DEFAULT, sound, KINDS)


@pytest.mark.clause("WL-HOSTILE-1", "WL-HOSTILE-2", "WL-PICKLE-1", "WL-NPY-1", "WL-ZIP-2", "WL-ONNX-4", "WL-SHARD-1")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(kind: str, some: Results) -> None:
    check(some[kind], NUM_DEFAULT)


@pytest.mark.slow
@pytest.mark.clause("WL-HOSTILE-1", "WL-HOSTILE-2")
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_hostile_files(kind: str, sound: Path) -> None:
    check(run(1_000, NUM_SLOW, sound, (kind,))[kind], NUM_SLOW)
