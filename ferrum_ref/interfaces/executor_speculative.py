"""Speculative decoding: drafted tokens, how they are judged, and what comes out.

Upstream: `ferrum_interfaces::model_executor`; `Proposal` and `SpeculativeSampling` are extensions, because upstream's
call carries neither the proposal's probabilities nor a source of random numbers (D-24).
Clauses: MX-SPEC-1..9 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.parity_mode import ParityMode

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_cache import KvCacheHandle
    from ferrum_ref.interfaces.tensor import TensorRef

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens and the distributions they were really drawn from.  [MX-SPEC-3; D-24]

    probabilities `[K, V]`, row i that of token i; None where the tokens were not drawn at all (argmax, lookup): each is
    then a point mass. Raises ModelError for another shape, or a token to which its own row gives no probability.
    """

    tokens: Sequence[int]
    probabilities: Floats | None = None

    def __post_init__(self) -> None:
        rows = self.probabilities
        if rows is None:
            return
        if rows.ndim != 2 or len(rows) != len(self.tokens):
            raise ModelError(
                f"Proposal: {len(self.tokens)} tokens need probabilities [{len(self.tokens)}, V], got {rows.shape}"
            )
        for index, token in enumerate(self.tokens):
            if not 0 <= token < rows.shape[1] or not rows[index, token] > 0:
                raise ModelError(
                    f"Proposal: token {token} at {index} cannot have come from its distribution, which gives it no"
                    " probability; leave probabilities out for tokens that were not drawn"
                )


@dataclass(frozen=True, slots=True)
class SpeculativeSampling:
    """Judge by sampling instead of greedily.  [MX-SPEC-3..5]

    target: softmax(logits / temperature) in float64. proposal_probabilities `[K, V]` belong to the drafts, None: point
    masses. `uniforms` (K + 1,) in [0, 1): number i decides on draft i, the last draws the replacement or bonus token.
    """

    temperature: float
    uniforms: Sequence[float]
    proposal_probabilities: Floats | None = None
    parity_mode: ParityMode = ParityMode.REFERENCE


@dataclass(frozen=True, slots=True)
class SpeculativeDecodeOutput:
    """What verification gives.  [MX-SPEC-6; D-24]

    accepted_tokens: the accepted prefix of the drafts, without replacement or bonus token; next_logits `[1, V]` after
    the last accepted token; kv_cache is cut behind it; acceptance_count = len(accepted_tokens). `next_token` (an
    extension): the replacement after a rejection, else the bonus token; it is not in the cache yet.
    """

    accepted_tokens: list[TokenId]
    next_logits: TensorRef
    kv_cache: KvCacheHandle
    acceptance_count: int
    next_token: TokenId | None = None
