"""What a decoder asks of a cache during one forward: append this layer's K/V, attend over everything cached.

The decoder is written against this; contiguous and paged tensors implement it (`kv_cache/storage_*.py`).
Clauses: LM-KV-1..2 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from ferrum_ref.interfaces.kernel_ops import AttentionParams
    from ferrum_ref.interfaces.tensor import TensorRef


class KvBatch(Protocol):
    """The caches of one forward's sequences, in the order of its rows. N = new tokens of all sequences together."""

    def append(self, layer: int, k: TensorRef, v: TensorRef) -> None:
        """Store k, v `[N, G, D]` at each sequence's next positions. Mutates the cache.  [LM-KV-1]"""

    def attend(self, layer: int, q: TensorRef, params: AttentionParams, *, sinks: TensorRef | None = None) -> TensorRef:
        """q `[N, H, D]` -> `[N, H, D]`: each row sees its own sequence up to and including itself. Pure.  [LM-KV-2]

        `sinks` `[H]` as in `AttentionOps.attention`; a cache without them raises UnsupportedError.
        """


class SequenceKv(Protocol):
    """One sequence's own cache."""

    num_tokens: int

    def reserve(self, num_new: int) -> None:
        """Room for that many more tokens.  Raises ResourceExhaustedError beyond the context."""

    def truncate(self, new_len: int) -> None:
        """Forget the tokens from `new_len` on.  Raises InvalidParameterError outside [0, num_tokens]."""

    def size_bytes(self) -> int:
        """Bytes allocated."""


class CommittingKvBatch(KvBatch, Protocol):
    """Caches of one forward whose new tokens count once `commit` is called."""

    def commit(self) -> None:
        """Count the new tokens as cached."""


Cache = TypeVar("Cache", bound=SequenceKv)


class SequenceKvFactory(Protocol[Cache]):
    """Makes one kind of per-sequence cache, and binds several of them for a forward."""

    def new_cache(self) -> Cache:
        """An empty cache."""

    def bind(self, caches: Sequence[Cache], num_new: Sequence[int]) -> CommittingKvBatch:
        """Reserve room in every cache.  Raises ResourceExhaustedError before any length changes."""


class PagedKv(Protocol):
    """Block-structured K/V tensors that an executor binds to the block tables of one forward."""

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""

    @property
    def block_size(self) -> int:
        """Tokens of one block."""

    def size_bytes(self) -> int:
        """Bytes of all blocks, K and V of all layers."""

    def bind(self, block_tables: Sequence[Sequence[int]], num_cached: Sequence[int], num_new: Sequence[int]) -> KvBatch:
        """The caches of sequences that hold num_cached[i] tokens and receive num_new[i] more. Pure.

        Raises InvalidParameterError for a block outside the storage or a table too short for its tokens.
        """
