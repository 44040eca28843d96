"""Hand-over of a prefill's keys and values: what is taken, what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import BackendError, ResourceExhaustedError
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend, kv_of_blocks
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
)
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.types.devices import DataType

IDS = np.random.default_rng(3).integers(0, 97, 90).tolist()


@pytest.mark.clause("DB-INIT-1", "DB-INIT-2", "DB-STEP-2")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("prefill_len", [1, 7, 64, 88])
def test_hand_over_in_the_middle_of_a_text(
    tiny_llama: Any, variant: dict[str, Any], backend: str, prefill_len: int, make_bench: Any, judge: Any
) -> None:
    tiny = tiny_llama(1, **variant)
    bench = make_bench(tiny, backend)
    executor, handle, storage = bench.prefilled(IDS[:prefill_len])
    kv = kv_of_blocks(storage, handle.block_table().physical_blocks, 3, prefill_len)
    bench.decode.init_kv_cache("a", kv, prefill_len)
    exact, bound = judge(tiny, IDS)
    rest = IDS[prefill_len : prefill_len + 12]
    logits = bench.steps("a", rest, prefill_len)
    assert np.abs(logits - exact[prefill_len : prefill_len + len(rest)]).max() <= bound
    for i, token in enumerate(rest):
        tensor = bench.compute.tensor_factory().from_ids([token])
        theirs = asyncio.run(executor.decode(DecodeInput.new(tensor, handle))).logits.to_numpy()[0]
        assert np.abs(logits[i] - theirs).max() <= 2 * bound  # both within the bound of the truth
        assert logits[i].argmax() == theirs.argmax()


@pytest.mark.clause("DB-INIT-1", "DB-INIT-2")
def test_rows_are_copied_and_those_beyond_the_prompt_ignored(bench: Any, judge: Any) -> None:
    bench.decode.init_kv_cache("whole", bench.no_kv(), 0)
    expected = bench.steps("whole", IDS[:9])[8]
    _, handle, storage = bench.prefilled(IDS[:8], block_size=3)
    kv = kv_of_blocks(storage, handle.block_table().physical_blocks, 3, 8)
    padded = [(_padded(k), _padded(v)) for k, v in kv]
    bench.decode.init_kv_cache("copy", padded, 8)
    for pair in padded:
        for tensor in pair:
            tensor.to_numpy()[:] = np.nan
    found = bench.decode.decode_step(IDS[8], 8, "copy").to_numpy()[0, 0]
    assert np.abs(found - expected).max() <= judge(bench.tiny, IDS[:9])[1] * 2


def _padded(tensor: Any) -> Any:
    from ferrum_ref.numpy_backend.tensor import NumpyTensor

    return NumpyTensor(np.concatenate([tensor.to_numpy(), np.full((5, 2, 8), 1e3, np.float32)]))


@pytest.mark.clause("DB-INIT-3")
def test_an_existing_key_is_replaced(bench: Any) -> None:
    bench.decode.init_kv_cache("again", bench.no_kv(), 0)
    first = bench.steps("again", IDS[:5])
    bench.decode.init_kv_cache("again", bench.no_kv(), 0)
    assert bench.decode.cached_tokens("again") == 0
    np.testing.assert_array_equal(bench.steps("again", IDS[:5]), first)


@pytest.mark.clause("DB-INIT-4")
def test_a_hand_over_that_cannot_be_leaves_the_old_cache(bench: Any) -> None:
    factory = bench.compute.tensor_factory()
    bench.decode.init_kv_cache("old", bench.no_kv(), 0)
    bench.steps("old", IDS[:3])
    device = bench.shape.device

    def pairs(*shape: int, dtype: DataType = DataType.FP32, layers: int = 3) -> Any:
        return [(factory.zeros(shape, dtype, device), factory.zeros(shape, dtype, device))] * layers

    for kv, length, kind, complaint in (
        (pairs(4, 2, 8, layers=2), 4, BackendError, "got 2 layers"),
        (pairs(4, 2, 8, layers=4), 4, BackendError, "expected 3 pairs"),
        (pairs(4, 2, 8), 5, BackendError, r"K of layer 0 has shape \(4, 2, 8\), expected \[at least 5, 2, 8\]"),
        (pairs(2, 4, 8), 2, BackendError, r"expected \[at least 2, 2, 8\]"),
        (pairs(4, 16), 4, BackendError, "has shape"),
        (pairs(1, 4, 2, 8), 1, BackendError, "has shape"),
        (pairs(4, 2, 8, dtype=DataType.FP16), 4, BackendError, "is fp16, expected fp32"),
        (pairs(4, 2, 8), -1, BackendError, "prefill_len -1"),
        (pairs(97, 2, 8), 97, ResourceExhaustedError, "97 tokens exceed the context of 96"),
        ([(pairs(4, 2, 8)[0][0], pairs(4, 2, 7)[0][0])] * 3, 4, BackendError, "V of layer 0"),
    ):
        with pytest.raises(kind, match=complaint):
            bench.decode.init_kv_cache("old", kv, length)
        with pytest.raises(kind):
            bench.decode.init_kv_cache("never", kv, length)
    assert bench.decode.cached_tokens("old") == 3
    assert not bench.decode.has_kv_cache("never")


@pytest.mark.model
@pytest.mark.clause("DB-STEP-2", "DB-INIT-2")
def test_the_real_model_goes_on_where_its_executor_stopped(smollm2_path: Path, prefill_paged: Any) -> None:
    from ferrum_ref.assembly import load_model

    loaded = load_model(smollm2_path)
    prompt = [int(token) for token in loaded.tokenizer.encode("The capital of France is", False)]
    _, handle, storage = prefill_paged(loaded.decoder, loaded.kv_shape, prompt, 4)
    blocks = handle.block_table().physical_blocks
    llm = loaded.new_llm()
    logits = llm.prefill("a", prompt)
    decode = TransformerDecodeBackend(DecoderTransformerWeights.of_decoder(loaded.decoder), loaded.backend)
    decode.init_kv_cache("a", kv_of_blocks(storage, blocks, loaded.config.num_layers, len(prompt)), len(prompt))
    for position in range(len(prompt), len(prompt) + 5):
        token = int(logits.argmax())
        logits = llm.decode("a", token, position)
        np.testing.assert_array_equal(decode.decode_step(token, position, "a").to_numpy()[0, 0], logits)
