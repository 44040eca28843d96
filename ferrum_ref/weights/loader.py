"""SourceWeightLoader: the contract's WeightLoader over files, memory, the web, the hub and object stores.

    loader = SourceWeightLoader(config, backend.tensor_factory())
    tensor = await loader.load_tensor(TensorSpec(name, shape, dtype, device, WeightSource.File(path, None), []))

Blocking work runs in worker threads, so that loads overlap.  Clauses: WL-LOAD-1..9, WL-META-1..3, WL-SECRET-1..3.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ferrum_ref.errors import ModelError, ResourceExhaustedError
from ferrum_ref.formats.complaint import quoted
from ferrum_ref.formats.elements import ELEMENTS, Array
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef
from ferrum_ref.interfaces.weights import (
    TensorSpec,
    TransformationType,
    WeightFormat,
    WeightLoader,
    WeightLoaderCapabilities,
    WeightLoaderConfig,
    WeightMetadata,
    WeightSource,
    WeightSourceType,
)
from ferrum_ref.types.devices import DataType
from ferrum_ref.weights.container_kinds import RawContainer
from ferrum_ref.weights.containers import Container
from ferrum_ref.weights.fetcher import Fetcher
from ferrum_ref.weights.opener import Opener, SharedOpener
from ferrum_ref.weights.placement import DATA_TYPES, DTYPES, place
from ferrum_ref.weights.progress import ProgressCallback, silent
from ferrum_ref.weights.settings import Access, Limits, check_config
from ferrum_ref.weights.sources.names import public_name, source_type
from ferrum_ref.weights.transformations import raw_shape, transformation_type, transformed

OTHER_ELEMENTS: Final = "__other_elements__"
_NEEDS: Final = {WeightSourceType.HuggingFace: "huggingface_hub", WeightSourceType.S3: "boto3"}


class SourceWeightLoader(WeightLoader):
    """Loads from every kind of source in every format of the contract, and GGUF.  Safe for concurrent use."""

    def __init__(
        self,
        config: WeightLoaderConfig,
        factory: TensorFactory,
        *,
        progress: ProgressCallback | None = None,
        sha256: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        access: Access | None = None,
    ) -> None:
        """`sha256`: checksums by public name (a path, https://host/file, s3://bucket/key, hf://repo/file@revision).

        Raises ConfigError for settings that cannot work.  [WL-DATA-4]
        """
        check_config(config)
        self._config, self._factory = config, factory
        self._limits = limits if limits is not None else Limits()
        checksums = dict(sha256 or {})
        self._fetcher = Fetcher(
            config, self._limits, access if access is not None else Access(), checksums, progress or silent
        )
        self._opener = Opener(config, self._fetcher, checksums)

    def __repr__(self) -> str:
        return f"SourceWeightLoader({self._config!r})"

    async def load_tensor(self, spec: TensorSpec) -> TensorRef:
        return await asyncio.to_thread(self._load, spec, self._opener)

    async def load_tensors(self, specs: Sequence[TensorSpec]) -> list[TensorRef]:
        slots = asyncio.Semaphore(self._config.max_concurrent_downloads)
        opener = SharedOpener(self._opener)

        async def one(spec: TensorSpec) -> TensorRef:
            async with slots:
                return await asyncio.to_thread(self._load, spec, opener)

        results = await asyncio.gather(*(one(spec) for spec in specs), return_exceptions=True)
        loaded: list[TensorRef] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            loaded.append(result)
        return loaded

    async def is_available(self, source: WeightSource) -> bool:
        try:
            return await asyncio.to_thread(self._probe, source)
        except Exception:  # noqa: BLE001  the contract: never raises
            return False

    async def get_metadata(self, source: WeightSource) -> WeightMetadata:
        return await asyncio.to_thread(self._metadata, source)

    async def preload(self, source: WeightSource) -> None:
        await asyncio.to_thread(self._opener.preload, source)

    def capabilities(self) -> WeightLoaderCapabilities:
        sources = [kind for kind in WeightSourceType if kind not in _NEEDS or importlib.util.find_spec(_NEEDS[kind])]
        formats = [WeightFormat.PyTorch, WeightFormat.SafeTensors, WeightFormat.Numpy, WeightFormat.Raw]
        if importlib.util.find_spec("onnx"):
            formats.append(WeightFormat.Onnx)
        return WeightLoaderCapabilities(
            supported_formats=[*formats, WeightFormat.Gguf],
            supported_sources=sources,
            max_tensor_size=self._limits.max_tensor_bytes,
            supports_streaming=True,
            supports_concurrent=True,
            supported_transformations=list(TransformationType),
        )

    def _load(self, spec: TensorSpec, opener: Opener | SharedOpener) -> TensorRef:
        """One tensor, in this thread.  [WL-LOAD-1..4]"""
        name = spec.name
        if isinstance(spec.source, WeightSource.File) and spec.source.tensor_name is not None:
            name = spec.source.tensor_name
        source_type(spec.source)
        what = f"load {public_name(spec.source)}: tensor {quoted(name)}"
        for step in spec.transformations:
            transformation_type(step)
        try:
            values = self._read(opener.open(spec.source), name, spec, what)
            values = transformed(values, spec, self._factory, what)
            return place(values, spec.dtype, spec.device, self._factory, what)
        except MemoryError:
            raise ResourceExhaustedError(f"{what}: got no memory for it, expected room for {spec.shape}") from None

    def _read(self, container: Container, name: str, spec: TensorSpec, what: str) -> Array:
        limit = self._limits.max_tensor_bytes
        if isinstance(container, RawContainer):
            return container.read_as(name, _element(spec.dtype), raw_shape(spec, what), limit)
        return container.read(name, limit)

    def _metadata(self, source: WeightSource) -> WeightMetadata:
        source_type(source)
        container = self._opener.open_header(source)
        tensors = container.tensors()
        elements = list(dict.fromkeys(stored.element for stored in tensors.values()))
        kinds = {element: DATA_TYPES.get(ELEMENTS[element]) for element in elements if element in ELEMENTS}
        extra: dict[str, Any] = dict(container.extra())
        others = sorted(element for element in elements if kinds.get(element) is None)
        if others:
            extra[OTHER_ELEMENTS] = others
        return WeightMetadata(
            tensors={name: list(stored.shape) for name, stored in tensors.items()},
            format=container.format,
            total_size_bytes=sum(stored.num_bytes for stored in tensors.values()),
            dtypes=[kind for kind in kinds.values() if kind is not None],
            extra=extra,
        )

    def _probe(self, source: WeightSource) -> bool:
        kind = source_type(source)
        if isinstance(source, WeightSource.Memory):
            return True
        if isinstance(source, WeightSource.File):
            return Path(source.path).exists() and os.access(source.path, os.R_OK)
        if not self.supports(kind):
            return False
        return self._fetcher.is_available(source)

    def supports(self, kind: WeightSourceType) -> bool:
        """True when the package that this kind of source needs is installed."""
        return kind in self.capabilities().supported_sources


def _element(dtype: DataType) -> str:
    """The name of a DataType's element type in files."""
    for element, kind in ELEMENTS.items():
        if kind == DTYPES[dtype]:
            return element
    raise ModelError(f"load: dtype: got {dtype}, expected one that files hold")
