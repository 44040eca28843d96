"""Whisper against transformers' WhisperForConditionalGeneration, judged by its float64 run, on random tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ferrum_ref.errors import (
    ConfigError,
    InvalidFormatError,
    InvalidParameterError,
    ModelError,
    ResourceExhaustedError,
    ShapeError,
    UnsupportedError,
)
from ferrum_ref.families import load_transcriber
from ferrum_ref.models.whisper import WhisperModel
from ferrum_ref.models.whisper_config import WhisperConfig, require_front_end
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType

IDS = [61, 62, 65, 70, 5, 99, 0, 59]


def picture(seed: int, bands: int = 8, frames: int = 40) -> Any:
    return np.random.default_rng(seed).standard_normal((bands, frames)).astype(np.float32)


@pytest.fixture(scope="module")
def model(whisper_directory: Path) -> WhisperModel:
    return load_transcriber(whisper_directory).model


@pytest.mark.clause("FM-WHISPER-5", "FM-WHISPER-6", "FM-WHISPER-3")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_exact_as_transformers(model: WhisperModel, judge: Any, seed: int) -> None:
    judged = judge.run(picture(seed), IDS)
    encoded = model.encode(picture(seed))
    exact, bound = judged["encoded"]
    assert np.abs(encoded.to_numpy() - exact).max() <= bound
    cache = model.new_cache()
    model.attend_to(cache, encoded)
    one_by_one = np.stack([model.decode(cache, [token]) for token in IDS])
    exact, bound = judged["logits"]
    assert np.abs(one_by_one - exact).max() <= bound
    cache = model.new_cache()
    model.attend_to(cache, encoded)
    model.decode(cache, IDS[:3])
    assert np.abs(model.decode(cache, IDS[3:]) - exact[-1]).max() <= bound


@pytest.mark.clause("FM-WHISPER-5", "FM-WHISPER-6", "FM-WHISPER-2")
def test_another_architecture(
    new_whisper: Callable[..., Any], save_whisper: Callable[..., Path], judge: Any, tmp_path: Path
) -> None:
    """Other heads, sizes and activation than the shared model's: nothing is taken from it by accident."""
    other = new_whisper(
        3, activation_function="relu", d_model=12, encoder_attention_heads=3, decoder_attention_heads=1,
        num_mel_bins=5, encoder_layers=1, max_source_positions=7, max_target_positions=9,
    )  # fmt: skip
    found = load_transcriber(save_whisper(tmp_path, other)).model
    judged = type(judge)(other).run(picture(4, 5, 14), IDS)
    encoded = found.encode(picture(4, 5, 14))
    assert np.abs(encoded.to_numpy() - judged["encoded"][0]).max() <= judged["encoded"][1]
    cache = found.new_cache()
    found.attend_to(cache, encoded)
    assert np.abs(found.decode(cache, IDS) - judged["logits"][0][-1]).max() <= judged["logits"][1]


@pytest.mark.clause("FM-WHISPER-7", "FM-WHISPER-5")
def test_what_is_refused_changes_nothing(model: WhisperModel) -> None:
    with pytest.raises(ShapeError, match=r"expected \(8, 40\)"):
        model.encode(picture(0, 8, 39))
    cache, untouched = model.new_cache(), model.new_cache()
    for each in (cache, untouched):
        model.attend_to(each, model.encode(picture(0)))
        model.decode(each, [61])
    for tokens, error in (
        ([], ModelError),
        ([5, 100], InvalidParameterError),
        ([5, -1], InvalidParameterError),
        ([5] * 32, ResourceExhaustedError),
    ):
        with pytest.raises(error):
            model.decode(cache, tokens)
    assert cache.length == 1
    np.testing.assert_array_equal(model.decode(cache, [7]), model.decode(untouched, [7]))
    model.decode(cache, [5] * 30)
    assert cache.length == 32


@pytest.mark.clause("FM-WHISPER-4")
@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_smaller_types(whisper_directory: Path, judge: Any, dtype: DataType) -> None:
    small = load_transcriber(whisper_directory, dtype=dtype).model
    assert small.weights.words.dtype() is dtype
    stored = load_file(whisper_directory / "model.safetensors")["model.decoder.embed_tokens.weight"]
    found = small.weights.words.to_numpy()
    np.testing.assert_array_equal(found, stored.astype(found.dtype))
    exact, _ = judge.run(picture(5), IDS)["logits"]
    cache = small.new_cache()
    small.attend_to(cache, small.encode(picture(5)))
    error = np.abs(small.decode(cache, IDS) - exact[-1]).max()
    assert 0 < error <= 0.25 * np.abs(exact).max()
    with pytest.raises(InvalidParameterError, match="INT8"):
        load_transcriber(whisper_directory, dtype=DataType.INT8)


class WithoutKernels:
    """A backend that has tensors and nothing else."""

    def __init__(self) -> None:
        self._real = make_backend("cpu")

    def kernel_ops(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.clause("FM-WHISPER-8")
def test_a_backend_without_kernels_is_refused(whisper_directory: Path) -> None:
    with pytest.raises(UnsupportedError, match="offers no linear kernels"):
        load_transcriber(whisper_directory, WithoutKernels())  # type: ignore[arg-type]


@pytest.mark.clause("FM-WHISPER-3")
def test_tensors_of_a_directory(whisper_directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).write_text((whisper_directory / name).read_text())
    tensors = load_file(whisper_directory / "model.safetensors")
    wrong = np.full((100, 24), np.nan, np.float32)
    save_file({**tensors, "proj_out.weight": wrong}, tmp_path / "model.safetensors")
    found = load_transcriber(tmp_path).model
    cache = found.new_cache()
    found.attend_to(cache, found.encode(picture(0)))
    assert np.isfinite(found.decode(cache, [61])).all()
    for name in ("model.encoder.conv2.bias", "model.decoder.layers.1.encoder_attn.k_proj.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(InvalidFormatError, match=name.removeprefix("model.").replace(".", r"\.")):
            load_transcriber(tmp_path)
    save_file({**tensors, "model.decoder.layers.2.fc1.bias": wrong[0]}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidFormatError, match="no place for"):
        load_transcriber(tmp_path)


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another model": ({"model_type": "bert"}, UnsupportedError, "model_type: got 'bert'"),
    "scaled words": ({"scale_embedding": True}, UnsupportedError, "scale_embedding"),
    "own output": ({"tie_word_embeddings": False}, UnsupportedError, "tie_word_embeddings"),
    "quantised": ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
    "activation": ({"activation_function": "mish"}, UnsupportedError, "activation_function"),
    "no size": ({"d_model": None}, InvalidFormatError, "d_model: got None"),
    "zero": ({"decoder_layers": 0}, InvalidFormatError, "decoder_layers: got 0"),
    "text": ({"vocab_size": "9"}, InvalidFormatError, "vocab_size"),
    "heads": ({"encoder_attention_heads": 5}, InvalidFormatError, "multiple of the 5 heads"),
    "decoder heads": ({"decoder_attention_heads": 7}, InvalidFormatError, "multiple of the 7 heads"),
}


@pytest.mark.clause("FM-WHISPER-2", "FM-WHISPER-1")
@pytest.mark.parametrize("name", BROKEN)
def test_configurations_that_are_refused(whisper_directory: Path, name: str) -> None:
    changes, error, text = BROKEN[name]
    config = json.loads((whisper_directory / "config.json").read_text())
    assert WhisperConfig.from_hf(config).window_samples == 6400
    with pytest.raises(error, match=text) as caught:
        WhisperConfig.from_hf({**config, **changes}, "here.json")
    assert "here.json" in str(caught.value)


@pytest.mark.clause("FM-WHISPER-1")
def test_a_configuration_by_hand() -> None:
    sizes = dict.fromkeys(WhisperConfig.__dataclass_fields__, 6)
    del sizes["hidden_act"]
    config = WhisperConfig(**sizes)
    assert (config.num_frames, config.window_samples) == (12, 1920)
    for name in sizes:
        with pytest.raises(ConfigError, match=name):
            WhisperConfig(**{**sizes, name: 2**31})


@pytest.mark.clause("FM-WHISPER-2")
def test_other_front_ends_are_refused(whisper_directory: Path, tmp_path: Path) -> None:
    config = WhisperConfig.from_hf(json.loads((whisper_directory / "config.json").read_text()))
    require_front_end({"feature_size": 8, "n_fft": 400, "hop_length": 160, "sampling_rate": 16000}, config, "here")
    fields = {"feature_size": 80, "n_fft": 512, "hop_length": 100, "sampling_rate": 8000, "n_samples": 480000}
    for field, value in fields.items():
        with pytest.raises(UnsupportedError, match=f"here: {field}: got {value}"):
            require_front_end({field: value}, config, "here")
    for each in whisper_directory.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"hop_length": 200}')
    with pytest.raises(UnsupportedError, match="hop_length: got 200"):
        load_transcriber(tmp_path)
