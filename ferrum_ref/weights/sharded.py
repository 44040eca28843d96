"""A checkpoint in several files, by its index {"weight_map": {tensor: file}}; a file is opened when it is needed.

Clauses: WL-SHARD-1..3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.formats.elements import Array, StoredTensor
from ferrum_ref.interfaces.weights import WeightFormat
from ferrum_ref.weights.containers import Container, found
from ferrum_ref.weights.sources.names import is_plain_name

OpenShard = Callable[[str], Container]


class ShardedContainer(Container):
    """The tensors of all shards under their own names."""

    def __init__(self, name: str, index: Mapping[str, Any], kind: WeightFormat, open_shard: OpenShard) -> None:
        """Raises InvalidFormatError for an index that is none, or that names a path.  [WL-SHARD-1]"""
        self.name, self.format, self._open = name, kind, open_shard
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidFormatError(f"load {name}: weight_map: got {quoted(weight_map)}, expected tensor -> file")
        for tensor, shard in weight_map.items():
            if not is_plain_name(shard) or shard.endswith(".json"):
                raise InvalidFormatError(
                    f"load {name}: weight_map[{quoted(tensor)}]: got {quoted(shard)}, expected a plain weight file"
                )
        self._shard_of: dict[str, str] = weight_map
        self._metadata = index.get("metadata")

    @property
    def shards(self) -> tuple[str, ...]:
        """The files, each once."""
        return tuple(dict.fromkeys(self._shard_of.values()))

    def tensors(self) -> Mapping[str, StoredTensor]:
        shards = {shard: self._open(shard).tensors() for shard in self.shards}
        return {name: self._promised(shards[shard], name) for name, shard in self._shard_of.items()}

    def names(self) -> Iterable[str]:
        return self._shard_of

    def read(self, name: str, limit_bytes: int) -> Array:
        if name not in self._shard_of:
            found(self, {}, name, limit_bytes)  # raises
        container = self._open(self._shard_of[name])
        self._promised(container.tensors(), name)
        return container.read(name, limit_bytes)

    def extra(self) -> Mapping[str, Any]:
        return self._metadata if isinstance(self._metadata, dict) else {}

    def _promised(self, tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor:
        if name not in tensors:
            shard = self._shard_of[name]
            raise InvalidFormatError(
                f"load {self.name}: tensor {quoted(name)}: got nothing in {shard}, as the index says"
            )
        return tensors[name]
