"""Small files beside the weights, such as config.json, from wherever the weights come from.

Clause: MB-SOURCE-3 (specs/model_builder.md).
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol, runtime_checkable

import numpy as np

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.weights import TensorSpec, WeightFormat, WeightLoader, WeightSource
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.weights.loader import SourceWeightLoader

MAX_DOCUMENT_BYTES: Final = 64 * 2**20


@runtime_checkable
class DocumentLoader(Protocol):
    """A weight loader that also hands out a file as it is (extension)."""

    async def read_bytes(self, source: WeightSource) -> bytes:
        """The file's bytes.  Raises what `WeightLoader.load_tensor` raises for sources."""


async def read_document(loader: WeightLoader, source: WeightSource) -> bytes:
    """The bytes of a file: by `read_bytes`, or, from a loader without it, as one raw tensor of bytes.  [MB-SOURCE-3]

    Raises UnsupportedError for a loader that reads the file as neither, and what the loader raises.
    """
    if isinstance(loader, DocumentLoader):
        return await loader.read_bytes(source)
    if isinstance(loader, SourceWeightLoader):
        return await asyncio.to_thread(loader._fetcher.small, source, MAX_DOCUMENT_BYTES)
    metadata = await loader.get_metadata(source)
    if metadata.format != WeightFormat.Raw or len(metadata.tensors) != 1:
        raise UnsupportedError(
            f"build: the weight loader reads config.json as {metadata.format.name}, expected Raw; give the"
            " configuration in additional_options['config']"
        )
    (name,) = metadata.tensors
    spec = TensorSpec(name, [metadata.total_size_bytes], DataType.UINT8, Device.CPU, source, [])
    tensor = await loader.load_tensor(spec)
    return np.asarray(tensor.to_numpy()).tobytes()
