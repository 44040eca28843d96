"""Every cache, every way of cutting a text, and both backends give the logits of one whole forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import transformers as hf

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.kv_cache.storage_ring import RingKvFactory

GEMMA2 = {
    "head_dim": 16,
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
GEMMA3 = {
    **{key: GEMMA2[key] for key in ("head_dim", "sliding_window", "query_pre_attn_scalar", "num_hidden_layers")},
    "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "mistral": (hf.MistralConfig, {"sliding_window": 9}),
    "gemma 2": (hf.Gemma2Config, GEMMA2),
    "gemma 3": (hf.Gemma3TextConfig, GEMMA3),
    "gpt-neox": (hf.GPTNeoXConfig, {"num_key_value_heads": ..., "rope_parameters": {"partial_rotary_factor": 0.5}}),
}
CHUNKS = (17, 1, 1, 30, 2)
BLOCK = 4


def ring(loaded: Any, slack: int = 3) -> RingKvFactory:
    config = loaded.config
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    return RingKvFactory(loaded.backend, loaded.kv_shape, loaded.decoder.max_tokens, windows, slack)


def in_pieces(loaded: Any, factory: Any, ids: list[int]) -> np.ndarray:
    """Logits of every row, the text cut into CHUNKS and then single tokens; another sequence runs beside it."""
    cache, beside = factory.new_cache(), factory.new_cache()
    found, start = [], 0
    sizes = [*CHUNKS, *[1] * (len(ids) - sum(CHUNKS))]
    for size in sizes:
        batch = ForwardBatch.build([ids[:2], ids[start : start + size]], [beside.num_tokens, start]).with_all_logits()
        kv = factory.bind([beside, cache], batch.lengths)
        found.append(np.asarray(loaded.decoder.forward(batch, kv).to_numpy())[2:])
        kv.commit()
        start += size
    return np.concatenate(found)


@pytest.mark.clause("LM-FORWARD-2", "LM-RING-1", "LM-KV-2")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cache", ["contiguous", "ring"])
def test_pieces_give_the_logits_of_the_whole(
    name: str, cache: str, tiny_model: Callable[..., Any], load_tiny: Callable[..., Any]
) -> None:
    kind, settings = CASES[name]
    tiny = tiny_model(kind, **settings)
    loaded = load_tiny(tiny.path)
    factory = ring(loaded) if cache == "ring" else loaded.factory
    ids = tiny.text[:70]
    assert np.abs(in_pieces(loaded, factory, ids) - tiny.exact[:70]).max() <= tiny.bound


@pytest.mark.clause("LM-FORWARD-2", "LM-PAGED-1")
@pytest.mark.parametrize("name", CASES)
def test_blocks_give_the_logits_of_the_whole(
    name: str, tiny_model: Callable[..., Any], load_tiny: Callable[..., Any]
) -> None:
    kind, settings = CASES[name]
    tiny = tiny_model(kind, **settings)
    loaded, ids = load_tiny(tiny.path), tiny.text[:60]
    storage = PagedKvStorage(loaded.backend, loaded.kv_shape, 20, BLOCK)
    table = np.random.default_rng(0).permutation(20).tolist()
    found, start = [], 0
    for size in (23, 1, 35, 1):
        batch = ForwardBatch.build([ids[start : start + size]], [start]).with_all_logits()
        found.append(loaded.decoder.forward(batch, storage.bind([table], [start], [size])).to_numpy())
        start += size
    assert np.abs(np.concatenate(found) - tiny.exact[:60]).max() <= tiny.bound


@pytest.mark.clause("LM-FORWARD-1")
@pytest.mark.parametrize("name", ["gemma 2", "gpt-neox"])
def test_torch_runs_the_same_decoder(
    name: str, tiny_model: Callable[..., Any], logit_error: Callable[..., float]
) -> None:
    kind, settings = CASES[name]
    tiny = tiny_model(kind, **settings)
    assert logit_error(tiny, backend="torch") <= tiny.bound


@pytest.mark.clause("LM-ROPE-9")
def test_only_the_own_sequence_decides_which_table_it_gets(
    tiny_model: Callable[..., Any], load_tiny: Callable[..., Any]
) -> None:
    """A long neighbour changes nothing, and a context of factor times the original is offered, no more."""
    rope = {"rope_type": "dynamic", "factor": 3.0}
    tiny = tiny_model(hf.LlamaConfig, max_position_embeddings=48, rope_parameters=rope)
    loaded, ids = load_tiny(tiny.path), tiny.text
    alone = loaded.logits(ids[:20])
    batch = ForwardBatch.build([ids[:20], ids[:80]], [0, 0]).with_all_logits()
    kv = loaded.factory.bind([loaded.factory.new_cache() for _ in "ab"], batch.lengths)
    both = loaded.decoder.forward(batch, kv).to_numpy()
    np.testing.assert_allclose(both[:20], alone, rtol=0, atol=tiny.bound)
    np.testing.assert_allclose(both[20:], loaded.logits(ids[:80]), rtol=0, atol=tiny.bound)
    assert loaded.decoder.max_tokens == 144
    beyond = ForwardBatch.build([[3]], [144])
    with pytest.raises(ResourceExhaustedError, match="position 144 is beyond the context of 144"):
        loaded.decoder.check(beyond)


@pytest.mark.clause("LM-ROPE-9")
def test_cached_keys_keep_the_table_they_were_turned_by(
    tiny_model: Callable[..., Any], load_tiny: Callable[..., Any]
) -> None:
    """A prompt of the original context, then its next tokens: transformers with its own cache does the same."""
    import torch

    rope = {"rope_type": "dynamic", "factor": 3.0}
    tiny = tiny_model(hf.LlamaConfig, max_position_embeddings=48, rope_parameters=rope)
    loaded, ids = load_tiny(tiny.path), tiny.text[:60]
    model, cache, theirs = tiny.make().to(torch.float64), None, []
    for start, end in ((0, 47), (47, 52), (52, 60)):
        with torch.no_grad():
            out = model(torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        theirs.append(out.logits[0].numpy())
    kv_cache, ours = loaded.factory.new_cache(), []
    for start, end in ((0, 47), (47, 52), (52, 60)):
        batch = ForwardBatch.build([ids[start:end]], [start]).with_all_logits()
        kv = loaded.factory.bind([kv_cache], batch.lengths)
        ours.append(loaded.decoder.forward(batch, kv).to_numpy())
        kv.commit()
    assert np.abs(np.concatenate(ours) - np.concatenate(theirs)).max() <= 4 * tiny.bound
    assert np.abs(np.concatenate(ours)[47:] - loaded.logits(ids)[47:]).max() > 100 * tiny.bound
