"""What goes into and comes out of a `ModelExecutor`: prefill, decode and mixed ("unified") batches.

Upstream: `ferrum_interfaces::model_executor`, with the batch types and `metadata` of 0.7.7.
Clauses: MX-INPUT-1..4, MX-OUTPUT-1..6, MX-UNIFIED-1..2 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ferrum_ref.errors import BackendError, ModelError
from ferrum_ref.types.parity_mode import ParityMode

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kv_cache import KvCacheHandle
    from ferrum_ref.interfaces.tensor import TensorRef


def _batch_and_length(operation: str, input_ids: TensorRef, mode: ParityMode) -> tuple[int, int]:
    """(batch, tokens) of an id tensor: `[n]` is one sequence of n tokens, `[b, n]` is b of them.  [MX-INPUT-1; D-44]"""
    shape = input_ids.shape()
    if mode is ParityMode.UPSTREAM and shape:
        return shape[0], shape[1] if len(shape) >= 2 else 1
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape[0], shape[1]
    raise ModelError(f"{operation}: input_ids must be [seq] or [batch, seq], got shape {list(shape)}; reshape it")


@dataclass(frozen=True, slots=True)
class PrefillInput:
    """A prompt, or a later chunk of one: `kv_cache` then holds the earlier tokens.  [MX-INPUT-1..4; D-44, D-66]

    input_ids `[batch, seq]` or `[seq]`; attention_mask, position_ids: the same shape. Mask: 1 = real token, 0 = padding
    at one or both ends of a row; positions: absolute, None = cached length onward; those of padding are not read.
    `metadata` is 0.7.7's. Extensions: `last_only` asks for the logits of each row's last real token alone, the
    two `wants_*` for what the output can carry besides. The `with_*` methods return copies. Pure.
    """

    input_ids: TensorRef
    attention_mask: TensorRef | None = None
    position_ids: TensorRef | None = None
    kv_cache: KvCacheHandle | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    last_only: bool = False
    wants_hidden_states: bool = False
    wants_attention_weights: bool = False

    @classmethod
    def new(cls, input_ids: TensorRef) -> Self:
        return cls(input_ids)

    def with_kv_cache(self, kv_cache: KvCacheHandle) -> Self:
        return replace(self, kv_cache=kv_cache)

    def with_attention_mask(self, mask: TensorRef) -> Self:
        return replace(self, attention_mask=mask)

    def with_position_ids(self, positions: TensorRef) -> Self:
        return replace(self, position_ids=positions)

    def with_metadata(self, metadata: Mapping[str, Any]) -> Self:
        """Replace the whole map."""
        return replace(self, metadata=dict(metadata))

    def with_last_only(self, last_only: bool = True) -> Self:
        return replace(self, last_only=last_only)

    def with_hidden_states(self, wanted: bool = True) -> Self:
        return replace(self, wants_hidden_states=wanted)

    def with_attention_weights(self, wanted: bool = True) -> Self:
        return replace(self, wants_attention_weights=wanted)

    def batch_size(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> int:
        """1 for `[seq]`.  Raises ModelError unless rank 1 or 2; UPSTREAM gives shape[0] of any rank.  [MX-INPUT-1]"""
        return _batch_and_length("PrefillInput.batch_size", self.input_ids, parity_mode)[0]

    def sequence_length(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> int:
        """n for `[n]` and `[b, n]`.  Raises ModelError unless rank 1 or 2; UPSTREAM: 1 for `[n]`.  [MX-INPUT-1]"""
        return _batch_and_length("PrefillInput.sequence_length", self.input_ids, parity_mode)[1]


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """Logits of a prompt and the handle that holds its K/V.  [MX-OUTPUT-1..6; D-11, D-43, D-48]

    logits `[batch, seq, vocab]`, or `[batch, 1, vocab]` after `last_only`. hidden_states: layers + 1 of
    `[batch, seq, hidden]`; attention_weights: per layer `[batch, heads, seq, cached]`. `last_logits` (an extension) is
    `[batch, vocab]`: each row's own last real position. Padding reads 0 everywhere.
    """

    logits: TensorRef
    kv_cache: KvCacheHandle
    hidden_states: list[TensorRef] | None = None
    attention_weights: list[TensorRef] | None = None
    last_logits: TensorRef | None = None

    @classmethod
    def new(cls, logits: TensorRef, kv_cache: KvCacheHandle) -> Self:
        return cls(logits, kv_cache)

    def last_token_logits(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> TensorRef:
        """`[batch, vocab]`: each row's own last real position.  Raises BackendError unless rank 3 and seq > 0.  Pure.

        UPSTREAM: `[batch, 1, vocab]` of the last column, be it padding (D-11).  [MX-OUTPUT-2]
        """
        if self.last_logits is not None and parity_mode is ParityMode.REFERENCE:
            return self.last_logits
        shape = self.logits.shape()
        if len(shape) != 3 or shape[1] == 0:
            raise BackendError(
                f"PrefillOutput.last_token_logits: logits must be [batch, seq > 0, vocab], got {list(shape)}"
            )
        batch, seq, vocab = shape
        last = self.logits.view((0, seq - 1, 0), (batch, seq, vocab))
        return last if parity_mode is ParityMode.UPSTREAM else last.reshape((batch, vocab))


@dataclass(frozen=True, slots=True)
class DecodeInput:
    """One more token per sequence.  [MX-INPUT-1..4]

    input_ids `[batch, 1]` or `[1]`; kv_cache is the previous step's handle; position_ids None = its length. The two
    `wants_*` (extensions) ask for what the output can carry besides.
    """

    input_ids: TensorRef
    kv_cache: KvCacheHandle
    position_ids: TensorRef | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    wants_hidden_states: bool = False
    wants_attention_weights: bool = False

    @classmethod
    def new(cls, input_ids: TensorRef, kv_cache: KvCacheHandle) -> Self:
        return cls(input_ids, kv_cache)

    def with_position_ids(self, positions: TensorRef) -> Self:
        return replace(self, position_ids=positions)

    def with_metadata(self, metadata: Mapping[str, Any]) -> Self:
        """Replace the whole map."""
        return replace(self, metadata=dict(metadata))

    def with_hidden_states(self, wanted: bool = True) -> Self:
        return replace(self, wants_hidden_states=wanted)

    def with_attention_weights(self, wanted: bool = True) -> Self:
        return replace(self, wants_attention_weights=wanted)

    def batch_size(self, parity_mode: ParityMode = ParityMode.REFERENCE) -> int:
        """1 for `[1]`.  Raises ModelError unless rank 1 or 2; UPSTREAM gives shape[0] of any rank.  [MX-INPUT-1]"""
        return _batch_and_length("DecodeInput.batch_size", self.input_ids, parity_mode)[0]


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """Next-token logits `[batch, vocab]` and the handle that includes the token just run.  [MX-OUTPUT-3..5; D-43]

    hidden_state `[batch, hidden]`, after the final norm; attention_weights: per layer `[batch, heads, 1, cached]`.
    """

    logits: TensorRef
    kv_cache: KvCacheHandle
    hidden_state: TensorRef | None = None
    attention_weights: list[TensorRef] | None = None

    @classmethod
    def new(cls, logits: TensorRef, kv_cache: KvCacheHandle) -> Self:
        return cls(logits, kv_cache)


@dataclass(frozen=True, slots=True)
class UnifiedBatchItem:
    """One sequence's share of a mixed forward.  [MX-UNIFIED-1]

    `q_tokens` run at positions pos_offset, pos_offset + 1, ...; pos_offset = tokens already cached. A decode step is
    one token with is_final_chunk True; a prefill chunk is n tokens, final only when it reaches the prompt's end.
    """

    seq_id: str
    q_tokens: list[int]
    kv_cache: KvCacheHandle
    pos_offset: int
    is_final_chunk: bool
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnifiedBatch:
    """Prefill chunks and decodes that go through the model in one forward.  [MX-UNIFIED-1]"""

    items: list[UnifiedBatchItem] = field(default_factory=list)

    def total_q_tokens(self) -> int:
        """Tokens the forward computes."""
        return sum(len(item.q_tokens) for item in self.items)

    def num_sampled_items(self) -> int:
        """Items that yield logits: the final ones."""
        return sum(item.is_final_chunk for item in self.items)
