"""Plain element types of safetensors, and quantised matrices whose parts lie in several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.matrix import PackedWeight
from ferrum_ref.numpy_backend import make_backend

DOWN = "model.layers.1.mlp.down_proj.weight"
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write_plain(directory: Any, dtype: torch.dtype) -> Path:
    """The directory's model with matrices of one plain type, without a quantization_config."""
    directory.tensors = {
        name: parameter.detach().to(dtype if parameter.ndim == 2 else torch.float32)
        for name, parameter in directory.model.named_parameters()
    }
    path: Path = directory.write()
    (path / "config.json").write_text(json.dumps(directory.model.config.to_dict()))
    return path


@pytest.mark.clause("MD-QUANT-1", "MD-CKPT-4", "MD-PACK-1")
@pytest.mark.parametrize("name", PLAIN)
def test_plain_types_are_read_exactly_packed_or_not(name: str, make_quantized: Callable[[str], Any]) -> None:
    directory = make_quantized("int8")
    path = write_plain(directory, PLAIN[name])
    wanted = directory.tensors[DOWN].float().numpy()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors[DOWN].dtype == name
        assert np.array_equal(checkpoint.read(DOWN), wanted)
        weights = read_decoder_weights(checkpoint, make_backend(), packed=True)
        down = weights.layers[1].down
        if name == "F32":
            assert np.array_equal(down.to_numpy(), wanted)
            assert np.shares_memory(down.to_numpy(), checkpoint.packed_matrix(DOWN).packed)
        else:
            assert isinstance(down, PackedWeight)
            assert np.array_equal(down.parts[0].stored.rows(0, 64), wanted)


@pytest.mark.clause("MD-CKPT-3")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_integers_are_no_weights(dtype: torch.dtype, make_quantized: Callable[[str], Any]) -> None:
    path = write_plain(make_quantized("int8"), dtype)
    with pytest.raises(UnsupportedError, match=r"tensor model\.embed_tokens\.weight: got element format"):
        open_checkpoint(path)


@pytest.mark.clause("MD-HFQ-3", "MD-DIR-2")
def test_the_parts_of_a_matrix_may_lie_in_several_files(make_quantized: Callable[[str], Any]) -> None:
    directory = make_quantized("gptq 3 act-order")
    path = directory.write()
    with open_checkpoint(path) as whole:
        wanted = {name: whole.read(name) for name in whole.tensors}
    (path / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(sorted(directory.tensors.items())):
        shards["ab"[number % 2] + ".safetensors"][name] = tensor.contiguous()
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == set(wanted)
        for name, values in wanted.items():
            assert np.array_equal(checkpoint.read(name), values)
    index.write_text(json.dumps({"weight_map": {n: s for n, s in weight_map.items() if s.startswith("a")}}))
    with pytest.raises(InvalidFormatError, match="got nothing, expected shape"):
        open_checkpoint(path)


@pytest.mark.clause("MD-HFQ-4")
def test_a_last_group_may_be_shorter(make_quantized: Callable[[str], Any]) -> None:
    """Groups of 48 over 64 inputs: inputs 48 … 63 are a group of their own."""
    directory = make_quantized("gptq 4")
    q = "model.layers.0.self_attn.q_proj"
    for name in [name for name in directory.tensors if name.endswith((".scales", ".qzeros"))]:
        inputs = directory.tensors[name.rpartition(".")[0] + ".qweight"].shape[0] * 8
        directory.tensors[name] = directory.tensors[name][: -(-inputs // 48)]
    with open_checkpoint(directory.write(group_size=48)) as checkpoint:
        weight = checkpoint.read(f"{q}.weight").astype(np.float64)
    words = directory.tensors[f"{q}.qweight"].numpy().view(np.uint32)
    zeros = directory.tensors[f"{q}.qzeros"].numpy().view(np.uint32)
    scales = directory.tensors[f"{q}.scales"].double().numpy()
    for n, k in ((0, 47), (0, 48), (63, 63), (17, 5)):
        group = k // 48
        level = int(words[k // 8, n] >> 4 * (k % 8) & 15) - int(zeros[group, n // 8] >> 4 * (n % 8) & 15) - 1
        assert weight[n, k] == level * scales[group, n]
