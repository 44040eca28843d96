"""`speculative_decode` over a real decoder: what is accepted, what stays cached, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.executor.speculative import PagedSpeculativeExecutor
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
    PrefillInput,
    SpeculativeExecutor,
    SpeculativeSampling,
)
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.types.ids import TokenId


class Text:
    """A prompt in a cache, the token after it, and what greedy decoding makes of it."""

    def __init__(self, judge7: Any, run: Any, tensor: Any) -> None:
        self.executor, self.manager = judge7.loaded.new_speculative_executor(60, 4)
        self.prompt = judge7.ids[:9]
        self.run, self.tensor, self.judge = run, tensor, judge7
        self.handle = run(self.executor.prefill(PrefillInput.new(tensor(self.prompt[:-1])))).kv_cache
        self.greedy: list[int] = []
        for _ in range(8):
            self.greedy.append(int(judge7.exact(tuple(self.prompt + self.greedy))[-1].argmax()))

    def decode(self, drafts: list[int], threshold: float = 0.0, **options: Any) -> Any:
        step = DecodeInput.new(self.tensor([self.prompt[-1]]), self.handle)
        ids = [TokenId(token) for token in drafts]
        return self.run(self.executor.speculative_decode(step, ids, threshold, **options))

    def law(self, drafts: list[int]) -> Any:
        """softmax of the exact logits after the prompt and each draft."""
        logits = self.judge.exact(tuple(self.prompt + drafts))[len(self.prompt) - 1 :]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture
def text(judge7: Any, run: Any, tensor: Any) -> Text:
    return Text(judge7, run, tensor)


@pytest.mark.clause("MX-SPEC-1", "MX-SPEC-6", "MX-TRUNCATE-2")
@pytest.mark.parametrize("num_right", range(6))
def test_the_longest_greedy_prefix_is_accepted(text: Text, num_right: int) -> None:
    drafts = text.greedy[:5]
    if num_right < 5:
        drafts[num_right] = (drafts[num_right] + 1) % 97
    output = text.decode(drafts)
    assert output.accepted_tokens == [TokenId(token) for token in text.greedy[:num_right]]
    assert output.acceptance_count == num_right
    assert output.next_token == TokenId(text.greedy[num_right])
    assert output.next_logits.shape() == (1, 97)
    stands = text.prompt + text.greedy[:num_right]
    assert text.judge.right(output.next_logits.to_numpy(), stands)
    assert output.kv_cache is text.handle
    assert text.handle.num_tokens() == len(stands)
    assert text.handle.block_table().num_blocks() == -(-len(stands) // 4)
    step = text.run(text.executor.decode(DecodeInput.new(text.tensor([5]), text.handle)))
    assert text.judge.right(step.logits.to_numpy(), [*stands, 5])


@pytest.mark.clause("MX-SPEC-1", "MX-SPEC-6")
def test_no_draft_is_a_plain_decode(text: Text) -> None:
    output = text.decode([])
    assert isinstance(text.executor, SpeculativeExecutor)
    assert (output.accepted_tokens, output.acceptance_count) == ([], 0)
    assert text.judge.right(output.next_logits.to_numpy(), text.prompt)
    assert text.handle.num_tokens() == 9


@pytest.mark.clause("MX-SPEC-2")
def test_typical_acceptance_goes_by_the_targets_probability(text: Text) -> None:
    drafts = [text.greedy[0], (text.greedy[1] + 1) % 97, 3]
    law = text.law(drafts)
    probabilities = [law[at, token] for at, token in enumerate(drafts)]
    for threshold, accepted in ((probabilities[1] * 0.99, 2), (probabilities[1] * 1.01, 1), (1.0, 0)):
        if accepted == 2 and probabilities[2] >= threshold:
            accepted = 3
        output = text.decode(drafts, float(threshold))
        assert output.acceptance_count == accepted
        assert int(output.next_token) == law[accepted].argmax()
        text.run(text.executor.truncate_kv(text.handle, 8))
    sampling = SpeculativeSampling(1.0, [0.0, 0.0, 0.0, 0.999999])
    output = text.decode(drafts, 1.0, sampling=sampling)  # the token after it is drawn from the target
    assert int(output.next_token) == int((law[0].cumsum() > 0.999999).argmax())


@pytest.mark.clause("MX-SPEC-3", "MX-SPEC-4", "MX-SPEC-6")
@pytest.mark.parametrize("is_drawn", [False, True])
def test_sampling_accepts_with_the_ratio(text: Text, is_drawn: bool) -> None:
    """u just below and just above p/q of the second draft; the replacement by its running sum."""
    drafts = [*text.greedy[:2], int(text.law(text.greedy[:2])[2].argmin())]
    law = text.law(drafts)
    q = np.full((3, 97), 1 / 97) if is_drawn else None
    if q is not None:  # the draft model is surer of its second token than the target
        q[1] = (1 - law[1, drafts[1]]) / 2 / 96
        q[1, drafts[1]] = (1 + law[1, drafts[1]]) / 2
    ratio = law[1, drafts[1]] / (q[1, drafts[1]] if q is not None else 1.0)
    for u, accepted in ((ratio * 0.999, 2), (ratio * 1.001, 1)):
        sampling = SpeculativeSampling(1.0, [0.0, u, 0.9999999, 0.25], q)
        output = text.decode(drafts, sampling=sampling)
        assert output.acceptance_count == accepted
        assert text.handle.num_tokens() == 9 + accepted
        rest = law[accepted] - (q[accepted] if q is not None else np.eye(97)[drafts[accepted]])
        rest = np.maximum(rest, 0)
        assert int(output.next_token) == int((rest.cumsum() > 0.25 * rest.sum()).argmax())
        text.run(text.executor.truncate_kv(text.handle, 8))


@pytest.mark.clause("MX-SPEC-2", "MX-SPEC-5", "MX-SPEC-6")
def test_what_is_refused_changes_nothing(text: Text) -> None:
    bad_law = np.full((1, 97), 1 / 96)
    bad_law[0, 3] = 0.0
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: text.decode([3], -0.1), InvalidParameterError, "acceptance_threshold"),
        (lambda: text.decode([3], 1.1), InvalidParameterError, "acceptance_threshold"),
        (lambda: text.decode([3], float("nan")), InvalidParameterError, "acceptance_threshold"),
        (lambda: text.decode([97]), InvalidParameterError, "token id"),
        (lambda: text.decode([3] * 90), ResourceExhaustedError, "context"),
        (lambda: text.decode([3], sampling=SpeculativeSampling(1.0, [0.5])), InvalidParameterError, "2 uniforms"),
        (lambda: text.decode([3], sampling=SpeculativeSampling(1.0, [0.5, 1.0])), InvalidParameterError, "uniforms"),
        (
            lambda: text.decode([3], sampling=SpeculativeSampling(-1.0, [0.5, 0.5])),
            InvalidParameterError,
            "temperature",
        ),
        (lambda: text.decode([3], sampling=SpeculativeSampling(1.0, [0.5, 0.5], bad_law)), ModelError, "Proposal"),
        (
            lambda: text.decode([3], sampling=SpeculativeSampling(1.0, [0.5, 0.5], np.full((1, 96), 1 / 96))),
            ModelError,
            "vocabulary has 96 tokens, the model's 97",
        ),
    ]
    blocks = text.manager.stats().free_blocks
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()
        assert (text.handle.num_tokens(), text.manager.stats().free_blocks) == (8, blocks)
    assert text.decode(text.greedy[:2]).acceptance_count == 2
    text.executor.release_cache(text.handle.cache_id())
    with pytest.raises(NotFoundError):
        text.decode([1])


@pytest.mark.clause("MX-SPEC-6")
def test_logits_that_cannot_be_judged_leave_the_cache(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = text.judge.loaded.decoder

    class Broken:
        max_tokens = 96
        check = decoder.check

        def forward(self, *arguments: Any) -> Any:
            return text.tensor(np.full((3, 97), np.nan), np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(text.executor._forwarder, "_decoder", Broken())
        with pytest.raises(BackendError, match="NaN"):
            text.decode([1, 2])
    assert text.handle.num_tokens() == 8
    assert text.decode(text.greedy[:2]).acceptance_count == 2


@pytest.mark.clause("MX-TRUNCATE-4")
def test_a_manager_that_takes_nothing_back_is_no_ground_for_speculation(judge7: Any) -> None:
    base, _ = judge7.loaded.new_executor(8, 4)
    manager = PagedKvCacheManager(8, 4, storage=base._storage)
    with pytest.raises(UnsupportedError, match="truncate_now"):
        PagedSpeculativeExecutor(
            judge7.loaded.decoder, base._storage, base._factory, base.info(), base.capabilities(), lender=manager
        )
