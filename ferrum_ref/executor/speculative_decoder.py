"""Generation by drafting and verifying, over any model: the tokens are those of plain decoding, in fewer forwards.

Clauses: MX-SPEC-8..9, MX-SPEC-10 (specs/model_executor.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError
from ferrum_ref.executor.proposers import CachedModel, Logits, Proposer, Speculated
from ferrum_ref.executor.speculation import judge_drafts
from ferrum_ref.executor.token_law import TokenLaw
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.model_executor import Proposal
from ferrum_ref.interfaces.sampler import Order
from ferrum_ref.types.parity_mode import ParityMode
from ferrum_ref.types.sampling import FinishReason, SamplingParams

PREFILL_CHUNK_TOKENS = 512


@dataclass(slots=True)
class SpeculationCounts:
    """How well drafting went. A round is one forward of the target for one text."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_generated: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 without drafts."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Generated tokens a forward of the target; 1 in plain decoding."""
        return self.num_generated / self.num_rounds if self.num_rounds else 0.0


@dataclass(frozen=True, slots=True)
class SpeculativeText:
    """What was generated, a stop token included, and why it ended."""

    token_ids: list[int]
    finish_reason: FinishReason
    counts: SpeculationCounts


@dataclass(slots=True)
class _Running(Speculated):
    """A text being generated. Its cache holds every token but the last."""

    handle: KvCacheHandle
    limit: int
    counts: SpeculationCounts
    ended: FinishReason | None = None

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class SpeculativeDecoder:
    """Drafts with `proposer`, verifies with `target`; several texts share each forward.  [MX-SPEC-8..10]"""

    def __init__(
        self,
        target: CachedModel,
        proposer: Proposer,
        sampling: SamplingParams | None = None,
        *,
        num_speculative_tokens: int = 4,
        order: Order = "temperature_last",
        parity_mode: ParityMode = ParityMode.REFERENCE,
    ) -> None:
        """sampling None is greedy; `max_tokens` and `seed` are read from it where `generate` is not told otherwise.

        Raises InvalidParameterError (num_speculative_tokens < 1), and as `SamplingConfig.from_params`.
        """
        if num_speculative_tokens < 1:
            raise InvalidParameterError(
                f"SpeculativeDecoder: num_speculative_tokens must be >= 1, got {num_speculative_tokens}"
            )
        self._target = target
        self._proposer = proposer
        self._params = sampling if sampling is not None else SamplingParams(temperature=0.0)
        self._law = TokenLaw(self._params, order)
        self._num_drafts = num_speculative_tokens
        self._parity_mode = parity_mode
        self._num_texts = 0

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int | None = None, stop_token_ids: Collection[int] = ()
    ) -> SpeculativeText:
        """One text.  Raises as `generate_batch`."""
        return self.generate_batch([prompt], max_new_tokens, stop_token_ids)[0]

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = None, stop_token_ids: Collection[int] = ()
    ) -> list[SpeculativeText]:
        """All texts side by side; each comes out as if it were alone.  [MX-SPEC-9]

        Ends a text at a stop token, which is included, after max_new_tokens, or at the end of the context.
        Raises ModelError (empty prompt), InvalidParameterError (token id, max_new_tokens), ResourceExhaustedError
        (context or blocks); every cache is released then, as it is at the end.
        """
        seeds = np.random.SeedSequence(self._params.seed).spawn(len(prompts))
        running: list[_Running] = []
        try:
            for prompt, seed in zip(prompts, seeds, strict=True):
                running.append(self._open(prompt, max_new_tokens, seed))
            self._prefill(running)
            while active := [text for text in running if text.ended is None]:
                self._round(active, stop_token_ids)
            return [SpeculativeText(text.generated, text.ended or FinishReason.Length, text.counts) for text in running]
        finally:
            self._close(running)

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int | None = None, stop_token_ids: Collection[int] = ()
    ) -> Iterator[int]:
        """The tokens of `generate` as they are accepted.  Raises as `generate_batch`.  [MX-SPEC-9]"""
        (seed,) = np.random.SeedSequence(self._params.seed).spawn(1)
        running: list[_Running] = []
        try:
            running.append(self._open(prompt, max_new_tokens, seed))
            self._prefill(running)
            (text,) = running
            while text.ended is None:
                num_before = len(text.tokens)
                self._round(running, stop_token_ids)
                yield from text.tokens[num_before:]
        finally:
            self._close(running)

    def _open(self, prompt: Sequence[int], max_new_tokens: int | None, seed: np.random.SeedSequence) -> _Running:
        limit = self._params.max_tokens if max_new_tokens is None else max_new_tokens
        room = self._target.max_tokens - len(prompt)
        if not prompt:
            raise ModelError("SpeculativeDecoder: the prompt is empty; give at least one token")
        if limit < 1:
            raise InvalidParameterError(f"SpeculativeDecoder: max_new_tokens must be >= 1, got {limit}")
        if room < 1:
            raise ResourceExhaustedError(
                f"SpeculativeDecoder: a prompt of {len(prompt)} tokens leaves no room in a context of"
                f" {self._target.max_tokens}; shorten it"
            )
        self._num_texts += 1
        return _Running(
            key=self._num_texts,
            tokens=[int(token) for token in prompt],
            num_prompt=len(prompt),
            random=np.random.Generator(np.random.PCG64(seed)),
            handle=self._target.new_cache_now(),
            limit=min(limit, room),
            counts=SpeculationCounts(),
        )

    def _prefill(self, texts: Sequence[_Running]) -> None:
        """Everything but the last token of each prompt."""
        longest = max((text.num_prompt for text in texts), default=0)
        for start in range(0, longest - 1, PREFILL_CHUNK_TOKENS):
            parts = [(t.handle, t.tokens[: t.num_prompt - 1][start : start + PREFILL_CHUNK_TOKENS]) for t in texts]
            due = [(handle, tokens) for handle, tokens in parts if tokens]
            self._target.append_now([handle for handle, _ in due], [tokens for _, tokens in due], "none")

    def _round(self, texts: Sequence[_Running], stop_token_ids: Collection[int]) -> None:
        """Draft, verify in one forward, roll back, go on: at least one token for each text."""
        rooms = [min(self._num_drafts, t.limit - (len(t.tokens) - t.num_prompt) - 1) for t in texts]
        proposals = self._proposer.propose(texts, rooms)
        feeds = [[text.tokens[-1], *proposal.tokens] for text, proposal in zip(texts, proposals, strict=True)]
        logits = self._target.append_now([text.handle for text in texts], feeds)
        for text, proposal, emitted in zip(texts, proposals, self._judge(texts, proposals, logits), strict=True):
            num_accepted = len(emitted) - 1
            if num_accepted < len(proposal.tokens):
                self._target.truncate_now(text.handle, len(text.tokens) + num_accepted)
            text.counts.num_rounds += 1
            text.counts.num_drafted += len(proposal.tokens)
            text.counts.num_accepted += num_accepted
            _extend(text, emitted, stop_token_ids)

    def _judge(
        self, texts: Sequence[_Running], proposals: Sequence[Proposal], logits: Sequence[Logits]
    ) -> list[list[int]]:
        """Accepted drafts and the token after them, per text. Texts with alike proposals are judged together."""
        groups: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, proposal in enumerate(proposals):
            groups[len(proposal.tokens), proposal.probabilities is not None].append(i)
        emitted: list[list[int]] = [[] for _ in texts]
        for (width, is_drawn), members in groups.items():
            drafts = np.array([list(proposals[i].tokens) for i in members], dtype=np.int64).reshape(len(members), width)
            told = [proposals[i].probabilities for i in members]
            uniforms = np.stack([texts[i].random.random(width + 1) for i in members])
            draft = np.stack([rows for rows in told if rows is not None]) if is_drawn else None
            target = self._laws([texts[i] for i in members], drafts, [logits[i] for i in members])
            if draft is not None and draft.shape[-1] != target.shape[-1]:
                raise ModelError(
                    f"SpeculativeDecoder: the draft's vocabulary has {draft.shape[-1]} tokens, the target's"
                    f" {target.shape[-1]}; both models must share one"
                )
            verdict = judge_drafts(target, drafts, draft, uniforms, self._parity_mode)
            for i, row, num, token in zip(members, drafts, verdict.num_accepted, verdict.next_token, strict=True):
                emitted[i] = [*row[:num].tolist(), int(token)]
        return emitted

    def _laws(
        self, texts: Sequence[_Running], drafts: np.ndarray[tuple[int, ...], np.dtype[np.int64]], logits: list[Logits]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """The target's distributions `[N, K+1, V]`."""
        if self._law.is_plain:
            return self._law.rows(np.stack(logits), (), ())
        return np.stack(
            [
                self._law.rows(rows, text.tokens[: text.num_prompt], [*text.generated, *row.tolist()])
                for text, row, rows in zip(texts, drafts, logits, strict=True)
            ]
        )

    def _close(self, texts: Sequence[_Running]) -> None:
        for text in texts:
            self._proposer.forget(text.key)
            self._target.release_cache(text.handle.cache_id())


def _extend(text: _Running, emitted: Sequence[int], stop_token_ids: Collection[int]) -> None:
    """Append tokens up to a stop token or the limit. Mutates the text."""
    for token in emitted:
        text.tokens.append(token)
        text.counts.num_generated += 1
        if token in stop_token_ids:
            text.ended = FinishReason.EOS
            return
        if len(text.tokens) - text.num_prompt >= text.limit:
            text.ended = FinishReason.Length
            return
