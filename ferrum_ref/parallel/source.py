"""A checkpoint as one rank sees it: its shard of every tensor, or its layers of the model, under the usual names.

    part = ShardedSource(checkpoint, rank=1, num_ranks=4)
    weights = read_decoder_weights(part, backend)            # of part.config: a quarter of the heads and features

Sources stack: layers of shards.  Clauses: TP-SOURCE-1, TP-LAYERS-1..2 (specs/parallel.md).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, NotFoundError
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_layout import layout_of
from ferrum_ref.parallel.rules import ExpertSharding, rank_config, tensor_rules
from ferrum_ref.parallel.shards import Part

Array = npt.NDArray[Any]


class WholeSource(Protocol):
    """What is needed of a checkpoint."""

    @property
    def config(self) -> DecoderConfig: ...

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array: ...


class ShardedSource:
    """One rank's shard of every tensor; read dense, whatever form the file has.  [TP-SOURCE-1]"""

    def __init__(
        self, whole: WholeSource, rank: int, num_ranks: int, experts: ExpertSharding = ExpertSharding.SPLIT
    ) -> None:
        """Raises InvalidParameterError where the model cannot lie over that many ranks."""
        self.config = rank_config(whole.config, rank, num_ranks, experts)
        self._whole = whole
        self._rank, self._num_ranks = rank, num_ranks
        self._rules = tensor_rules(whole.config, experts)

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        """The shard as a fresh array, or written into `out`.  Errors of the checkpoint pass through.

        Raises NotFoundError for a tensor that the configuration does not call for.
        """
        rule = self._rules.get(name)
        if rule is None:
            raise NotFoundError(f"read shard {name!r}: no such tensor in a {self.config.architecture}")
        return _given(rule.shard(self._whole.read(name, dtype), self._rank, self._num_ranks), out)


class StageSource:
    """Consecutive layers of a model as a model of their own.  [TP-LAYERS-1]

    Embedding and output matrix are there as one row where the stage does not use them: a decoder's element type is
    read off them. Before the last stage, the first norm of the next stage's stands in the final norm's place.
    """

    def __init__(self, whole: WholeSource, layers: range) -> None:
        """Raises InvalidParameterError for no layers, or layers that the model does not have."""
        config = whole.config
        if not len(layers) or layers.step != 1 or layers.start < 0 or layers.stop > config.num_layers:
            raise InvalidParameterError(
                f"pipeline stage: layers: got {layers}, expected consecutive ones of {config.num_layers}"
            )
        moe = config.moe
        if moe is not None:
            moe = replace(moe, dense_layers=frozenset(i - layers.start for i in moe.dense_layers if i in layers))
        types = config.layer_types[layers.start : layers.stop]
        self.config = replace(config, num_layers=len(layers), layer_types=types, moe=moe)
        self._whole = whole
        self._layers = layers
        self._names = layout_of(config)
        self._numbered = re.compile(re.escape(self._names.layer) + r"(\d+)\.")

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        """The tensor as a fresh array, or written into `out`.  Errors of the checkpoint pass through."""
        stored = self._stored(name)
        values = self._whole.read(stored, dtype)
        return _given(values if self._is_used(stored) else values[:1], out)

    def _stored(self, name: str) -> str:
        """What the whole model calls it."""
        names, layers = self._names, self._layers
        if found := self._numbered.match(name):
            return names.prefix(layers.start + int(found[1])) + name[found.end() :]
        if layers.stop < self._whole.config.num_layers and name.startswith(f"{names.final_norm}."):
            return names.prefix(layers.stop) + names.attention_norm + name.removeprefix(names.final_norm)
        return name

    def _is_used(self, name: str) -> bool:
        names, layers = self._names, self._layers
        is_last = layers.stop == self._whole.config.num_layers
        if name == f"{names.embedding}.weight":
            return layers.start == 0 or (is_last and self._whole.config.tie_word_embeddings)
        return is_last or name != f"{names.lm_head}.weight"


def layer_ranges(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Runs of layers whose lengths differ by one at most.  Pure.  [TP-LAYERS-2]

    Raises InvalidParameterError, naming both numbers, for more stages than layers or fewer than 1.
    """
    if not 1 <= num_stages <= num_layers:
        raise InvalidParameterError(
            f"pipeline: num_stages: got {num_stages} for {num_layers} layers, expected 1 to {num_layers}"
        )
    return tuple(Part(num_layers).units(stage, num_stages) for stage in range(num_stages))


def _given(values: Array, out: Array | None) -> Array:
    if out is None:
        return np.ascontiguousarray(values)
    out[...] = values
    return out
