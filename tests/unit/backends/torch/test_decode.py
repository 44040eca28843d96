"""A whole decode step as one torch function, against transformers in float64 and against the step by operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ferrum_torch.decode import TorchDecodeBackend
from ferrum_torch.decode_step import DecodeStep
from ferrum_torch.tensor import TorchTensor

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType, Device

IDS = np.random.default_rng(5).integers(0, 97, 90).tolist()
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one kv head, biases": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
}


def weights_of(tiny: Any, backend: str = "torch", dtype: DataType = DataType.FP32) -> DecoderTransformerWeights:
    compute = load_backend(backend)
    return DecoderTransformerWeights.of_decoder(
        Decoder(tiny.config, read_decoder_weights(tiny, compute, dtype), compute)
    )


def no_kv(weights: DecoderTransformerWeights, dtype: DataType = DataType.FP32) -> list[Any]:
    config = weights.config()
    shape = (0, config.num_kv_heads, config.head_dim)
    empty = load_backend("torch").tensor_factory().zeros(shape, dtype, Device.CPU)
    return [(empty, empty)] * config.num_layers


def started(tiny: Any, mode: str = "eager", dtype: DataType = DataType.FP32, **options: Any) -> TorchDecodeBackend:
    weights = weights_of(tiny, dtype=dtype)
    decode = TorchDecodeBackend(weights, mode, **options)
    decode.init_kv_cache("text", no_kv(weights, dtype), 0)
    return decode


def steps(decode: TorchDecodeBackend, ids: Sequence[int], key: str = "text", start: int = 0) -> Any:
    rows = [decode.decode_step(token, start + i, key) for i, token in enumerate(ids)]
    assert all(row.shape() == (1, 1, 97) for row in rows)
    return np.concatenate([row.to_numpy()[0] for row in rows]).astype(np.float64)


@pytest.mark.clause("BK-TORCH-22", "DB-STEP-1", "DB-STEP-2", "DB-STEP-6", "DB-CACHE-2")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_position_of_a_text(tiny_llama: Any, variant: str) -> None:
    tiny = tiny_llama(1, **VARIANTS[variant])
    exact = tiny.logits(IDS, True)
    bound = 2 * float(np.abs(tiny.logits(IDS, False) - exact).max())
    assert np.abs(steps(started(tiny), IDS) - exact).max() <= bound  # 90 tokens: beyond the first capacity of 64


@pytest.mark.slow
@pytest.mark.clause("BK-TORCH-23")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_compiled_step_gives_the_same_logits(tiny_llama: Any) -> None:
    tiny = tiny_llama(1)
    exact = tiny.logits(IDS, True)
    bound = 2 * float(np.abs(tiny.logits(IDS, False) - exact).max())
    assert np.abs(steps(started(tiny, "compiled"), IDS) - exact).max() <= bound


@pytest.mark.clause("BK-TORCH-23")
def test_what_is_compiled_is_the_step_and_once_a_capacity(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is replaced by one that notes for which capacities it is called."""
    import torch

    capacities: set[int] = set()

    def compile_(step: Any, dynamic: bool) -> Any:
        assert isinstance(step.__self__, DecodeStep)
        assert dynamic is False

        def compiled(ids: Any, where: Any, keys: Any, values: Any) -> Any:
            capacities.add(keys[0].shape[0])
            return step(ids, where, keys, values)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    tiny = tiny_llama(1)
    exact = tiny.logits(IDS, True)
    bound = 2 * float(np.abs(tiny.logits(IDS, False) - exact).max())
    assert np.abs(steps(started(tiny, "compiled"), IDS) - exact).max() <= bound
    assert capacities == {64, min(128, tiny.config.max_position_embeddings)}


@pytest.mark.clause("BK-TORCH-24")
def test_graphs_need_cuda(tiny_llama: Any) -> None:
    with pytest.raises(UnsupportedError, match="mode 'graph' needs CUDA, the weights are on cpu"):
        TorchDecodeBackend(weights_of(tiny_llama(1)), "graph")


@pytest.mark.clause("BK-TORCH-24", "BK-TORCH-22")
def test_a_step_leaves_rows_after_its_own_unread_and_rows_before_it_alone(tiny_llama: Any) -> None:
    """What recording a graph relies on: a step run twice is a step run once."""
    import torch

    weights = weights_of(tiny_llama(1))
    step = DecodeStep(weights)
    config = weights.config()
    shape = (16, config.num_kv_heads, config.head_dim)
    rng = torch.Generator().manual_seed(0)
    keys = [torch.randn(shape, generator=rng) for _ in range(config.num_layers)]
    values = [torch.randn(shape, generator=rng) for _ in range(config.num_layers)]
    before = [tensor.clone() for tensor in keys + values]
    first = step(torch.tensor([9]), torch.tensor([5]), keys, values)
    for old, new in zip(before, keys + values, strict=True):
        changed = (old != new).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [5]
        new[6:] = 1e3
    assert torch.equal(step(torch.tensor([9]), torch.tensor([5]), keys, values), first)


@pytest.mark.clause("BK-TORCH-22", "DB-INIT-1", "DB-CACHE-1", "DB-CACHE-3")
@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.BF16])
def test_sequences_are_independent_and_a_hand_over_goes_on(tiny_llama: Any, dtype: DataType) -> None:
    decode = started(tiny_llama(7), dtype=dtype)
    alone = steps(decode, IDS[:20])
    sequence = decode._sequences["text"]
    kv = [(TorchTensor(k[:12]), TorchTensor(v[:12])) for k, v in zip(sequence.keys, sequence.values, strict=True)]
    decode.init_kv_cache("other", kv, 10)
    assert decode.cached_tokens("other") == 10
    mixed = []
    for i in range(10, 20):
        mixed.append(steps(decode, [IDS[i]], "other", i)[0])
        steps(decode, [IDS[-i]], "text", 10 + i)
    assert np.array_equal(np.stack(mixed), alone[10:])
    decode.release_kv_cache("other")
    decode.release_kv_cache("never there")
    assert not decode.has_kv_cache("other")
    assert decode.has_kv_cache("text")
    assert decode.size_bytes() == sum(t.nbytes for t in (*sequence.keys, *sequence.values))


@pytest.mark.clause("DB-STEP-3", "DB-STEP-4", "DB-STEP-5", "DB-INIT-4", "BK-TORCH-25")
def test_refusals_change_nothing(tiny_llama: Any) -> None:
    tiny = tiny_llama(7)
    weights = weights_of(tiny)
    decode = started(tiny, max_tokens=20)
    expected = steps(started(tiny, max_tokens=20), IDS[:20])
    steps(decode, IDS[:10])
    for token, position, key, kind in (
        (IDS[10], 9, "text", BackendError),
        (IDS[10], 11, "text", BackendError),
        (97, 10, "text", BackendError),
        (-1, 10, "text", BackendError),
        (IDS[10], 10, "nobody", NotFoundError),
    ):
        with pytest.raises(kind):
            decode.decode_step(token, position, key)
    kv = no_kv(weights)
    for bad, length, kind in (
        (kv[:-1], 0, BackendError),
        (kv, 1, BackendError),
        (kv, -1, BackendError),
        (no_kv(weights, DataType.BF16), 0, BackendError),
    ):
        with pytest.raises(kind):
            decode.init_kv_cache("text", bad, length)
    assert np.array_equal(steps(decode, IDS[10:20], start=10), expected[10:])
    with pytest.raises(ResourceExhaustedError, match="the whole context of 20"):
        decode.decode_step(1, 20, "text")
    with pytest.raises(InvalidParameterError, match="mode is 'fast'"):
        TorchDecodeBackend(weights, "fast")
    with pytest.raises(InvalidParameterError, match="max_tokens is 0"):
        TorchDecodeBackend(weights, max_tokens=0)
    with pytest.raises(BackendError, match="got weights of NumpyTensor"):
        TorchDecodeBackend(weights_of(tiny, "numpy"))
