"""The same models over another backend's kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ferrum_ref.models.vits import VitsModel
from ferrum_ref.models.vits_config import VitsConfig
from ferrum_ref.models.vits_weights import HfVitsTensors, VitsReader
from ferrum_ref.models.whisper import WhisperModel
from ferrum_ref.models.whisper_config import WhisperConfig
from ferrum_ref.models.whisper_weights import HfWhisperTensors, read_whisper_weights
from ferrum_ref.plugins import load_backend


@pytest.mark.clause("FM-WHISPER-6", "FM-WHISPER-5")
def test_whisper_on_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=30, num_mel_bins=4, d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8,
            decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=8, max_source_positions=6,
            max_target_positions=9, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    config = WhisperConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    logits = []
    for name in ("numpy", "torch"):
        backend, source = load_backend(name, "cpu"), HfWhisperTensors(tmp_path, config)
        model = WhisperModel(config, read_whisper_weights(source, config, backend, np.float32), backend)
        source.close()
        cache = model.new_cache()
        features = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
        model.attend_to(cache, model.encode(features))
        logits.append([model.decode(cache, [token]) for token in (1, 5, 29)])
    scale = np.abs(logits[0]).max()
    assert np.abs(np.subtract(*logits)).max() <= 2**-18 * scale


@pytest.mark.clause("FM-VITS-10", "FM-CONV-1", "FM-CONV-4")
def test_vits_on_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.VitsModel(
        transformers.VitsConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, flow_size=4,
            spectrogram_bins=5, upsample_initial_channel=4, upsample_rates=[4], upsample_kernel_sizes=[8],
            resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], duration_predictor_num_flows=2,
            prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=2, posterior_encoder_num_wavenet_layers=1,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    config = VitsConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    samples = []
    for name in ("numpy", "torch"):
        source = HfVitsTensors(tmp_path, config)
        backend = load_backend(name, "cpu")
        model = VitsModel(config, VitsReader(source, config, backend).weights(), backend)
        source.close()
        samples.append(model.speak([1, 4, 2, 7], np.random.default_rng(0).standard_normal))
    assert samples[0].shape == samples[1].shape
    assert np.abs(np.subtract(*samples)).max() <= 2**-16
