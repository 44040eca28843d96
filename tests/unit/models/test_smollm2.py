"""The real SmolLM2-135M-Instruct against transformers, in float64 and float32, on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.assembly import LoadedModel, load_model
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.model_executor import UnifiedBatch, UnifiedBatchItem
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.model

NUM_GENERATED = 64


@pytest.fixture(scope="module")
def loaded(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path)


@pytest.fixture(scope="module")
def prompt(loaded: LoadedModel) -> list[int]:
    text = loaded.tokenizer.apply_chat_template([ChatMessage.user("What is the capital of France?")])
    ids = [int(token) for token in loaded.tokenizer.encode(text, False)]
    assert len(ids) == 37
    return ids


@pytest.fixture(scope="module")
def continuation(loaded: LoadedModel, prompt: list[int]) -> list[int]:
    """Our greedy continuation, past the end of the answer."""
    llm, ids = loaded.new_llm(), list(prompt)
    logits = llm.prefill("a", ids)
    while True:
        ids.append(int(logits.argmax()))
        if len(ids) == len(prompt) + NUM_GENERATED:
            return ids[len(prompt) :]
        logits = llm.decode("a", ids[-1], len(ids) - 1)


class Judge:
    """transformers' logits of prompt and continuation, and twice its own float32 error on the prompt."""

    def __init__(self, exact: Any, rounded: Any, num_prompt: int) -> None:
        self.exact = exact
        self.bound = 2 * np.abs(rounded[:num_prompt] - exact[:num_prompt]).max()
        self.bound_of_all = 2 * np.abs(rounded - exact).max()

    def error(self, logits: Any, rows: Any) -> float:
        return float(np.abs(logits - self.exact[rows]).max())


@pytest.fixture(scope="module")
def judge(smollm2_path: Path, judge_logits: Any, prompt: list[int], continuation: list[int]) -> Judge:
    with open_checkpoint(smollm2_path) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        ids = prompt + continuation
        exact, rounded = (judge_logits(checkpoint.config, tensors, ids, double)[0] for double in (True, False))
    return Judge(exact, rounded, len(prompt))


@pytest.mark.clause("LM-FORWARD-1")
def test_prompt_logits_err_at_most_twice_as_much_as_transformers_float32(
    loaded: LoadedModel, prompt: list[int], judge: Judge
) -> None:
    logits = np.concatenate([loaded.new_llm().prefill("first", prompt[:1])[None], verify(loaded, prompt)])
    assert logits.shape == (37, 49152)
    assert judge.error(logits, slice(0, 37)) <= judge.bound


def verify(loaded: LoadedModel, ids: list[int]) -> Any:
    """Logits of every position but the first, in one forward after it."""
    llm = loaded.new_llm()
    llm.prefill("a", ids[:1])
    return llm.forward_verify("a", ids[1:]).reshape(len(ids) - 1, -1)


@pytest.mark.clause("LM-FORWARD-1")
def test_the_whole_prompt_in_one_forward(loaded: LoadedModel, prompt: list[int], judge: Judge) -> None:
    factory = ContiguousKvFactory(loaded.backend, loaded.kv_shape, 64)
    batch = ForwardBatch.build([prompt], [0]).with_all_logits()
    logits = loaded.decoder.forward(batch, factory.bind([factory.new_cache()], batch.lengths)).to_numpy()
    assert judge.error(logits, slice(0, 37)) <= judge.bound


@pytest.mark.clause("LM-FORWARD-1")
def test_greedy_continuation_is_transformers_own(
    loaded: LoadedModel, prompt: list[int], continuation: list[int], judge: Judge
) -> None:
    """Each next token is transformers' argmax after the same ids, so by induction the continuations are equal."""
    assert judge.exact[36:-1].argmax(axis=-1).tolist() == continuation
    assert "Paris" in loaded.tokenizer.decode(continuation[:8], True)


@pytest.mark.clause("LM-FORWARD-2", "LM-KV-1", "LM-KV-2")
@pytest.mark.parametrize("sizes", [[36, 1], [16, 16, 5], [5, 1, 1, 30]])
def test_chunked_prefill(loaded: LoadedModel, prompt: list[int], judge: Judge, sizes: list[int]) -> None:
    factory = ContiguousKvFactory(loaded.backend, loaded.kv_shape, 64)
    cache, start = factory.new_cache(), 0
    for size in sizes:
        batch = ForwardBatch.build([prompt[start : start + size]], [start]).with_all_logits()
        bound = factory.bind([cache], batch.lengths)
        logits = loaded.decoder.forward(batch, bound).to_numpy()
        bound.commit()
        assert judge.error(logits, slice(start, start + size)) <= judge.bound
        start += size


@pytest.mark.clause("LM-FORWARD-2", "LM-PAGED-1")
def test_paged_and_batched(loaded: LoadedModel, prompt: list[int], judge: Judge) -> None:
    """Three copies of the prompt at different stages in one forward, over scattered blocks of 5 tokens."""
    storage = PagedKvStorage(loaded.backend, loaded.kv_shape, 24, 5)
    blocks = np.random.default_rng(0).permutation(24).tolist()
    tables, done = [blocks[:8], blocks[8:16], blocks[16:]], [0, 0, 0]
    for sizes in ([20, 37, 3], [1, 0, 33], [16, 0, 1]):
        members = [i for i in range(3) if sizes[i]]
        tokens = [prompt[done[i] : done[i] + sizes[i]] for i in members]
        starts = [done[i] for i in members]
        batch = ForwardBatch.build(tokens, starts).with_all_logits()
        kv = storage.bind([tables[i] for i in members], starts, batch.lengths)
        logits = loaded.decoder.forward(batch, kv).to_numpy()
        assert judge.error(logits, batch.positions) <= judge.bound
        done = [d + n for d, n in zip(done, sizes, strict=True)]
    assert done == [37, 37, 37]


@pytest.mark.clause("MX-UNIFIED-1")
def test_executor_follows_the_continuation(
    loaded: LoadedModel, prompt: list[int], continuation: list[int], judge: Judge
) -> None:
    """Two sequences decode side by side, one chunk of a third prompt running beside each step."""
    executor, manager = loaded.new_executor(40, 8)
    handles = [manager.allocate_now(allocation(loaded, 64)) for _ in range(3)]
    ids = prompt + continuation
    first = [UnifiedBatchItem(str(i), ids[:37], handles[i], 0, True) for i in range(2)]
    assert all(judge.error(row, 36) <= judge.bound for row in executor.execute_unified(UnifiedBatch(first)))
    for step in range(6):
        items = [UnifiedBatchItem(str(i), [ids[37 + step]], handles[i], 37 + step, True) for i in range(2)]
        items.insert(step % 3, UnifiedBatchItem("2", ids[6 * step : 6 * step + 6], handles[2], 6 * step, step == 5))
        rows = executor.execute_unified(UnifiedBatch(items))
        for item, row in zip(items, rows, strict=True):
            last = item.pos_offset + len(item.q_tokens) - 1
            assert (row is None) == (not item.is_final_chunk)
            assert row is None or judge.error(row, last) <= judge.bound_of_all


def allocation(loaded: LoadedModel, num_tokens: int) -> Any:
    from ferrum_ref.interfaces.kv_cache import AllocationRequest
    from ferrum_ref.types.ids import RequestId
    from ferrum_ref.types.sampling import Priority

    shape = loaded.kv_shape
    return AllocationRequest(
        RequestId.new(), num_tokens, 64, shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.device,
        shape.dtype, Priority.Normal,
    )  # fmt: skip
