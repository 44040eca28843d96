"""`SpeculativeExecutor`: drafts verified in one forward, rejected ones rolled back.

Clauses: MX-SPEC-1..6 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferrum_ref.errors import InvalidParameterError, ModelError, UnsupportedError
from ferrum_ref.executor.advance import Append, Logits
from ferrum_ref.executor.exclusive import exclusive
from ferrum_ref.executor.paged import PagedModelExecutor
from ferrum_ref.executor.requests import verify_chain
from ferrum_ref.executor.speculation import (
    Ints,
    greedy_prefix,
    judge_drafts,
    pick,
    token_distribution,
    typical_prefix,
)
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
    Proposal,
    SpeculativeDecodeOutput,
    SpeculativeExecutor,
    SpeculativeSampling,
)
from ferrum_ref.types.ids import TokenId


class PagedSpeculativeExecutor(PagedModelExecutor, SpeculativeExecutor):
    """`PagedModelExecutor` that verifies drafts. Needs a lender that takes tokens back.  [MX-SPEC-1..6]"""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """As `PagedModelExecutor`.  Raises UnsupportedError unless the lender has `truncate_now`."""
        super().__init__(*args, **keywords)
        if not self.can_truncate():
            raise UnsupportedError(
                "PagedSpeculativeExecutor: rejected drafts must leave the cache; give a manager with truncate_now"
            )

    async def speculative_decode(
        self,
        input: DecodeInput,
        draft_tokens: Sequence[TokenId],
        acceptance_threshold: float,
        *,
        sampling: SpeculativeSampling | None = None,
    ) -> SpeculativeDecodeOutput:
        return self.speculate_now(input, draft_tokens, acceptance_threshold, sampling)

    @exclusive
    def speculate_now(
        self,
        input: DecodeInput,
        draft_tokens: Sequence[TokenId],
        acceptance_threshold: float,
        sampling: SpeculativeSampling | None = None,
    ) -> SpeculativeDecodeOutput:
        """Verify drafts after `input`'s token.  [MX-SPEC-1..6]

        Mutates storage and handle; when it raises, what was cached is what is cached.
        Raises InvalidParameterError (threshold, temperature, uniforms), ModelError (a proposal that cannot be), and as
        `decode`.
        """
        drafts = np.array([int(token) for token in draft_tokens], dtype=np.int64)
        _check(acceptance_threshold, drafts, sampling)
        handle, tokens, positions = verify_chain([input])
        start = self._start("speculative_decode", handle, positions, 1)
        with self.counters.timed(0, 1, 1 + len(drafts)):
            item = Append(handle, [*tokens, *drafts.tolist()], start, "all")
            (logits,) = self._forwarder.advance("speculative_decode", [item]).logits
            try:
                num_accepted, next_token = _judge(logits, drafts, acceptance_threshold, sampling)
            except BaseException:
                self._ledger.truncate(handle, start)
                raise
            self._ledger.truncate(handle, start + 1 + num_accepted)
        return SpeculativeDecodeOutput(
            accepted_tokens=[TokenId(int(token)) for token in drafts[:num_accepted]],
            next_logits=self._factory.from_numpy(logits[num_accepted : num_accepted + 1]),
            kv_cache=handle,
            acceptance_count=num_accepted,
            next_token=TokenId(next_token),
        )


def _check(threshold: float, drafts: Ints, sampling: SpeculativeSampling | None) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise InvalidParameterError(
            f"speculative_decode: acceptance_threshold is {threshold}, expected 0 (lossless) or a probability up to 1"
        )
    if sampling is None:
        return
    Proposal(drafts.tolist(), sampling.proposal_probabilities)
    uniforms = np.asarray(sampling.uniforms, dtype=np.float64)
    if uniforms.shape != (len(drafts) + 1,) or not ((uniforms >= 0) & (uniforms < 1)).all():
        raise InvalidParameterError(
            f"speculative_decode: {len(drafts)} drafts need {len(drafts) + 1} uniforms in [0, 1),"
            f" got {uniforms.tolist()}"
        )
    if not 0 <= sampling.temperature < np.inf:
        raise InvalidParameterError(
            f"speculative_decode: temperature is {sampling.temperature}, expected a number >= 0"
        )


def _judge(logits: Logits, drafts: Ints, threshold: float, sampling: SpeculativeSampling | None) -> tuple[int, int]:
    """(drafts accepted, the token after them). Pure."""
    if threshold > 0.0:
        target = token_distribution(logits, 1.0 if sampling is None else sampling.temperature)
        num_accepted = typical_prefix(target, drafts, threshold)
        if sampling is None:
            return num_accepted, int(logits[num_accepted].argmax())
        last = np.asarray(sampling.uniforms[-1], dtype=np.float64)
        return num_accepted, int(pick(target[num_accepted], last, sampling.parity_mode))
    if sampling is None:
        num_accepted = greedy_prefix(logits, drafts)
        return num_accepted, int(logits[num_accepted].argmax())
    target = token_distribution(logits, sampling.temperature)
    draft = sampling.proposal_probabilities
    if draft is not None and len(drafts) and draft.shape[1] != target.shape[1]:
        raise ModelError(
            f"speculative_decode: the proposal's vocabulary has {draft.shape[1]} tokens, the model's {target.shape[1]};"
            " both must share one"
        )
    verdict = judge_drafts(
        target[None],
        drafts[None],
        None if draft is None else np.asarray(draft, dtype=np.float64).reshape((1, len(drafts), -1)),
        np.asarray(sampling.uniforms, dtype=np.float64)[None],
        sampling.parity_mode,
    )
    return int(verdict.num_accepted[0]), int(verdict.next_token[0])
