"""One forward of a decoder: the new tokens of several sequences laid end to end, and what runs them.

Clauses: LM-BATCH-1..2, LM-FORWARD-1..5 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_storage import KvBatch
    from ferrum_ref.interfaces.tensor import TensorRef

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A ragged batch of N rows: sequence i owns the next lengths[i] of them.  [LM-BATCH-1]

    token_ids `[N]`; positions `[N]`, absolute; logit_rows `[R]`: the rows whose logits are wanted, in that order.
    """

    token_ids: Ints
    positions: Ints
    lengths: tuple[int, ...]
    logit_rows: Ints

    @classmethod
    def build(
        cls, tokens: Sequence[Sequence[int]], starts: Sequence[int], wants_logits: Sequence[bool] | None = None
    ) -> Self:
        """Sequence i's tokens run at positions starts[i], starts[i] + 1, ...  [LM-BATCH-1]

        Logits of its last row where wants_logits[i] (default: everywhere). Pure.
        Raises ModelError for no sequence, an empty one, or a negative start.
        """
        lengths = tuple(len(ids) for ids in tokens)
        if not lengths or 0 in lengths:
            raise ModelError(f"ForwardBatch: every sequence needs at least one token, got lengths {list(lengths)}")
        if min(starts) < 0:
            raise ModelError(f"ForwardBatch: positions start at 0 or later, got {list(starts)}")
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in tokens])
        positions = np.concatenate(
            [np.arange(start, start + n, dtype=np.int64) for start, n in zip(starts, lengths, strict=True)]
        )
        last_rows = np.cumsum(lengths, dtype=np.int64) - 1
        if wants_logits is not None:
            last_rows = last_rows[np.asarray(wants_logits, dtype=bool)]
        return cls(ids, positions, lengths, last_rows)

    def with_all_logits(self) -> ForwardBatch:
        """The same batch, wanting the logits of every row. Pure.  [LM-BATCH-2]"""
        rows = np.arange(self.num_tokens, dtype=np.int64)
        return ForwardBatch(self.token_ids, self.positions, self.lengths, rows)

    @property
    def num_tokens(self) -> int:
        """N: rows of the forward."""
        return len(self.token_ids)


Observer = Callable[[str, "TensorRef"], None]


class RaggedDecoder(Protocol):
    """A decoder that runs ragged batches; its K/V live with the caller."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence, in tokens."""

    def check(self, batch: ForwardBatch) -> None:
        """What `forward` would refuse.  Raises InvalidParameterError, ResourceExhaustedError. Pure."""

    def forward(self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None) -> TensorRef:
        """Logits `[R, V]` of batch.logit_rows, in that order; appends the batch's K/V to `kv`."""
