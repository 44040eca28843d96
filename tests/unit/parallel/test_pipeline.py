"""Layers over stages: the undivided decoder's logits, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.interfaces.collectives import Collectives
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.parallel.in_process import run_ranks
from ferrum_ref.parallel.pipeline import read_stage
from ferrum_ref.parallel.source import StageSource, layer_ranges
from ferrum_ref.parallel.subgroup import grid
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType


@pytest.mark.clause("TP-PIPE-1", "TP-LAYERS-1")
def test_stages_equal_the_undivided_decoder_bit_for_bit(
    each_family: Any, staged_logits: Callable[..., Any], single_logits: Callable[..., Any]
) -> None:
    tiny = each_family
    single = single_logits(tiny.path, tiny.ids)
    assert all(np.array_equal(each, single) for each in staged_logits(tiny.path, 3, tiny.ids))


@pytest.mark.clause("TP-PIPE-1", "TP-PIPE-3")
@pytest.mark.parametrize("dtype", [DataType.BF16, DataType.FP16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt 2", "gemma 3"])
def test_narrow_types_too(
    name: str,
    dtype: DataType,
    family_model: Callable[[str], Any],
    staged_logits: Callable[..., Any],
    single_logits: Callable[..., Any],
) -> None:
    tiny = family_model(name)
    single = single_logits(tiny.path, tiny.ids, dtype=dtype)
    assert np.isfinite(single).all()
    assert np.array_equal(staged_logits(tiny.path, 2, tiny.ids, dtype=dtype)[0], single)


@pytest.mark.clause("TP-PIPE-4", "TP-COLL-6")
@pytest.mark.parametrize("name", ["llama", "gemma 3", "gpt 2", "deepseek-v3"])
def test_a_grid_of_shards_and_stages(
    name: str,
    family_model: Callable[[str], Any],
    staged_logits: Callable[..., Any],
    sharded_logits: Callable[..., Any],
) -> None:
    tiny = family_model(name)
    found = staged_logits(tiny.path, 4, tiny.ids, num_shards=2)
    sharded = sharded_logits(tiny.path, 2, tiny.ids)[0]
    assert all(np.array_equal(each, sharded) for each in found)


@pytest.mark.clause("TP-PIPE-2", "TP-PIPE-3")
def test_some_rows_of_some_sequences_and_what_an_observer_sees(family_model: Callable[[str], Any]) -> None:
    tiny, backend = family_model("llama"), load_backend("numpy")
    batch = ForwardBatch.build([tiny.ids[:9], tiny.ids[9:14]], [0, 0], [True, False])

    def run(decoder: Decoder) -> SimpleNamespace:
        config = decoder.config
        shape = KvShape(len(decoder.weights.layers), config.num_kv_heads, config.head_dim)
        factory = ContiguousKvFactory(backend, shape, decoder.max_tokens)
        seen: dict[str, Any] = {}

        def observe(name: str, tensor: TensorRef) -> None:
            seen[name] = tensor.to_numpy()

        kv = factory.bind([factory.new_cache(), factory.new_cache()], batch.lengths)
        return SimpleNamespace(logits=decoder.forward(batch, kv, observe).to_numpy(), seen=seen)

    with open_checkpoint(tiny.path) as checkpoint:
        whole = run(Decoder(checkpoint.config, read_decoder_weights(checkpoint, backend), backend))
        stages = run_ranks(3, lambda peers: run(read_stage(checkpoint, backend, peers)))
    assert all(np.array_equal(stage.logits, whole.logits) for stage in stages)
    assert whole.logits.shape == (1, tiny.config.vocab_size)
    together = {name: values for stage in stages for name, values in stage.seen.items()}
    assert together.keys() == whole.seen.keys()
    assert sum(len(stage.seen) for stage in stages) == len(whole.seen)
    assert all(np.array_equal(together[name], values) for name, values in whole.seen.items())


@pytest.mark.clause("TP-PIPE-3", "TP-PIPE-4", "TP-RUN-1")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_batch_that_wants_no_logits_still_fills_the_caches(name: str, family_model: Callable[[str], Any]) -> None:
    tiny, backend = family_model(name), load_backend("numpy")

    def run(decoder: Decoder) -> Any:
        config = decoder.config
        shape = KvShape(len(decoder.weights.layers), config.num_kv_heads, config.head_dim)
        factory = ContiguousKvFactory(backend, shape, decoder.max_tokens)
        cache = factory.new_cache()
        for start, wanted in ((0, False), (5, True)):
            batch = ForwardBatch.build([tiny.ids[start : start + 5]], [start], [wanted])
            kv = factory.bind([cache], batch.lengths)
            logits = decoder.forward(batch, kv).to_numpy()
            kv.commit()
            assert logits.shape == (int(wanted), tiny.config.vocab_size)
        return logits

    with open_checkpoint(tiny.path) as checkpoint:
        found = run_ranks(4, lambda world: run(read_stage(checkpoint, backend, *reversed(grid(world, 2)))))
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0][0] - tiny.exact[9]).max() <= tiny.bound


@pytest.mark.clause("TP-PIPE-3")
def test_a_bad_batch_is_refused_on_every_stage_before_anything_is_sent(family_model: Callable[[str], Any]) -> None:
    tiny, backend = family_model("llama"), load_backend("numpy")

    def work(peers: Collectives) -> str:
        stage = read_stage(checkpoint, backend, peers)
        batch = ForwardBatch.build([[3, tiny.config.vocab_size]], [0])
        with pytest.raises(InvalidParameterError) as caught:
            stage.forward(batch, None)  # type: ignore[arg-type]
        return str(caught.value)

    with open_checkpoint(tiny.path) as checkpoint:
        found = run_ranks(2, work, timeout_s=5.0)
    assert found[0] == found[1]
    assert f"[0, {tiny.config.vocab_size}), got {tiny.config.vocab_size}" in found[0]


@pytest.mark.clause("TP-LAYERS-2")
def test_layers_are_dealt_out_in_runs() -> None:
    assert layer_ranges(7, 3) == (range(2), range(2, 4), range(4, 7))
    assert layer_ranges(3, 1) == (range(3),)
    for bad in (0, 4):
        with pytest.raises(InvalidParameterError, match=rf"got {bad} for 3 layers, expected 1 to 3"):
            layer_ranges(3, bad)


@pytest.mark.clause("TP-LAYERS-1")
def test_a_stage_holds_only_what_it_uses(family_model: Callable[[str], Any]) -> None:
    tiny = family_model("gemma 2")  # tied: the last stage needs the embedding as output matrix
    with open_checkpoint(tiny.path) as checkpoint:
        vocab = checkpoint.config.vocab_size
        for layers, rows in ((range(1), vocab), (range(1, 2), 1), (range(2, 3), vocab)):
            assert len(StageSource(checkpoint, layers).read("model.embed_tokens.weight")) == rows
        second = StageSource(checkpoint, range(1, 2))
        assert second.config.num_layers == 1
        assert second.config.layer_types == checkpoint.config.layer_types[1:2]
        name = "self_attn.q_proj.weight"
        expected = checkpoint.read(f"model.layers.1.{name}")
        assert np.array_equal(second.read(f"model.layers.0.{name}"), expected)
        expected = checkpoint.read("model.layers.2.input_layernorm.weight")
        assert np.array_equal(second.read("model.norm.weight"), expected)
        for bad in (range(0), range(2, 4), range(-1, 2)):
            with pytest.raises(InvalidParameterError, match="expected consecutive ones of 3"):
                StageSource(checkpoint, bad)
