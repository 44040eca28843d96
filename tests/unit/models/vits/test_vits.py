"""VITS against transformers' VitsModel, judged by its float64 run, on random tiny voices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ferrum_ref.errors import (
    ConfigError,
    InvalidFormatError,
    InvalidParameterError,
    ModelError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.families import load_speech
from ferrum_ref.models.vits import SpeechControls, VitsModel
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.types.devices import DataType

IDS = [1, 5, 7, 2, 19, 3, 0, 4, 4]


@pytest.fixture(scope="module")
def model(voice_directory: Path) -> VitsModel:
    return load_speech(voice_directory).model


@pytest.mark.clause("FM-VITS-10", "FM-VITS-4", "FM-VITS-8", "FM-VITS-3")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_exact_as_transformers(
    model: VitsModel, voice_judge: Any, fixed_noise: Callable[..., Any], seed: int
) -> None:
    noise = fixed_noise(seed)
    exact, bound = voice_judge.waveform(IDS, noise)
    found = model.speak(IDS, noise)
    assert found.dtype == np.float32
    assert found.shape == exact.shape
    assert len(found) % model.config.samples_per_row == 0
    assert np.abs(found - exact).max() <= bound
    assert 0.02 < np.abs(exact).max() < 0.98


@pytest.mark.clause("FM-VITS-10", "FM-VITS-2")
def test_another_architecture(
    new_voice: Callable[..., Any], save_voice: Callable[..., Path], voice_judge: Any, fixed_noise: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    other = new_voice(
        5, hidden_size=18, num_attention_heads=3, window_size=1, ffn_kernel_size=4, hidden_act="gelu", flow_size=8,
        upsample_rates=[5], upsample_kernel_sizes=[5], resblock_kernel_sizes=[7], resblock_dilation_sizes=[[2, 1, 3]],
        leaky_relu_slope=0.3, depth_separable_num_layers=1, duration_predictor_num_flows=2, wavenet_kernel_size=3,
        duration_predictor_kernel_size=5, prior_encoder_num_flows=3, wavenet_dilation_rate=1, layer_norm_eps=1e-3,
        duration_predictor_tail_bound=2.0, speaking_rate=1.5, noise_scale=0.4, noise_scale_duration=1.1,
    )  # fmt: skip
    found = load_speech(save_voice(tmp_path, other)).model
    noise = fixed_noise(4)
    exact, bound = type(voice_judge)(other).waveform(IDS, noise)
    assert np.abs(found.speak(IDS, noise) - exact).max() <= bound


@pytest.mark.clause("FM-VITS-5")
@pytest.mark.parametrize("ids", [[3], [3, 4], [1, 2, 3, 4], IDS * 4])
def test_the_text_encoder(model: VitsModel, voice_judge: Any, ids: list[int]) -> None:
    """Shorter than the window of near letters, as long, and longer."""
    found = model.text.encode(ids)
    results = []
    with torch.no_grad():
        for judge, kind in ((voice_judge.single, torch.float32), (voice_judge.double, torch.float64)):
            out = judge.text_encoder(torch.tensor([ids]), torch.ones(1, len(ids), 1, dtype=kind))
            results.append((out.last_hidden_state, out.prior_means, out.prior_log_variances))
    for ours, single, double in zip((found[0].to_numpy(), *found[1:]), *results, strict=True):
        bound = 4 * (single.double() - double).abs().max()
        assert np.abs(ours - double[0].numpy()).max() <= float(bound)


@pytest.mark.clause("FM-VITS-6")
@pytest.mark.parametrize("seed", range(4))
def test_durations(model: VitsModel, voice_judge: Any, fixed_noise: Callable[..., Any], seed: int) -> None:
    noise = fixed_noise(seed)
    hidden = np.random.default_rng(seed).standard_normal((len(IDS), 24)).astype(np.float32)
    found = model.durations.predict(model._ops.rows(hidden), 0.8 * noise((2, len(IDS))))
    results = []
    with torch.no_grad(), noise.in_torch():
        for judge, kind in ((voice_judge.single, torch.float32), (voice_judge.double, torch.float64)):
            rows = torch.from_numpy(hidden.T[None].copy()).to(kind)
            mask = torch.ones(1, 1, len(IDS), dtype=kind)
            results.append(judge.duration_predictor(rows, mask, reverse=True, noise_scale=0.8).double()[0, 0].numpy())
    single, double = results
    assert np.abs(found - double).max() <= 4 * np.abs(single - double).max()


@pytest.mark.clause("FM-VITS-8", "FM-VITS-9")
def test_moments(model: VitsModel) -> None:
    counts = model.row_counts(np.log([0.2, 1.0, 2.3, 7.0]), 1.0)
    assert counts.tolist() == [1, 1, 3, 7]
    assert model.row_counts(np.log([0.2, 1.0, 2.3, 7.0]), 2.0).tolist() == [1, 1, 2, 4]
    assert model.row_counts(np.log([2.9]), 0.5).tolist() == [6]
    assert model.row_counts(np.array([-np.inf, -np.inf]), 1.0).tolist() == [0, 1]
    for wrong in ([math.log(65537)], [800.0], [math.nan], [11.0, 9.0, 0.0]):
        with pytest.raises(ResourceExhaustedError, match="at most 65536"):
            model.row_counts(np.array(wrong), 1.0)


@pytest.mark.clause("FM-VITS-9")
def test_controls(model: VitsModel, voice_judge: Any, fixed_noise: Callable[..., Any]) -> None:
    noise = fixed_noise(1)
    exact, bound = voice_judge.waveform(IDS, noise, speaking_rate=2.0)
    assert np.abs(model.speak(IDS, noise, SpeechControls(speed=2.0)) - exact).max() <= bound
    quiet = SpeechControls(noise_scale=0, noise_scale_duration=0)
    np.testing.assert_array_equal(model.speak(IDS, noise, quiet), model.speak(IDS, fixed_noise(2), quiet))
    as_the_model = SpeechControls(noise_scale=0.667, noise_scale_duration=0.8)
    np.testing.assert_array_equal(model.speak(IDS, noise, as_the_model), model.speak(IDS, noise))
    assert not np.array_equal(model.speak(IDS, noise, SpeechControls(noise_scale=0.1)), model.speak(IDS, noise))
    for wrong in ({"speed": 0.09}, {"speed": 11}, {"speed": math.nan}, {"noise_scale": -0.1}, {"noise_scale": 5.0},
                  {"noise_scale_duration": math.inf}):  # fmt: skip
        with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
            SpeechControls(**wrong)


@pytest.mark.clause("FM-VITS-10")
def test_ids_that_are_refused(model: VitsModel, fixed_noise: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="no id"):
        model.speak([], fixed_noise())
    for wrong in (20, -1):
        with pytest.raises(InvalidParameterError, match=rf"\[0, 20\), got {wrong}"):
            model.speak([1, wrong], fixed_noise())


@pytest.mark.clause("FM-VITS-3")
def test_tensors_of_a_directory(voice_directory: Path, fixed_noise: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("config.json", "vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((voice_directory / name).read_text())
    tensors = load_file(voice_directory / "model.safetensors")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): values
        for name, values in tensors.items()
        if "posterior" not in name and ".post_" not in name and "flows.1." not in name.split("duration_predictor.")[-1]
    }
    old |= {name: values for name, values in tensors.items() if name.startswith("flow.flows.1.conv")}
    kept = {name for name in tensors if name.startswith("flow.flows.1.wavenet")}
    old |= {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensors[name]
        for name in kept
    }  # torch's older spelling, and nothing that only training needs
    save_file(old, tmp_path / "model.safetensors")
    noise = fixed_noise()
    np.testing.assert_array_equal(
        load_speech(tmp_path).model.speak(IDS, noise), load_speech(voice_directory).model.speak(IDS, noise)
    )
    for name in ("decoder.upsampler.1.bias", "flow.flows.0.wavenet.in_layers.2.weight_g"):
        save_file({key: value for key, value in old.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(InvalidFormatError, match=name.replace(".", r"\.")):
            load_speech(tmp_path)


@pytest.mark.clause("FM-VITS-4")
def test_weights_are_float32(model: VitsModel) -> None:
    assert model.text._weights.words.dtype() is DataType.FP32
    assert model.vocoder._weights.vocoder_after.affine.weight.dtype() is DataType.FP32


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another model": ({"model_type": "bert"}, UnsupportedError, "model_type: got 'bert'"),
    "speakers": ({"num_speakers": 2}, UnsupportedError, "num_speakers"),
    "plain durations": ({"use_stochastic_duration_prediction": False}, UnsupportedError, "use_stochastic"),
    "no bias": ({"use_bias": False}, UnsupportedError, "use_bias"),
    "activation": ({"hidden_act": "mish"}, UnsupportedError, "hidden_act"),
    "quantised": ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
    "zero": ({"num_hidden_layers": 0}, InvalidFormatError, "num_hidden_layers: got 0"),
    "heads": ({"num_attention_heads": 5}, InvalidFormatError, "multiple of 5"),
    "odd flow": ({"flow_size": 13}, InvalidFormatError, "multiple of 2"),
    "even kernel": ({"wavenet_kernel_size": 4}, InvalidFormatError, "odd number"),
    "even block": ({"resblock_kernel_sizes": [3, 4]}, InvalidFormatError, "odd number"),
    "wide kernel": ({"ffn_kernel_size": 99}, InvalidFormatError, "at most 64"),
    "bins": ({"duration_predictor_flow_bins": 1000}, InvalidFormatError, "below 1000"),
    "dilations": ({"depth_separable_num_layers": 40}, InvalidFormatError, "dilations up to 65536"),
    "stages": ({"upsample_rates": [4]}, InvalidFormatError, "2 for 1 upsample_rates"),
    "short kernel": ({"upsample_kernel_sizes": [2, 5]}, InvalidFormatError, "rate"),
    "odd rest": ({"upsample_kernel_sizes": [9, 5]}, InvalidFormatError, "even number"),
    "no list": ({"upsample_rates": 8}, InvalidFormatError, "upsample_rates"),
    "zero rate": ({"upsample_rates": [0, 3]}, InvalidFormatError, "upsample_rates"),
    "channels": ({"upsample_initial_channel": 18}, InvalidFormatError, "multiple of 4"),
    "blocks": ({"resblock_dilation_sizes": [[1]]}, InvalidFormatError, "one list for each"),
    "empty block": ({"resblock_dilation_sizes": [[1], []]}, InvalidFormatError, "resblock_dilation_sizes"),
    "no blocks": ({"resblock_kernel_sizes": [], "resblock_dilation_sizes": []}, InvalidFormatError, "1 to 16"),
    "slope": ({"leaky_relu_slope": -1}, InvalidFormatError, "leaky_relu_slope"),
    "rate": ({"speaking_rate": 0}, InvalidFormatError, "speaking_rate"),
    "noise": ({"noise_scale": float("nan")}, InvalidFormatError, "noise_scale"),
    "bound": ({"duration_predictor_tail_bound": "5"}, InvalidFormatError, "tail_bound"),
}


@pytest.mark.clause("FM-VITS-2", "FM-VITS-1")
@pytest.mark.parametrize("name", BROKEN)
def test_configurations_that_are_refused(voice_directory: Path, name: str) -> None:
    changes, error, text = BROKEN[name]
    config = json.loads((voice_directory / "config.json").read_text())
    assert VitsConfig.from_hf(config).samples_per_row == 12
    with pytest.raises(error, match=text) as caught:
        VitsConfig.from_hf({**config, **changes}, "here.json")
    assert "here.json" in str(caught.value)


@pytest.mark.clause("FM-VITS-2", "FM-VITS-1")
def test_what_a_configuration_leaves_out() -> None:
    import transformers

    found = VitsConfig.from_hf({"model_type": "vits"})
    defaults = transformers.VitsConfig()
    for name in VitsConfig.__dataclass_fields__:
        if name != "paired_resblocks":
            expected = getattr(defaults, name)
            assert getattr(found, name) == (tuple(expected) if isinstance(expected, list) else expected), name
    with pytest.raises(ConfigError, match="hidden_size"):
        VitsConfig(**{**{name: getattr(found, name) for name in VitsConfig.__dataclass_fields__}, "hidden_size": 0})
