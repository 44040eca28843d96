"""What makes a decoder family: one record each, in `family_table`.

A family says how its config.json is read; the rest is the dense decoder, unless it brings parts of its own.
Clauses: MD-CONFIG-4, LM-LAYER-1..3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.models.decoder_parts import Attention, FeedForward
from ferrum_ref.models.matrix import Weight
from ferrum_ref.types.devices import DataType

if TYPE_CHECKING:
    from ferrum_ref.interfaces.backend import ComputeBackend
    from ferrum_ref.models.checkpoint import TensorStore
    from ferrum_ref.models.config import DecoderConfig
    from ferrum_ref.models.config_hf import HfFields
    from ferrum_ref.models.decoder_ops import DecoderOps
    from ferrum_ref.models.matrix_reader import MatrixReader

Shapes = Iterable[tuple[str, tuple[int, ...]]]


class PartWeights(Protocol):
    """The weights of a part that a family brings itself."""

    def tensors(self) -> list[Weight]:
        """All that lie with the backend."""


class Source(Protocol):
    """Numbers of a checkpoint on the host."""

    def read(self, name: str, dtype: Any = np.float32, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, slots=True)
class PartReader:
    """What a part is read with: host arrays from `source`, a backend's tensors and matrices from `matrices`."""

    source: Source
    matrices: MatrixReader
    backend: ComputeBackend
    dtype: DataType


class AttentionPart(Protocol):
    """An attention of a family's own. Stateless."""

    def tensors(self, config: DecoderConfig, layer: int) -> Shapes:
        """Name and shape of every tensor."""

    def read(self, reader: PartReader, config: DecoderConfig, layer: int) -> PartWeights: ...

    def build(self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: Any) -> Attention:
        """`weights` is what `read` gave; `ops.tables(config, layer)` are the rotary tables."""


class FeedForwardPart(Protocol):
    """A feed-forward of a family's own. Stateless."""

    def tensors(self, config: DecoderConfig, layer: int) -> Shapes: ...

    def read(self, reader: PartReader, config: DecoderConfig, layer: int) -> PartWeights: ...

    def build(self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: Any) -> FeedForward: ...


def _dense(_config: DecoderConfig, _layer: int) -> None:
    """The dense part."""


def _as_stored(store: TensorStore, _config: DecoderConfig) -> TensorStore:
    return store


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of decoders.

    `read` turns the fields of config.json into arguments of DecoderConfig beyond the common ones. `knows`: the fields
    among those that would change the result (`config_hf.FOREIGN`) which it reads. `defaults`: what an absent field
    means where that is something else than null (transformers' own default). `attention` and `feed_forward` give a
    layer's own part, None for the dense one. `store` presents the tensors of a Hugging Face directory under their
    canonical names.
    """

    architecture: str  # the class that transformers names in config.json
    read: Callable[[HfFields], dict[str, Any]]
    knows: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    attention: Callable[[DecoderConfig, int], AttentionPart | None] = _dense
    feed_forward: Callable[[DecoderConfig, int], FeedForwardPart | None] = _dense
    store: Callable[[TensorStore, DecoderConfig], TensorStore] = _as_stored
