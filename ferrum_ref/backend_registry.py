"""Backends and weight loaders by name, and the factory that makes them from settings and installed plug-ins.

Clauses: BK-REGISTRY-1..5, BK-FACTORY-1..7 (specs/backend.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from ferrum_ref.errors import AlreadyExistsError, ConfigError, DeviceError, InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.backend import (
    BackendConfig,
    BackendFactory,
    BackendRegistry,
    BackendRequirements,
    BackendType,
    ComputeBackend,
    MemoryGrowthStrategy,
    WeightLoader,
    WeightLoaderConfig,
)
from ferrum_ref.plugins import backend_targets, load_backend
from ferrum_ref.types.devices import Device

Kept = TypeVar("Kept")

MAX_OPTIMIZATION_LEVEL = 3
NATIVE_PLUGIN = "numpy"
PLUGIN_OPTION = "plugin"


class NamedBackends(BackendRegistry):
    """A registry in memory; may be shared between threads.  [BK-REGISTRY-1..5; D-47]"""

    def __init__(self) -> None:
        self._backends: dict[str, ComputeBackend] = {}
        self._loaders: dict[str, WeightLoader] = {}
        self._lock = threading.Lock()

    def register_compute_backend(self, name: str, backend: ComputeBackend) -> None:
        self._keep("register_compute_backend", self._backends, name, backend, ComputeBackend)

    def register_weight_loader(self, name: str, loader: WeightLoader) -> None:
        self._keep("register_weight_loader", self._loaders, name, loader, WeightLoader)

    def get_compute_backend(self, name: str) -> ComputeBackend | None:
        with self._lock:
            return self._backends.get(name)

    def get_weight_loader(self, name: str) -> WeightLoader | None:
        with self._lock:
            return self._loaders.get(name)

    def find_best_compute_backend(self, requirements: BackendRequirements) -> ComputeBackend | None:
        """The first one registered that has not been shut down and whose capabilities suffice.  [BK-REGISTRY-3..4]"""
        with self._lock:
            candidates = list(self._backends.values())
        for backend in candidates:
            if backend.status().is_ready and backend.capabilities().meets_requirements(requirements):
                return backend
        return None

    def list_backend_names(self) -> tuple[list[str], list[str]]:
        with self._lock:
            return list(self._backends), list(self._loaders)

    def _keep(self, operation: str, kept: dict[str, Kept], name: str, value: Kept, kind: type) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidParameterError(f"{operation}: name: got {name!r}, expected a text of at least one character")
        if not isinstance(value, kind):
            raise InvalidParameterError(f"{operation}: got {type(value).__name__}, expected a {kind.__name__}")
        with self._lock:
            if name in kept:
                raise AlreadyExistsError(f"{operation}: name: {name!r} is taken, expected a new one; choose another")
            kept[name] = value


class PluginBackendFactory(BackendFactory):
    """Makes backends from the installed plug-ins.  [BK-FACTORY-1..7]

    CPU is the plug-in "numpy". Candle, OnnxRuntime, TensorRT and Metal are the plug-ins of their display names, where
    somebody has installed them. Custom is the plug-in that `backend_options["plugin"]` names (a name, or
    "package.module:factory"), "numpy" without it.
    """

    def __init__(
        self, loader_backend: ComputeBackend | None = None, *, points: Iterable[EntryPoint] | None = None
    ) -> None:
        """Weight loaders place tensors with `loader_backend` (default: a new numpy one); `points` as in plugins."""
        self._loader_backend = loader_backend
        self._points = None if points is None else tuple(points)

    async def create_compute_backend(self, config: BackendConfig) -> ComputeBackend:
        """Validate, load the plug-in on the device, configure, initialise.  [BK-FACTORY-4..5]"""
        self.validate_config(config)
        backend = load_backend(plugin_of(config), str(config.device), points=self._points)
        try:
            backend.configure(config)
            await backend.initialize(config.device)
        except BaseException:
            await backend.shutdown()
            raise
        return backend

    async def create_weight_loader(self, config: WeightLoaderConfig) -> WeightLoader:
        """A loader that places tensors with the factory's backend.  [BK-FACTORY-7]"""
        if self._loader_backend is None:
            self._loader_backend = load_backend(NATIVE_PLUGIN, points=self._points)
        return make_weight_loader(config, self._loader_backend)

    def supported_backend_types(self) -> list[BackendType]:
        """Custom always; the others when their plug-in is installed. Imports no plug-in.  [BK-FACTORY-1]"""
        installed = backend_targets(self._points)
        return [kind for kind in BackendType if kind is BackendType.Custom or _native(kind) in installed]

    def validate_config(self, config: BackendConfig) -> None:
        """Raises ConfigError, UnsupportedError or DeviceError; imports no plug-in.  [BK-FACTORY-2..3]"""
        if config.backend_type not in self.supported_backend_types():
            known = ", ".join(str(kind) for kind in self.supported_backend_types())
            raise UnsupportedError(
                f"validate_config: backend_type: {config.backend_type} needs a plug-in of that name, which is not "
                f"installed; expected one of: {known}"
            )
        if config.optimization_level > MAX_OPTIMIZATION_LEVEL:
            raise _refused("optimization_level", config.optimization_level, f"0 to {MAX_OPTIMIZATION_LEVEL}")
        _check_options(config)
        _check_memory(config)
        if plugin_of(config) == NATIVE_PLUGIN and config.device != Device.CPU:
            raise DeviceError(
                f"validate_config: device: got {config.device}, expected cpu for backend type {config.backend_type}; "
                'a GPU needs another plug-in: Custom with backend_options={"plugin": "torch"}'
            )


def plugin_of(config: BackendConfig) -> str:
    """The plug-in that a configuration asks for. Pure.  [BK-FACTORY-1]"""
    if config.backend_type is BackendType.Custom:
        return str(config.backend_options.get(PLUGIN_OPTION, NATIVE_PLUGIN))
    return _native(config.backend_type)


def make_weight_loader(config: WeightLoaderConfig, backend: ComputeBackend) -> WeightLoader:
    """A loader whose tensors are `backend`'s. Raises ConfigError for settings that cannot work.  [BK-FACTORY-7]"""
    from ferrum_ref.weights.loader import SourceWeightLoader

    return SourceWeightLoader(config, backend.tensor_factory())


def _native(kind: BackendType) -> str:
    return NATIVE_PLUGIN if kind is BackendType.CPU else str(kind)


def _check_options(config: BackendConfig) -> None:
    allowed = {PLUGIN_OPTION} if config.backend_type is BackendType.Custom else set()
    unknown = sorted(set(config.backend_options) - allowed)
    if unknown:
        expected = f'"{PLUGIN_OPTION}" only' if allowed else f"none for backend type {config.backend_type}"
        raise _refused("backend_options", ", ".join(unknown), expected)
    plugin = config.backend_options.get(PLUGIN_OPTION, NATIVE_PLUGIN)
    if not isinstance(plugin, str) or not plugin:
        raise _refused(f'backend_options["{PLUGIN_OPTION}"]', plugin, "the name of a plug-in")


def _check_memory(config: BackendConfig) -> None:
    memory = config.memory_config
    if memory.alignment < 1 or not math.log2(memory.alignment).is_integer():
        raise _refused("memory_config.alignment", memory.alignment, "a power of two, in bytes")
    if memory.pool_size is not None and memory.pool_size < memory.alignment:
        raise _refused("memory_config.pool_size", memory.pool_size, f"at least one alignment, {memory.alignment} bytes")
    if memory.growth_strategy is MemoryGrowthStrategy.Static and (
        memory.pool_size is None or not memory.enable_pooling
    ):
        raise _refused(
            "memory_config.growth_strategy", "Static", "a pool_size and pooling with it, or another strategy"
        )


def _refused(setting: str, got: Any, expected: str) -> ConfigError:
    return ConfigError(f"validate_config: {setting}: got {got}, expected {expected}")
