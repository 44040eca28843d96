"""Checkpoints against the model objects that transformers wrote them from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ferrum_ref.errors import (
    FerrumIOError,
    InvalidFormatError,
    InvalidParameterError,
    NotFoundError,
    ShapeError,
    UnsupportedError,
)
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.tensor_names import expected_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "hf"))


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / str(index["weight_map"][name])


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


@pytest.mark.clause("MD-CKPT-1", "MD-CKPT-4", "MD-NAMES-1", "MD-DIR-1", "MD-DIR-2")
def test_shards_read_as_transformers_wrote_them(
    tiny_directory: Path, make_llama: Callable[..., torch.nn.Module]
) -> None:
    assert len(list(tiny_directory.glob("*.safetensors"))) > 1
    state = make_llama().state_dict()
    with open_checkpoint(tiny_directory) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert set(checkpoint.tensors) == set(state)
        assert checkpoint.num_parameters == sum(tensor.numel() for tensor in state.values())
        for name, tensor in state.items():
            assert np.array_equal(checkpoint.read(name), tensor.numpy())


@pytest.mark.clause("MD-CKPT-4", "MD-NAMES-1", "MD-NAMES-2", "MD-GGUF-8", "MD-CONFIG-3")
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_both_formats_hold_the_same_model(
    changes: dict[str, Any],
    tmp_path: Path,
    make_llama: Callable[..., torch.nn.Module],
    make_gguf: Callable[..., Path],
) -> None:
    """Names, shapes, biases and the order of q's and k's rows."""
    model = make_llama(**changes)
    model.save_pretrained(tmp_path / "hf")
    with open_checkpoint(tmp_path / "hf") as directory, open_checkpoint(make_gguf(model)) as file:
        assert (directory.format, file.format) == ("safetensors", "gguf")
        assert file.config.to_dict() == {
            **directory.config.to_dict(),
            "dtype": None,
            "bos_token_id": None,
            "rms_norm_eps": pytest.approx(directory.config.rms_norm_eps, rel=2**-24),
        }
        assert list(directory.tensors) == list(file.tensors) == [name for name, _ in expected_tensors(file.config)]
        for name in directory.tensors:
            assert np.array_equal(directory.read(name), file.read(name)), name


@pytest.mark.clause("MD-CKPT-4", "MD-GGUF-8")
@pytest.mark.parametrize("label", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_packed_rows_are_put_back_in_order(
    label: str, make_llama: Callable[..., torch.nn.Module], make_gguf: Callable[..., Path]
) -> None:
    """Rows are whole blocks, so quantising and reordering them commute; ggml's package does the decoding."""
    model, kind = make_llama(), gguf.GGMLQuantizationType[label]
    with open_checkpoint(make_gguf(model, label)) as checkpoint:
        for name, tensor in model.state_dict().items():
            values = tensor.numpy()
            expected = values if values.ndim == 1 else gguf.dequantize(gguf.quantize(values, kind), kind)
            assert np.array_equal(checkpoint.read(name), expected.reshape(values.shape)), name
        assert checkpoint.tensors[Q_PROJ].dtype == label


@pytest.mark.clause("MD-CKPT-4")
def test_dtypes_round_once(tiny_gguf: Path) -> None:
    with open_checkpoint(tiny_gguf) as checkpoint:
        exact = checkpoint.read(Q_PROJ)
        assert np.array_equal(checkpoint.read(Q_PROJ, np.float64), exact.astype(np.float64))
        assert np.array_equal(checkpoint.read(Q_PROJ, np.float16), torch.from_numpy(exact).half().numpy())
        bf16 = checkpoint.read(Q_PROJ, ml_dtypes.bfloat16)
        assert bf16.dtype == ml_dtypes.bfloat16
        assert np.array_equal(bf16.view(np.uint16), torch.from_numpy(exact).bfloat16().view(torch.uint16).numpy())
        for dtype in (np.int32, "nonsense"):
            with pytest.raises(InvalidParameterError, match="expected one of float32, float64, float16, bfloat16"):
                checkpoint.read(Q_PROJ, dtype)
        with pytest.raises(NotFoundError, match="no such tensor"):
            checkpoint.read("model.layers.9.nothing")


@pytest.mark.clause("MD-CKPT-4")
def test_bfloat16_directories(tmp_path: Path, make_llama: Callable[..., torch.nn.Module]) -> None:
    model = make_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        assert checkpoint.config.dtype == "bfloat16"
        for name, tensor in model.state_dict().items():
            assert checkpoint.tensors[name].dtype == "BF16"
            assert np.array_equal(checkpoint.read(name), tensor.float().numpy())


@pytest.mark.clause("MD-CKPT-5")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_out_is_filled(dtype: Any, tiny_gguf: Path) -> None:
    with open_checkpoint(tiny_gguf) as checkpoint:
        fused = np.zeros((128, 64), dtype)
        assert checkpoint.read(Q_PROJ, dtype, out=fused[:64]).base is fused
        assert np.array_equal(fused[:64], checkpoint.read(Q_PROJ, dtype))
        assert not fused[64:].any()
        for wrong in (np.zeros((64, 32), dtype), np.zeros((64, 64), np.float64), np.zeros((64, 64), dtype).T[:, :]):
            with pytest.raises(ShapeError, match="out: got"):
                checkpoint.read(Q_PROJ, dtype, out=wrong)


@pytest.mark.clause("MD-GGUF-1", "MD-CKPT-2")
@pytest.mark.parametrize("fixture", ["tiny_gguf", "tiny_directory"])
def test_concurrent_reads_and_closing(fixture: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(fixture))
    names = list(checkpoint.tensors) * 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(checkpoint.read, names))
    for name, values in zip(names, found, strict=True):
        assert np.array_equal(values, checkpoint.read(name))
    checkpoint.close()
    assert np.isfinite(found[0]).all()
    with pytest.raises(FerrumIOError, match="closed"):
        checkpoint.read(Q_PROJ)


@pytest.mark.clause("MD-CKPT-1", "MD-DIR-1")
def test_what_can_be_opened(tmp_path: Path, tiny_gguf: Path, directory: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(NotFoundError, match=r"neither config.json nor a \.gguf"):
        open_checkpoint(alone)
    shutil.copy(tiny_gguf, alone / "model.gguf")
    assert open_checkpoint(alone).path == alone / "model.gguf"
    shutil.copy(tiny_gguf, alone / "other.gguf")
    with pytest.raises(InvalidParameterError, match=r"several GGUF files \(model.gguf, other.gguf\)"):
        open_checkpoint(alone)
    shutil.copy(tiny_gguf, tmp_path / "named.bin")
    assert open_checkpoint(tmp_path / "named.bin").format == "gguf"
    with pytest.raises(NotFoundError, match="no such file or directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UnsupportedError, match="expected its directory"):
        open_checkpoint(directory / "config.json")
    with pytest.raises(InvalidFormatError, match="magic"):
        open_checkpoint(_written(tmp_path / "text", b"not a model at all"))


@pytest.mark.clause("MD-CKPT-2", "MD-CKPT-3", "MD-DIR-1", "MD-DIR-2", "MD-DIR-3", "MD-DIR-4")
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda d: rewrite(shard_of(d, Q_PROJ), lambda t: t.pop(Q_PROJ)),
            InvalidFormatError,
            f"tensor '{Q_PROJ}': got nothing, expected it as model.safetensors.index.json says",
        ),
        (
            lambda d: rewrite(shard_of(d, Q_PROJ), lambda t: t.update({Q_PROJ: np.zeros((64, 60), np.float32)})),
            InvalidFormatError,
            rf"tensor {Q_PROJ}: got shape \[64, 60\], expected \[64, 64\]",
        ),
        (
            lambda d: rewrite(shard_of(d, Q_PROJ), lambda t: t.update({Q_PROJ: np.zeros((64, 64), np.int32)})),
            UnsupportedError,
            f"tensor {Q_PROJ}: got element format I32",
        ),
        (
            lambda d: rewrite(shard_of(d, Q_PROJ), lambda t: t.update(extra=np.zeros(3, np.float32))),
            InvalidFormatError,
            r"got 1 tensors that the configuration has no place for \('extra'\)",
        ),
        (
            lambda d: rewrite(d / sorted(os.listdir(d))[-2], lambda t: t.update({Q_PROJ: np.zeros((64, 64), "f4")})),
            InvalidFormatError,
            f"tensor '{Q_PROJ}': got it again, expected it only in",
        ),
        (lambda d: shard_of(d, Q_PROJ).unlink(), InvalidFormatError, "shard 'model-0.*got no such file"),
        (lambda d: os.truncate(shard_of(d, Q_PROJ), 3000), InvalidFormatError, "data: got .* bytes in the file"),
        (lambda d: (d / "config.json").write_text("{"), InvalidFormatError, "config.json: line 1"),
        (
            lambda d: (d / "generation_config.json").write_text("]"),
            InvalidFormatError,
            "generation_config.json: line 1",
        ),
        (
            lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            InvalidFormatError,
            "generation_config.json: eos_token_id: got 'x'",
        ),
        (lambda d: (d / "model.safetensors.index.json").unlink(), NotFoundError, "got neither model.safetensors nor"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            InvalidFormatError,
            r"weight_map\['a'\]: got '../b', expected a plain file name",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'),
            InvalidFormatError,
            "weight_map: got \\[\\]",
        ),
        (
            lambda d: _set(d, num_hidden_layers=10**9),
            InvalidFormatError,
            r"tensor model.layers.2.input_layernorm.weight: got nothing, expected shape \[64\]",
        ),
        (lambda d: _set(d, num_hidden_layers=1), InvalidFormatError, "got 9 tensors that the configuration has no"),
    ],
)
def test_damage_is_found_on_opening(
    damage: Callable[[Path], object], error: type[Exception], message: str, directory: Path
) -> None:
    damage(directory)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("MD-CKPT-3")
def test_tied_models_may_store_their_output_matrix(tmp_path: Path, make_llama: Callable[..., torch.nn.Module]) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    rewrite(weights, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    rewrite(weights, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
    rewrite(weights, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(InvalidFormatError, match=r"lm_head.weight: got values that differ from model.embed_tokens"):
        open_checkpoint(tmp_path)


@pytest.mark.clause("MD-CKPT-6", "MD-DIR-4")
def test_generation_ids(directory: Path) -> None:
    _set(directory, eos_token_id=[5, 6], pad_token_id=0)
    (directory / "generation_config.json").unlink()
    assert open_checkpoint(directory).generation.eos_token_ids == (5, 6)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8], "bos_token_id": 1}')
    generation = open_checkpoint(directory).generation
    assert (generation.eos_token_ids, generation.bos_token_id, generation.pad_token_id) == ((7, 8), 1, 0)


@pytest.mark.clause("MD-CKPT-3", "MD-NAMES-2")
@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        (
            ("blk.1.ffn_up.weight", "blk.1.ffn_xp.weight"),
            InvalidFormatError,
            "'blk.1.ffn_xp.weight': got a name that no",
        ),
        (
            ("blk.1.ffn_up.weight", "blk.7.ffn_up.weight"),
            InvalidFormatError,
            "layers.1.mlp.up_proj.weight: got nothing",
        ),
        (("llama.block_count", "llama.block_xount"), InvalidFormatError, "llama.block_count: got nothing"),
    ],
)
def test_gguf_with_wrong_names(
    rename: tuple[str, str], error: type[Exception], message: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    content = tiny_gguf.read_bytes().replace(rename[0].encode(), rename[1].encode())
    with pytest.raises(error, match=message):
        open_checkpoint(_written(tmp_path / "renamed.gguf", content))


@pytest.mark.clause("MD-CKPT-3")
def test_gguf_formats_without_a_codec_are_refused(
    make_llama: Callable[..., torch.nn.Module], make_gguf: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor model.embed_tokens.weight: got element format MXFP4"):
        open_checkpoint(make_gguf(make_llama(), "MXFP4"))


@pytest.mark.model
@pytest.mark.clause("MD-CKPT-4", "MD-GGUF-8", "MD-CKPT-6")
def test_the_real_model_as_ggmls_package_decodes_it(smollm2_path: Path) -> None:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    with open_checkpoint(smollm2_path) as checkpoint:
        assert checkpoint.num_parameters == 134_515_008
        assert checkpoint.generation.eos_token_ids == (2,)
        assert (checkpoint.config.num_layers, checkpoint.config.rope_theta) == (30, 100000.0)
        for ours, theirs, heads in (
            ("model.layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight", 9),
            ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0),
            ("model.norm.weight", "output_norm.weight", 0),
        ):
            expected = gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type)
            if heads:
                rows = expected.shape[0]
                expected = expected.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
            assert np.array_equal(checkpoint.read(ours), expected)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _set(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
