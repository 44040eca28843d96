"""The decoder against transformers in float64: no run may err more than twice as much as transformers in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError, UnsupportedError
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.plugins import load_backend

VARIANTS = {
    "gqa": {},
    "one head each": {"num_kv_heads": 4},
    "one kv head, biases": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
    "one layer, odd sizes": {"num_layers": 1, "hidden_size": 36, "intermediate_size": 33, "head_dim": 6},
    "large theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
}
NUM_TOKENS = 60


class Case:
    """One tiny model on a backend, a prompt, and what transformers says about it."""

    def __init__(self, tiny: Any, ids: list[int], backend: str) -> None:
        self.model = tiny
        self.ids = ids
        self.backend = load_backend(backend)
        self.decoder = Decoder(tiny.config, read_decoder_weights(tiny, self.backend), self.backend)
        config = tiny.config
        self.shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim)
        self.factory = ContiguousKvFactory(self.backend, self.shape, self.decoder.max_tokens)
        self.exact = tiny.logits(ids, True)
        self.bound = 2 * np.abs(tiny.logits(ids, False) - self.exact).max()

    def error(self, logits: Any, rows: Any = slice(None)) -> float:
        return float(np.abs(logits - self.exact[rows]).max())

    def single(self) -> Any:
        cache = self.factory.new_cache()
        batch = ForwardBatch.build([self.ids], [0]).with_all_logits()
        return self.decoder.forward(batch, self.factory.bind([cache], batch.lengths)).to_numpy()

    def chunked(self, sizes: list[int]) -> Any:
        """The prompt in pieces, over one contiguous cache."""
        cache, rows, start = self.factory.new_cache(), [], 0
        for size in sizes:
            batch = ForwardBatch.build([self.ids[start : start + size]], [start]).with_all_logits()
            bound = self.factory.bind([cache], batch.lengths)
            rows.append(self.decoder.forward(batch, bound).to_numpy())
            bound.commit()
            start += size
        return np.concatenate(rows)

    def paged(self, sizes: list[int], block_size: int, rng: np.random.Generator, num_others: int) -> Any:
        """The prompt in pieces over shuffled blocks, each piece sharing its forward with other sequences."""
        per_sequence = -(-NUM_TOKENS // block_size)
        num_blocks = (1 + num_others) * per_sequence + 1
        storage = PagedKvStorage(self.backend, self.shape, num_blocks, block_size)
        blocks = rng.permutation(num_blocks).tolist()
        tables = [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(1 + num_others)]
        rows, start, cached = [], 0, [0] * num_others
        for size in sizes:
            new = [1 if cached[i] else int(rng.integers(1, 5)) for i in range(num_others)]
            others = [rng.integers(0, 97, n).tolist() for n in new]
            batch = ForwardBatch.build([*others, self.ids[start : start + size]], [*cached, start]).with_all_logits()
            kv = storage.bind([*tables[1:], tables[0]], [*cached, start], batch.lengths)
            rows.append(self.decoder.forward(batch, kv).to_numpy()[-size:])
            start += size
            cached = [c + n for c, n in zip(cached, new, strict=True)]
        return np.concatenate(rows)


@pytest.fixture(scope="module", params=["numpy", "torch"])
def cases(tiny_llama: Any, request: pytest.FixtureRequest) -> Any:
    """The decoder is written once: what holds on one backend holds on every other."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            seed = sorted(VARIANTS).index(name)
            ids = np.random.default_rng(seed).integers(0, 97, NUM_TOKENS).tolist()
            made[name] = Case(tiny_llama(seed, **VARIANTS[name]), ids, request.param)
        return made[name]

    return case


@pytest.mark.clause("LM-FORWARD-1", "LM-ROPE-1", "LM-WEIGHTS-1")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_position(cases: Any, name: str) -> None:
    case = cases(name)
    assert case.error(case.single()) <= case.bound


@pytest.mark.clause("LM-FORWARD-2", "LM-KV-1", "LM-KV-2")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [59, 1], [1, 59], [16, 16, 16, 12], [7, 1, 1, 30, 21]])
def test_chunks_give_what_the_whole_prompt_gives(cases: Any, name: str, sizes: list[int]) -> None:
    case = cases(name)
    assert case.error(case.chunked(sizes)) <= case.bound


@pytest.mark.clause("LM-FORWARD-2", "LM-PAGED-1", "LM-KV-1", "LM-KV-2")
@given(data=st.data())
def test_shuffled_blocks_and_company_change_nothing(cases: Any, data: st.DataObject) -> None:
    case = cases(data.draw(st.sampled_from(sorted(VARIANTS))))
    cuts = sorted(data.draw(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=5)))
    sizes = np.diff([0, *cuts, NUM_TOKENS]).tolist()
    block_size = data.draw(st.sampled_from([1, 3, 16, 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    assert case.error(case.paged(sizes, block_size, rng, data.draw(st.integers(0, 3)))) <= case.bound


@pytest.mark.clause("LM-FORWARD-3")
def test_only_wanted_rows_in_the_wanted_order(cases: Any) -> None:
    case = cases("gqa")
    for rows in ([59], [0], [3, 59, 3, 17], list(range(60)), list(range(59, -1, -1))):
        whole = ForwardBatch.build([case.ids], [0])
        batch = ForwardBatch(whole.token_ids, whole.positions, whole.lengths, np.array(rows))
        logits = case.decoder.forward(batch, case.factory.bind([case.factory.new_cache()], [60])).to_numpy()
        assert logits.shape == (len(rows), 97)
        assert case.error(logits, rows) <= case.bound


@pytest.mark.clause("LM-FORWARD-3")
def test_a_chunk_without_wanted_rows_still_fills_the_cache(cases: Any) -> None:
    case = cases("gqa")
    cache = case.factory.new_cache()
    first = ForwardBatch.build([case.ids[:40]], [0], [False])
    bound = case.factory.bind([cache], first.lengths)
    assert case.decoder.forward(first, bound).shape() == (0, 97)
    bound.commit()
    rest = ForwardBatch.build([case.ids[40:]], [40]).with_all_logits()
    logits = case.decoder.forward(rest, case.factory.bind([cache], rest.lengths)).to_numpy()
    assert case.error(logits, slice(40, 60)) <= case.bound


@pytest.mark.clause("LM-FORWARD-5")
def test_observers_see_every_layer(cases: Any, judge_logits: Any) -> None:
    case = cases("gqa")
    seen: dict[str, Any] = {}
    batch = ForwardBatch.build([case.ids], [0]).with_all_logits()
    kv = case.factory.bind([case.factory.new_cache()], batch.lengths)
    logits = case.decoder.forward(batch, kv, lambda name, tensor: seen.update({name: tensor.to_numpy()}))
    tensors = case.model.tensors
    _, exact = judge_logits(case.model.config, tensors, case.ids, True)
    _, rounded = judge_logits(case.model.config, tensors, case.ids, False)
    parts = ["attention_norm", "qkv", "attention", "after_attention", "ffn_norm", "gated", "hidden"]
    names = [f"layers.{index}.{part}" for index in range(3) for part in parts]
    assert list(seen) == ["embedding", *names, "final_norm", "logits"]
    np.testing.assert_array_equal(seen["logits"], logits.to_numpy())
    np.testing.assert_array_equal(seen["embedding"], tensors["model.embed_tokens.weight"][case.ids])
    for index in (0, 1):
        floor = np.abs(rounded[index + 1] - exact[index + 1]).max()
        assert np.abs(seen[f"layers.{index}.hidden"] - exact[index + 1]).max() <= 2 * floor


@pytest.mark.clause("LM-FORWARD-4")
def test_refusals_come_before_any_change(cases: Any) -> None:
    case = cases("gqa")
    cache = case.factory.new_cache()
    cases_ = [
        ([[97]], [0], InvalidParameterError, "token id"),
        ([[5, -1]], [0], InvalidParameterError, "token id"),
        ([[5, 5]], [95], ResourceExhaustedError, "context of 96"),
    ]
    for tokens, starts, error, text in cases_:
        batch = ForwardBatch.build(tokens, starts)
        with pytest.raises(error, match=text):
            case.decoder.check(batch)
        bound = case.factory.bind([cache], batch.lengths)
        before = [np.array(key.to_numpy()) for key in cache.keys]
        with pytest.raises(error, match=text):
            case.decoder.forward(batch, bound)
        for key, old in zip(cache.keys, before, strict=True):
            np.testing.assert_array_equal(key.to_numpy(), old)
        assert cache.num_tokens == 0
    whole = ForwardBatch.build([[5]], [0])
    with pytest.raises(InvalidParameterError, match="logit rows"):
        case.decoder.check(ForwardBatch(whole.token_ids, whole.positions, whole.lengths, np.array([1])))


@pytest.mark.clause("LM-BATCH-1", "LM-BATCH-2")
def test_a_batch_lays_sequences_end_to_end() -> None:
    batch = ForwardBatch.build([[7, 8], [9], [1, 2, 3]], [4, 0, 10], [True, False, True])
    assert batch.token_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert batch.positions.tolist() == [4, 5, 0, 10, 11, 12]
    assert batch.lengths == (2, 1, 3)
    assert batch.logit_rows.tolist() == [1, 5]
    assert batch.with_all_logits().logit_rows.tolist() == [0, 1, 2, 3, 4, 5]
    for tokens, starts in (([], []), ([[]], [0]), ([[1], []], [0, 0]), ([[1]], [-1])):
        with pytest.raises(ModelError, match="ForwardBatch"):
            ForwardBatch.build(tokens, starts)


@pytest.mark.clause("LM-FORWARD-4")
def test_a_backend_without_a_kernel_is_refused_by_name(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases("gqa")
    norm = case.backend.kernel_ops().norm_ops()

    class NoRope(KernelOps):
        def backend_name(self) -> str:
            return "partial"

        def norm_ops(self) -> Any:
            return norm

    monkeypatch.setattr(case.backend, "kernel_ops", NoRope)
    with pytest.raises(UnsupportedError, match="no rotary kernels"):
        Decoder(case.model.config, case.decoder.weights, case.backend)
    monkeypatch.setattr(case.backend, "kernel_ops", lambda: None)
    with pytest.raises(UnsupportedError, match="no norm kernels"):
        Decoder(case.model.config, case.decoder.weights, case.backend)


@pytest.mark.clause("LM-FORWARD-1")
def test_low_precision_weights_stay_near_the_float64_run(cases: Any) -> None:
    """bf16 keeps 8 bits: the error must be larger than float32's and still small beside the logits."""
    from ferrum_ref.types.devices import DataType

    case = cases("gqa")
    decoder = Decoder(case.model.config, read_decoder_weights(case.model, case.backend, DataType.BF16), case.backend)
    shape = KvShape(3, 2, 8, DataType.BF16)
    factory = ContiguousKvFactory(case.backend, shape, 96)
    batch = ForwardBatch.build([case.ids], [0]).with_all_logits()
    logits = decoder.forward(batch, factory.bind([factory.new_cache()], batch.lengths))
    assert logits.dtype() is DataType.BF16
    error = case.error(logits.to_numpy().astype(np.float64))
    assert case.bound < error < 0.1 * np.abs(case.exact).max()
