"""Weight loading: where a tensor lies, what is done to it, and the loader that fetches it.

Upstream: `ferrum_interfaces::backend` (its weight-loading half; `interfaces.backend` re-exports these names).
The data are in `weights_data`. Clauses: WL-* in specs/weights.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.weights_data import (
    QuantizationConfig,
    TensorSpec,
    TensorTransformation,
    TransformationType,
    WeightFormat,
    WeightLoaderCapabilities,
    WeightLoaderConfig,
    WeightMetadata,
    WeightSource,
    WeightSourceType,
)

__all__ = [
    "QuantizationConfig",
    "TensorSpec",
    "TensorTransformation",
    "TransformationType",
    "WeightFormat",
    "WeightLoader",
    "WeightLoaderCapabilities",
    "WeightLoaderConfig",
    "WeightMetadata",
    "WeightSource",
    "WeightSourceType",
]


class WeightLoader(ABC):
    """Fetches named tensors from files, the web, a hub, memory or an object store.  [WL-LOAD-1..8]

    Error kinds: ModelError (shape, transformation), NotFoundError (tensor, file), UnsupportedError (source, format),
    ResourceExhaustedError (limits), FerrumIOError (read), NetworkError (download), InvalidFormatError (parse),
    FerrumTimeoutError. No error text contains a credential.  [WL-SECRET-1..2]
    """

    @abstractmethod
    async def load_tensor(self, spec: TensorSpec) -> TensorRef:
        """Read `spec.source`, take the tensor, apply the transformations in order, cast, place on the device.

        The result has exactly `spec.shape` and `spec.dtype`.  [WL-LOAD-1..4]
        Raises the kinds above.
        """

    @abstractmethod
    async def load_tensors(self, specs: Sequence[TensorSpec]) -> list[TensorRef]:
        """One tensor per spec, in their order; all or nothing.  [WL-LOAD-5]

        Raises what `load_tensor` raises for the first spec (in their order) that fails.
        """

    @abstractmethod
    async def is_available(self, source: WeightSource) -> bool:
        """A cheap probe whether the source can be reached; never raises.  [WL-LOAD-6]"""

    @abstractmethod
    async def get_metadata(self, source: WeightSource) -> WeightMetadata:
        """Names, shapes and element types, without loading data.  [WL-META-1..3]

        Raises the kinds above.
        """

    @abstractmethod
    async def preload(self, source: WeightSource) -> None:
        """Fetch into the cache only.  [WL-LOAD-7]

        Raises the kinds above.
        """

    @abstractmethod
    def capabilities(self) -> WeightLoaderCapabilities:
        """What it supports. Pure.  [WL-LOAD-8]"""
