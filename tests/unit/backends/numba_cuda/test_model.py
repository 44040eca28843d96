"""A small Llama on the simulated backend, against transformers: no run may err more than a few times its float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_contiguous import KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights

IDS = [3, 17, 8, 30, 5]
TIMES = 4.0  # the simulator rounds every product, where BLAS fuses it with the sum
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def written_model(directory: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=33,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.slow
@pytest.mark.clause("BK-NCUDA-5")
def test_the_decoder_runs_on_it_with_a_paged_cache(tmp_path: Path, backend: Any) -> None:
    model = written_model(tmp_path)
    with torch.no_grad():
        narrow = model(torch.tensor([IDS])).logits[0].double().numpy()
        exact = model.double()(torch.tensor([IDS])).logits[0].numpy()
    checkpoint = open_checkpoint(tmp_path)
    decoder = Decoder(checkpoint.config, read_decoder_weights(checkpoint, backend), backend)
    config = checkpoint.config
    storage = PagedKvStorage(backend, KvShape(config.num_layers, config.num_kv_heads, config.head_dim), 5, 4)
    rows, start = [], 0
    for size in (4, 1):  # a prompt, a decode step
        batch = ForwardBatch.build([IDS[start : start + size]], [start]).with_all_logits()
        bound = storage.bind([[3, 1]], [start], batch.lengths)
        rows.append(decoder.forward(batch, bound).to_numpy())
        start += size
    error = np.abs(np.concatenate(rows) - exact).max()
    assert error <= TIMES * np.abs(narrow - exact).max()
