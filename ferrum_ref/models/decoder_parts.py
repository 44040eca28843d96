"""What a decoder layer is made of: the shapes of its two parts, whichever family they belong to.

`see(name, tensor)` shows an intermediate under the layer's own name ("qkv", "gated"); the decoder puts "layers.3." in
front.  Clauses: LM-LAYER-1..3 (specs/llm.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from ferrum_ref.interfaces.forward import Ints
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef

See: TypeAlias = Callable[[str, TensorRef], None]


class Attention(Protocol):
    """The part of a layer that looks at other tokens. Stateless: keys and values live in `kv`."""

    def attend(self, normed: TensorRef, positions: Ints, kv: KvBatch, layer: int, see: See) -> TensorRef:
        """normed `[N, E]` -> `[N, inner]`: project, rotate, store K/V of all N rows, attend. Appends to `kv`."""

    def project(self, attended: TensorRef) -> TensorRef:
        """`[R, inner]` -> `[R, E]`, row by row: the decoder may have dropped rows in between. Pure."""


class FeedForward(Protocol):
    """The part of a layer that works on each row alone."""

    def __call__(self, normed: TensorRef, see: See) -> TensorRef:
        """`[R, E]` -> `[R, E]`. Pure."""
