"""The packed option from the command line down, and the real SmolLM2 packed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ferrum_ref import assembly
from ferrum_ref.assembly import load_model
from ferrum_ref.cli import generate
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory
from ferrum_ref.models.matrix import PackedWeight


@pytest.mark.clause("MD-PACK-2")
@pytest.mark.parametrize("options", [[], ["--packed"]])
def test_generate_passes_the_option_on(options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(assembly, "load_model", lambda *names, **options: asked.update(options))
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["generate", "model", "prompt", "--cache-dir", str(tmp_path), *options])
    generate._load(args)
    assert asked["packed"] is bool(options)


@pytest.mark.slow
@pytest.mark.clause("MD-PACK-1", "MD-PACK-2")
def test_smollm2_packed_says_what_it_says_dense() -> None:
    """Greedy tokens of both are the same ones; the packed weights are those of the file."""
    answers = []
    for packed in (False, True):
        loaded = load_model("smollm2-135m", packed=packed, max_tokens=128)
        weights = loaded.decoder.weights
        assert isinstance(weights.lm_head, PackedWeight) is packed
        if packed:
            assert weights.num_bytes() < 1.01 * loaded.path.stat().st_size
        tokens = [int(each) for each in loaded.tokenizer.encode("The capital of France is", True)]
        caches = ContiguousKvFactory(loaded.backend, loaded.kv_shape, 128)
        cache, start = caches.new_cache(), 0
        new = tokens
        for _ in range(16):
            batch = ForwardBatch.build([new], [start])
            logits = loaded.decoder.forward(batch, caches.bind([cache], batch.lengths)).to_numpy()
            start += len(new)
            new = [int(logits[-1].argmax())]
            tokens += new
        answers.append(tokens)
    assert answers[0] == answers[1]
