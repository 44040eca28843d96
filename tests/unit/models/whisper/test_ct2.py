"""Whisper out of a CTranslate2 file, against the same numbers out of a Hugging Face directory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum_ref.errors import FerrumError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.families import load_transcriber
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.ctranslate2 import CTranslate2File
from ferrum_ref.models.whisper_ct2 import Ct2WhisperTensors

Bytes = Callable[..., bytes]


def opened(content: bytes) -> Ct2WhisperTensors:
    return Ct2WhisperTensors(CTranslate2File(MemoryBytes(content, "here")), "here")


@pytest.mark.clause("FM-CT2-5", "FM-CT2-6", "FM-LOAD-3")
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_the_same_bits_as_from_a_directory(
    tiny_model: Any, ct2_of: Callable[..., Any], make_ct2: Bytes, ct2_directory: Path,
    save_whisper: Callable[..., Path], tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    rounded = copy.deepcopy(tiny_model)
    if kind == "float16":
        rounded = rounded.half().float()
    directory = load_transcriber(save_whisper(tmp_path / "hf", rounded))
    ct2 = tmp_path / "ct2"
    ct2.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (ct2 / name).write_text((ct2_directory / name).read_text())
    (ct2 / "model.bin").write_bytes(make_ct2(ct2_of(tiny_model, kind)))
    converted = load_transcriber(ct2)
    assert converted.model.config == directory.model.config
    assert converted.tokens == directory.tokens
    heard = (np.random.default_rng(0).standard_normal(9000) * 0.2).astype(np.float32)
    assert converted.transcribe(heard, None) == directory.transcribe(heard, None)
    picture = np.random.default_rng(1).standard_normal((8, 40)).astype(np.float32)
    logits = []
    for model in (converted.model, directory.model):
        cache = model.new_cache()
        model.attend_to(cache, model.encode(picture))
        logits.append(model.decode(cache, [61, 62, 65]))
    np.testing.assert_array_equal(*logits)


@pytest.mark.clause("FM-CT2-6")
def test_fused_rows(tiny_model: Any, ct2_of: Callable[..., Any], make_ct2: Bytes) -> None:
    tensors = opened(make_ct2(ct2_of(tiny_model, "float32")))
    state = {name.removeprefix("model."): values.numpy() for name, values in tiny_model.state_dict().items()}
    for name, values in state.items():
        if name != "proj_out.weight":
            np.testing.assert_array_equal(tensors.read(name), values, err_msg=name)
    assert not tensors.read("decoder.layers.1.encoder_attn.k_proj.bias").any()
    half = tensors.read("encoder.layers.0.fc1.weight", np.float16)
    np.testing.assert_array_equal(half, state["encoder.layers.0.fc1.weight"].astype(np.float16))
    for name in ("decoder.layers.0.fc9.weight", "encoder", "encoder.conv3.weight", "decoder.layer_norm.scale"):
        with pytest.raises(NotFoundError):
            tensors.read(name)


@pytest.mark.clause("FM-CT2-5")
def test_bfloat16(tiny_model: Any, ct2_of: Callable[..., Any], make_ct2: Bytes) -> None:
    variables = {
        name: values.astype(ml_dtypes.bfloat16) if values.dtype == np.float32 else values
        for name, values in ct2_of(tiny_model, "float32").items()
    }
    found = opened(make_ct2(variables)).read("encoder.conv1.weight")
    expected = tiny_model.state_dict()["model.encoder.conv1.weight"].to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.clause("FM-CT2-5")
def test_files_that_are_refused(tiny_model: Any, ct2_of: Callable[..., Any], make_ct2: Bytes) -> None:
    good = ct2_of(tiny_model)
    opened(make_ct2(good))
    int8 = np.zeros((24, 24), np.int8)
    cases: list[tuple[dict[str, Any], type[FerrumError], str]] = [
        ({"decoder/alibi": np.array(1, np.int8)}, UnsupportedError, "decoder/alibi: got 1, expected 0"),
        ({"decoder/pre_norm": np.array(0, np.int8)}, UnsupportedError, "pre_norm"),
        ({"decoder/activation": np.array(9, np.int8)}, UnsupportedError, "activation: got 9"),
        ({"decoder/layer_1/attention/linear_0/weight": int8}, UnsupportedError, "float16"),
        ({"decoder/num_heads": np.array(5, np.int16)}, InvalidFormatError, "multiple of the 5 heads"),
        ({"decoder/num_heads": np.array([2, 2], np.int16)}, InvalidFormatError, "one whole number"),
        ({"decoder/num_heads": np.array(2, np.float32)}, InvalidFormatError, "one whole number"),
        ({"encoder/conv2/bias": None}, InvalidFormatError, "encoder/conv2/bias'?: got nothing"),
        ({"encoder/layer_0/ffn/linear_0/weight": None}, InvalidFormatError, "got nothing"),
        ({"encoder/conv1/weight": int8}, InvalidFormatError, "expected 3 dimensions"),
        ({"encoder/layer_1/ffn/linear_1/bias": int8[0, :5]}, InvalidFormatError, r"got shape \[5\], expected \[24\]"),
        ({"decoder/layer_7/ffn/linear_1/bias": int8[0]}, InvalidFormatError, "no place for"),
        ({"encoder/extra/weight": int8}, InvalidFormatError, "no place for"),
    ]
    for changes, error, text in cases:
        variables = {name: values for name, values in {**good, **changes}.items() if values is not None}
        with pytest.raises(error, match=text):
            opened(make_ct2(variables))
    with pytest.raises(UnsupportedError, match="kind: got 'TransformerSpec'"):
        opened(make_ct2(good, None, "TransformerSpec"))


@pytest.mark.clause("FM-CT2-5")
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_table_is_a_model_or_a_named_error(
    tiny_model: Any, ct2_of: Callable[..., Any], make_ct2: Bytes, data: st.DataObject
) -> None:
    good = ct2_of(tiny_model)
    name = data.draw(st.sampled_from(sorted(good)))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 24, 72]), max_size=3))
    kind = data.draw(st.sampled_from(["int8", "int16", "float16", "float32"]))
    changed = {**good, name: np.ones(shape, kind)}
    if data.draw(st.booleans()):
        del changed[data.draw(st.sampled_from(sorted(good)))]
    with contextlib.suppress(InvalidFormatError, UnsupportedError):
        opened(make_ct2(changed)).read("encoder.conv1.weight")


@pytest.mark.clause("FM-LOAD-3")
def test_a_refused_file_is_closed(ct2_directory: Path, tmp_path: Path) -> None:
    for each in ct2_directory.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(content[:-1])
    with pytest.raises(InvalidFormatError, match=r"model\.bin"):
        load_transcriber(tmp_path)
    (tmp_path / "model.bin").write_bytes(content)
    load_transcriber(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        load_transcriber(tmp_path)
