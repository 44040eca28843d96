"""A whole decode step over device memory that stays in its place, its kernels running on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ferrum_cupy.decode import CupyDecodeBackend
from ferrum_cupy.tensor import CupyTensor

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

IDS = np.random.default_rng(5).integers(0, 97, 24).tolist()


@pytest.fixture(autouse=True)
def short_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that must grow soon: every step costs a tenth of a second here."""
    monkeypatch.setattr("ferrum_cupy.decode.FIRST_CAPACITY_TOKENS", 16)


def weights_of(tiny: Any, backend: Any, dtype: DataType = DataType.FP32) -> DecoderTransformerWeights:
    return DecoderTransformerWeights.of_decoder(
        Decoder(tiny.config, read_decoder_weights(tiny, backend, dtype), backend)
    )


def no_kv(host: Any, weights: DecoderTransformerWeights, dtype: DataType = DataType.FP32) -> list[Any]:
    shape = (0, weights.config().num_kv_heads, weights.config().head_dim)
    empty = host.tensor_factory().zeros(shape, dtype, Device.CPU)
    return [(empty, empty)] * weights.config().num_layers


def started(host: Any, tiny: Any, dtype: DataType = DataType.FP32, **options: Any) -> CupyDecodeBackend:
    weights = weights_of(tiny, host, dtype)
    decode = CupyDecodeBackend(weights, **options)
    decode.init_kv_cache("text", no_kv(host, weights, dtype), 0)
    return decode


def steps(decode: CupyDecodeBackend, ids: Sequence[int], key: str = "text", start: int = 0) -> Any:
    rows = [decode.decode_step(token, start + i, key) for i, token in enumerate(ids)]
    assert all(row.shape() == (1, 1, 97) for row in rows)
    return np.concatenate([row.to_numpy()[0] for row in rows]).astype(np.float64)


@pytest.mark.clause("BK-CUPY-17", "BK-CUPY-18", "DB-STEP-1", "DB-STEP-2", "DB-STEP-6", "DB-CACHE-2")
@pytest.mark.parametrize(
    "variant", [{}, {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True}], ids=["gqa", "biases"]
)
def test_every_position_of_a_text(host: Any, tiny_llama: Any, variant: dict[str, Any]) -> None:
    tiny = tiny_llama(1, **variant)
    exact = tiny.logits(IDS, True)
    bound = 2 * float(np.abs(tiny.logits(IDS, False) - exact).max())
    assert np.abs(steps(started(host, tiny), IDS) - exact).max() <= bound  # 24 tokens: beyond the first capacity of 16


@pytest.mark.clause("BK-CUPY-18")
@pytest.mark.parametrize("dtype", [DataType.BF16, DataType.FP32])
@pytest.mark.parametrize(("biases", "each"), [({}, 11), ({"attention_bias": True, "mlp_bias": True}, 14)])
def test_a_layer_is_so_many_launches(
    host: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, dtype: DataType, biases: Any, each: int
) -> None:
    tiny = tiny_llama(7, **biases)
    decode = started(host, tiny, dtype)
    counted: list[str] = []
    launch, multiply = host._machine.launch, host._machine.multiply
    monkeypatch.setattr(host._machine, "launch", lambda *given: counted.append(given[1]) or launch(*given))
    monkeypatch.setattr(
        host._machine, "multiply", lambda *given, **more: counted.append("gemm") or multiply(*given, **more)
    )
    steps(decode, IDS[:1])
    assert len(counted) == each * tiny.config.num_layers + 3  # the token's row, the first norm, the head
    assert counted.count("gemm") == 4 * tiny.config.num_layers + 1


@pytest.mark.clause("BK-CUPY-17", "DB-INIT-1", "DB-CACHE-1", "DB-CACHE-3")
def test_sequences_are_independent_and_a_hand_over_goes_on(host: Any, tiny_llama: Any) -> None:
    decode = started(host, tiny_llama(7), DataType.BF16)
    alone = steps(decode, IDS[:16])
    sequence = decode._sequences["text"]
    kv = [
        (CupyTensor(host._machine, k[:12], DataType.BF16), CupyTensor(host._machine, v[:12], DataType.BF16))
        for k, v in zip(sequence.keys, sequence.values, strict=True)
    ]
    decode.init_kv_cache("other", kv, 10)
    assert decode.cached_tokens("other") == 10
    mixed = []
    for i in range(10, 16):
        mixed.append(steps(decode, [IDS[i]], "other", i)[0])
        steps(decode, [IDS[-i]], "text", 6 + i)
    assert np.array_equal(np.stack(mixed), alone[10:])
    decode.release_kv_cache("other")
    decode.release_kv_cache("never there")
    assert not decode.has_kv_cache("other")
    assert decode.has_kv_cache("text")
    assert decode.size_bytes() == sum(t.nbytes for t in (*sequence.keys, *sequence.values))


@pytest.mark.clause("BK-CUPY-19")
def test_a_recorded_step_is_replayed_with_other_tokens(
    host: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder is replaced by one that, like a graph, repeats the launches over the same memory."""
    recorded: list[int] = []

    def record(step: Callable[[], Any]) -> Callable[[], Any]:
        step()
        result = step()
        recorded.append(1)

        def replay() -> Any:
            result[...] = step()
            return result

        return replay

    expected = steps(started(host, tiny_llama(7)), IDS)
    monkeypatch.setattr(host._machine, "check_graphs", lambda: None)
    monkeypatch.setattr(host._machine, "record", record)
    assert np.array_equal(steps(started(host, tiny_llama(7), use_graphs=True), IDS), expected)
    assert len(recorded) == 2  # once for 16 tokens, once for what follows


@pytest.mark.clause("BK-CUPY-19")
def test_the_host_records_nothing(host: Any, tiny_llama: Any) -> None:
    with pytest.raises(UnsupportedError, match="records no graphs"):
        CupyDecodeBackend(weights_of(tiny_llama(7), host), use_graphs=True)


@pytest.mark.clause("DB-STEP-3", "DB-STEP-4", "DB-STEP-5", "DB-INIT-4", "BK-CUPY-17")
def test_refusals_change_nothing(host: Any, tiny_llama: Any) -> None:
    tiny = tiny_llama(7)
    weights, decode = weights_of(tiny, host), started(host, tiny, max_tokens=12)
    expected = steps(started(host, tiny, max_tokens=12), IDS[:12])
    steps(decode, IDS[:8])
    for token, position, key, kind in (
        (IDS[8], 7, "text", BackendError),
        (IDS[8], 9, "text", BackendError),
        (97, 8, "text", BackendError),
        (-1, 8, "text", BackendError),
        (IDS[8], 8, "nobody", NotFoundError),
    ):
        with pytest.raises(kind):
            decode.decode_step(token, position, key)
    kv = no_kv(host, weights)
    for bad, length, kind in (
        (kv[:-1], 0, BackendError),
        (kv, 1, BackendError),
        (kv, -1, BackendError),
        (no_kv(host, weights, DataType.BF16), 0, BackendError),
    ):
        with pytest.raises(kind):
            decode.init_kv_cache("text", bad, length)
    assert np.array_equal(steps(decode, IDS[8:12], start=8), expected[8:])
    with pytest.raises(ResourceExhaustedError, match="the whole context of 12"):
        decode.decode_step(1, 12, "text")
    with pytest.raises(InvalidParameterError, match="max_tokens is 0"):
        CupyDecodeBackend(weights, max_tokens=0)
    with pytest.raises(BackendError, match="got weights of NumpyTensor"):
        CupyDecodeBackend(weights_of(tiny, load_backend("numpy")))
