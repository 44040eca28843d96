"""Drafting and verifying from end to end: the tokens of plain decoding, in fewer forwards of the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError
from ferrum_ref.executor.proposers import DraftModelProposer, NgramProposer, Proposer, Speculated
from ferrum_ref.executor.speculation import token_distribution
from ferrum_ref.executor.speculative_decoder import SpeculativeDecoder
from ferrum_ref.interfaces.model_executor import Proposal
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.sampling import FinishReason, SamplingParams

SIGNIFICANCE = 1e-6
SMALL = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "max_position_embeddings": 48,
}  # fmt: skip


def plain_greedy(loaded: Any, prompt: list[int], num: int) -> list[int]:
    llm, text = loaded.new_llm(), list(prompt)
    logits = llm.prefill("a", prompt)
    while True:
        text.append(int(logits.argmax()))
        if len(text) == len(prompt) + num:
            return text[len(prompt) :]
        logits = llm.decode("a", text[-1], len(text) - 1)


class Guessing(Proposer):
    """Drafts anything at all, and says so."""

    def __init__(self, guesses: Any) -> None:
        self.guesses = guesses

    def propose(self, texts: Any, limits: Any) -> list[Proposal]:
        return [Proposal(tuple(self.guesses(text)[: max(0, limit)])) for text, limit in zip(texts, limits, strict=True)]


@pytest.mark.clause("MX-SPEC-8", "MX-PROPOSE-1")
@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16))
def test_greedy_output_is_plain_greedy_output(load_tiny: Any, seed: int, width: int, num: int, noise: int) -> None:
    """Random tiny Llamas; lookup, another random model as a draft, and a proposer that is sometimes right."""
    loaded, other = load_tiny(seed, **SMALL), load_tiny(seed + 100, **SMALL)
    rng = np.random.default_rng(noise)
    prompt = rng.integers(0, 8, int(rng.integers(1, 12))).tolist()
    right = plain_greedy(loaded, prompt, num)
    whole = prompt + right

    def guesses(text: Speculated) -> list[int]:
        known = len(text.tokens)
        return [token if rng.random() < 0.7 else int(rng.integers(0, 8)) for token in whole[known : known + 9]]

    executor, manager = loaded.new_speculative_executor(12, 4)
    decoders = [
        loaded.new_speculative(ngram=2, num_speculative_tokens=width),
        loaded.new_speculative(draft=other, num_speculative_tokens=width),
        SpeculativeDecoder(executor, Guessing(guesses), num_speculative_tokens=width),
    ]
    for decoder in decoders:
        found = decoder.generate(prompt, num)
        assert found.token_ids == right
        assert found.finish_reason is FinishReason.Length
        assert found.counts.num_generated == num
    assert manager.stats().free_blocks == 12


@pytest.mark.clause("MX-SPEC-8", "MX-OUTPUT-4", "MX-OUTPUT-5", "MX-FORWARD-1")
def test_another_backend_does_all_of_it(load_tiny: Any) -> None:
    """torch: texts of unequal length, drafted and looked up; hidden states, weights and the forward without a cache."""
    from ferrum_ref.interfaces.model_executor import PrefillInput
    from ferrum_ref.plugins import load_backend

    backend = load_backend("torch", "cpu")
    loaded, other = load_tiny(5, **SMALL), load_tiny(5, backend, **SMALL)
    prompts = [[1, 2, 3, 1, 2], [4], [5, 6, 7, 5, 6]]
    right = [plain_greedy(loaded, prompt, 12) for prompt in prompts]
    for options in ({"ngram": 2}, {"draft": load_tiny(6, backend, **SMALL)}, {"draft": other}):
        found = other.new_speculative(max_batch_size=3, **options).generate_batch(prompts, 12)
        assert [text.token_ids for text in found] == right
    outputs = []
    for model in (loaded, other):
        executor, _ = model.new_executor(8, 4)
        ids = model.backend.tensor_factory().from_ids(prompts[0])
        asked = PrefillInput.new(ids).with_hidden_states().with_attention_weights()
        output = executor.prefill_now([asked])[0]
        tensors = [output.logits, *output.hidden_states, *output.attention_weights, executor.forward_now(ids)]
        outputs.append([np.asarray(tensor.to_numpy()) for tensor in tensors])
    for here, there in zip(*outputs, strict=True):
        assert np.abs(here - there).max() <= 400 * 2.0**-24 * max(1.0, np.abs(here).max())


@pytest.mark.clause("MX-SPEC-8", "MX-SPEC-9")
def test_a_perfect_draft_saves_forwards(load_tiny: Any) -> None:
    loaded = load_tiny(3, **SMALL)
    decoder = loaded.new_speculative(draft=loaded, num_speculative_tokens=4)
    counts = decoder.generate([1, 2, 3], 20).counts
    assert (counts.num_rounds, counts.num_drafted, counts.num_accepted) == (4, 16, 16)
    assert (counts.acceptance_rate, counts.tokens_per_round) == (1.0, 5.0)


@pytest.mark.clause("MX-SPEC-8")
def test_penalties_see_accepted_drafts(load_tiny: Any) -> None:
    """Greedy with a strong repetition penalty: each token once as long as there are others."""
    loaded = load_tiny(2, **SMALL)
    params = SamplingParams(temperature=0.0, repetition_penalty=50.0)
    llm, text = loaded.new_llm(), [1, 2]
    logits = llm.prefill("a", text)
    for _ in range(12):
        row = logits.astype(float)
        for token in set(text):
            row[token] = row[token] / 50 if row[token] > 0 else row[token] * 50
        text.append(int(row.argmax()))
        logits = llm.decode("a", text[-1], len(text) - 1)
    assert text[2:] != plain_greedy(loaded, [1, 2], 12)
    for options in ({"ngram": 1}, {"draft": loaded}):
        assert loaded.new_speculative(params, **options).generate([1, 2], 12).token_ids == text[2:]


class Exact:
    """Distribution of the first tokens after a prompt, from one cacheless forward for every continuation."""

    def __init__(self, loaded: Any, prompt: list[int], temperature: float = 1.0) -> None:
        vocab = loaded.info.vocab_size
        factory = loaded.backend.tensor_factory()
        rows = [[*prompt, a, b] for a in range(vocab) for b in range(vocab)]
        executor, _ = loaded.new_executor(1)
        logits = executor.forward_now(factory.from_numpy(np.array(rows, dtype=np.uint32))).to_numpy()
        law = token_distribution(logits[:, len(prompt) - 1 :], temperature).reshape(vocab, vocab, 3, vocab)
        first, second, third = law[0, 0, 0], law[:, 0, 1], law[:, :, 2]
        self.joint = first[:, None, None] * second[:, :, None] * third

    def p_value(self, found: list[list[int]]) -> float:
        """Chi-square of the triples; cells expected fewer than five times are put together."""
        counts = np.zeros_like(self.joint)
        np.add.at(counts, tuple(np.array(found).T), 1)
        expected = self.joint.ravel() * counts.sum()
        small = expected < 5
        observed = np.append(counts.ravel()[~small], counts.ravel()[small].sum())
        merged = np.append(expected[~small], expected[small].sum())
        return float(stats.chisquare(observed, merged * observed.sum() / merged.sum()).pvalue)


def triples(loaded: Any, proposer: Proposer, seed: int, num: int, params: dict[str, Any] | None = None) -> Any:
    """The first three tokens of `num` texts after one prompt."""
    executor, manager = loaded.new_speculative_executor(num * 3, 4, max_batch_size=num)
    sampling = SamplingParams(temperature=1.0, seed=seed, **(params or {}))
    decoder = SpeculativeDecoder(executor, proposer, sampling, num_speculative_tokens=2)
    found = decoder.generate_batch([[1, 2, 3]] * num, 3)
    assert manager.stats().free_blocks == num * 3
    return [text.token_ids for text in found], found


def proposers(other: Any, num: int) -> dict[str, Proposer]:
    def model() -> Any:
        return other.new_executor(num * 3, 4)[0]

    return {
        "drawn": DraftModelProposer(model(), 1.0),
        "drawn warmer": DraftModelProposer(model(), 3.0),
        "argmax": DraftModelProposer(model()),
        "guess": Guessing(lambda text: [(text.tokens[-1] + 1) % 8, 4]),
        "lookup": NgramProposer(2),
        "wrong": DraftModelProposer(model(), 1.0, parity_mode=ParityMode.UPSTREAM),
    }


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4", "MX-SPEC-8", "MX-PROPOSE-5")
def test_ten_thousand_sampled_tokens_are_the_targets(load_tiny: Any) -> None:
    """3,400 texts of three tokens, 512 cells of their joint distribution; drafts by argmax told as drawn fail."""
    loaded, other, num = load_tiny(21, **SMALL), load_tiny(22, **SMALL), 3400
    exact = Exact(loaded, [1, 2, 3])
    assert exact.joint.sum() == pytest.approx(1.0)
    chosen = proposers(other, num)
    for name, size in (("drawn", num), ("wrong", num // 2)):
        found, runs = triples(loaded, chosen[name], 5, size)
        rate = np.mean([run.counts.acceptance_rate for run in runs])
        assert 0.05 < rate < 0.95, "the test would see nothing"
        assert (exact.p_value(found) > SIGNIFICANCE) == (name != "wrong")


@pytest.mark.slow
@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4", "MX-SPEC-8", "MX-PROPOSE-5")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("models", [(21, 22), (31, 32), (41, 42)])
def test_every_proposer_keeps_the_targets_distribution(load_tiny: Any, seed: int, models: tuple[int, int]) -> None:
    """10,000 texts each, 30,000 tokens."""
    num = 10_000
    loaded, other = (load_tiny(model, **SMALL) for model in models)
    exact = Exact(loaded, [1, 2, 3])
    for name, proposer in proposers(other, num).items():
        found, _ = triples(loaded, proposer, seed, num)
        assert (exact.p_value(found) > SIGNIFICANCE) == (name != "wrong"), name


@pytest.mark.clause("MX-SPEC-9")
def test_a_text_does_not_depend_on_its_company_and_a_stream_is_the_same(load_tiny: Any) -> None:
    loaded, other = load_tiny(21, **SMALL), load_tiny(22, **SMALL)
    params = SamplingParams(temperature=1.0, seed=9)
    prompts = [[1, 2, 3], [4], [5, 6] * 6, [7, 7]]
    decoder = loaded.new_speculative(params, draft=other, max_batch_size=4)
    together = [text.token_ids for text in decoder.generate_batch(prompts, 15)]
    assert [text.token_ids for text in decoder.generate_batch(prompts, 15)] == together
    assert [text.token_ids for text in decoder.generate_batch(prompts[:2], 15)] == together[:2]
    assert list(decoder.stream(prompts[0], 15)) == together[0] == decoder.generate(prompts[0], 15).token_ids
    unseeded = loaded.new_speculative(SamplingParams(temperature=1.0), ngram=2)
    assert len({tuple(unseeded.generate([1], 20).token_ids) for _ in range(5)}) > 1


@pytest.mark.clause("MX-SPEC-9")
def test_where_a_text_ends(load_tiny: Any) -> None:
    loaded = load_tiny(3, **SMALL)
    right = plain_greedy(loaded, [1, 2, 3], 45)
    decoder = loaded.new_speculative(draft=loaded, num_speculative_tokens=5)
    stop = right[7]
    found = decoder.generate([1, 2, 3], 40, {stop})
    assert found.token_ids == right[: right.index(stop) + 1]
    assert found.finish_reason is FinishReason.EOS
    full = decoder.generate([1, 2, 3], 1000)
    assert full.token_ids == right  # 48 positions
    assert full.finish_reason is FinishReason.Length
    last = decoder.generate([1, 2, 3], right.index(stop) + 1, {stop})
    assert last.finish_reason is FinishReason.EOS  # a stop id that is also the last allowed token
    assert decoder.generate([1] * 47, 5).token_ids == plain_greedy(loaded, [1] * 47, 1)
    defaults = loaded.new_speculative(SamplingParams(temperature=0.0, max_tokens=6), ngram=2)
    assert defaults.generate([1, 2, 3]).token_ids == right[:6]


@pytest.mark.clause("MX-SPEC-10", "MX-SPEC-9")
def test_every_cache_comes_back(load_tiny: Any) -> None:
    loaded, other = load_tiny(21, **SMALL), load_tiny(22, **SMALL)
    target, manager = loaded.new_speculative_executor(12, 4)
    model, drafts = other.new_executor(12, 4)
    decoder = SpeculativeDecoder(target, DraftModelProposer(model), num_speculative_tokens=2)

    def nothing_lent() -> bool:
        return manager.stats().free_blocks == drafts.stats().free_blocks == 12

    assert len(decoder.generate([1, 2, 3], 10).token_ids) == 10
    assert nothing_lent()
    stream = decoder.stream([1, 2, 3], 10)
    next(stream)
    assert not nothing_lent()
    stream.close()
    assert nothing_lent()
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: decoder.generate([], 5), ModelError, "empty"),
        (lambda: decoder.generate([1], 0), InvalidParameterError, "max_new_tokens"),
        (lambda: decoder.generate([1] * 48, 5), ResourceExhaustedError, "leaves no room"),
        (lambda: decoder.generate([1, 8], 5), InvalidParameterError, "token id"),
        (lambda: decoder.generate_batch([[1], [2, 9, 1]], 5), InvalidParameterError, "token id"),
        (lambda: decoder.generate_batch([[1] * 30, [2] * 30], 5), ResourceExhaustedError, "blocks"),
        (lambda: list(decoder.stream([], 5)), ModelError, "empty"),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()
        assert nothing_lent()
    with pytest.raises(InvalidParameterError, match="num_speculative_tokens"):
        SpeculativeDecoder(target, NgramProposer(), num_speculative_tokens=0)


@pytest.mark.clause("MX-SPEC-10")
def test_two_vocabularies_are_one_too_many(load_tiny: Any) -> None:
    loaded, other = load_tiny(21, **SMALL), load_tiny(22, **{**SMALL, "vocab_size": 7})
    decoder = SpeculativeDecoder(
        loaded.new_speculative_executor(12, 4)[0],
        DraftModelProposer(other.new_executor(12, 4)[0], 1.0),
        SamplingParams(temperature=1.0, seed=1),
    )
    with pytest.raises(ModelError, match="vocabulary has 7 tokens, the target's 8"):
        decoder.generate([1, 2], 20)


@pytest.mark.model
@pytest.mark.clause("MX-SPEC-8", "MX-ASSEMBLY-2")
def test_the_real_model_says_the_same_in_fewer_forwards(smollm2_path: Path, load_tiny: Any) -> None:
    """SmolLM2, greedy, a prompt that repeats itself: lookup, and a tiny random draft of its vocabulary."""
    from ferrum_ref.assembly import load_model

    loaded = load_model(smollm2_path, max_tokens=256)
    prompt = [int(token) for token in loaded.tokenizer.encode("a b c d e f g\n" * 8, False)]
    right = plain_greedy(loaded, prompt, 24)
    found = loaded.new_speculative(ngram=3).generate(prompt, 24)
    assert found.token_ids == right
    assert found.counts.tokens_per_round > 1.3
    draft = load_tiny(1, **{**SMALL, "vocab_size": loaded.info.vocab_size, "max_position_embeddings": 256})
    assert loaded.new_speculative(draft=draft, num_speculative_tokens=2).generate(prompt, 8).token_ids == right[:8]
