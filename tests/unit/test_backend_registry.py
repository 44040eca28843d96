"""The registry of backends and loaders, and the factory over the installed plug-ins."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from ferrum_ref.backend_registry import NamedBackends, PluginBackendFactory, make_weight_loader
from ferrum_ref.errors import (
    AlreadyExistsError,
    BackendError,
    ConfigError,
    DeviceError,
    InvalidParameterError,
    NotFoundError,
    UnsupportedError,
)
from ferrum_ref.interfaces.backend import (
    BackendConfig,
    BackendMemoryConfig,
    BackendRequirements,
    BackendType,
    MemoryGrowthStrategy,
    TensorSpec,
    WeightLoaderConfig,
    WeightSource,
)
from ferrum_ref.interfaces.memory import MemoryType
from ferrum_ref.numpy_backend.backend import NumpyBackend
from ferrum_ref.plugins import ENTRY_POINT_GROUP, load_backend
from ferrum_ref.types.devices import DataType, Device

ANYTHING = BackendRequirements([Device.CPU], [DataType.FP32], 1, 1, False, False, {})
LOADER = WeightLoaderConfig(False, None, None, 2, 10, True, {})
MEMORY = BackendMemoryConfig(4096, 64, True, MemoryGrowthStrategy.Incremental)
CPU = BackendConfig(BackendType.CPU, Device.CPU, 1, False, MEMORY, {})
PLAIN_MEMORY = BackendMemoryConfig(None, 1, True, MemoryGrowthStrategy.Dynamic)


def custom(plugin: str | None, **changes: Any) -> BackendConfig:
    options = {} if plugin is None else {"plugin": plugin}
    plain = dataclasses.replace(
        CPU, backend_type=BackendType.Custom, memory_config=PLAIN_MEMORY, backend_options=options
    )
    return dataclasses.replace(plain, **changes)


def loader() -> Any:
    return make_weight_loader(LOADER, NumpyBackend())


@pytest.mark.clause("BK-REGISTRY-1", "BK-REGISTRY-2")
def test_a_taken_name_is_refused_and_the_first_stays() -> None:
    registry, first, second = NamedBackends(), NumpyBackend(), NumpyBackend()
    first_loader = loader()
    registry.register_compute_backend("a", first)
    registry.register_weight_loader("a", first_loader)
    with pytest.raises(AlreadyExistsError, match="'a' is taken"):
        registry.register_compute_backend("a", second)
    with pytest.raises(AlreadyExistsError, match="'a' is taken"):
        registry.register_weight_loader("a", loader())
    assert registry.get_compute_backend("a") is first
    assert registry.get_weight_loader("a") is first_loader
    assert registry.get_compute_backend("b") is registry.get_weight_loader("b") is None


@pytest.mark.clause("BK-REGISTRY-1")
def test_names_and_objects_are_checked() -> None:
    registry: Any = NamedBackends()
    for name in ("", None, 3):
        with pytest.raises(InvalidParameterError, match="name"):
            registry.register_compute_backend(name, NumpyBackend())
    with pytest.raises(InvalidParameterError, match="got SourceWeightLoader, expected a ComputeBackend"):
        registry.register_compute_backend("x", loader())
    with pytest.raises(InvalidParameterError, match="got NumpyBackend, expected a WeightLoader"):
        registry.register_weight_loader("x", NumpyBackend())
    assert registry.list_backend_names() == ([], [])


@pytest.mark.clause("BK-REGISTRY-1")
def test_of_many_threads_one_gets_the_name() -> None:
    registry, outcomes, start = NamedBackends(), [], threading.Barrier(8)

    def work() -> None:
        backend = NumpyBackend()
        start.wait()
        try:
            registry.register_compute_backend("one", backend)
            outcomes.append(backend)
        except AlreadyExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (outcome for outcome in outcomes if outcome is not None)
    assert len(outcomes) == 8
    assert registry.get_compute_backend("one") is winner


@pytest.mark.clause("BK-REGISTRY-3", "BK-REGISTRY-4", "BK-REGISTRY-5", "BK-CAPS-2")
def test_the_first_ready_one_that_suffices() -> None:
    registry = NamedBackends()
    assert registry.find_best_compute_backend(ANYTHING) is None
    torch, one, two = load_backend("torch"), NumpyBackend(), NumpyBackend()
    for name, backend in (("torch", torch), ("z", one), ("a", two)):
        registry.register_compute_backend(name, backend)
    registry.register_weight_loader("files", loader())
    assert registry.list_backend_names() == (["torch", "z", "a"], ["files"])
    assert registry.find_best_compute_backend(ANYTHING) is torch
    flash = dataclasses.replace(ANYTHING, requires_flash_attention=True)
    assert registry.find_best_compute_backend(flash) is one  # torch declares none; upstream takes torch (D-19)
    asyncio.run(one.shutdown())
    assert registry.find_best_compute_backend(flash) is two
    assert registry.find_best_compute_backend(dataclasses.replace(flash, required_devices=[Device.cuda(7)])) is None


@pytest.mark.clause("BK-FACTORY-1")
def test_kinds_are_those_with_a_plug_in() -> None:
    assert PluginBackendFactory().supported_backend_types() == [BackendType.CPU, BackendType.Custom]
    assert PluginBackendFactory(points=[]).supported_backend_types() == [BackendType.Custom]
    points = [point("metal"), point("onnx_runtime"), point("numpy")]
    assert PluginBackendFactory(points=points).supported_backend_types() == [
        BackendType.OnnxRuntime,
        BackendType.Metal,
        BackendType.CPU,
        BackendType.Custom,
    ]


def point(name: str, target: str = "ferrum_ref.numpy_backend:make_backend") -> EntryPoint:
    return EntryPoint(name=name, value=target, group=ENTRY_POINT_GROUP)


@pytest.mark.clause("BK-FACTORY-1", "BK-FACTORY-4")
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CPU, "numpy"),
        (custom(None), "numpy"),
        (custom("numpy"), "numpy"),
        (custom("torch"), "torch"),
        (custom("ferrum_torch:make_backend"), "torch"),
    ],
)
def test_a_new_backend_is_initialised_and_ready(config: BackendConfig, name: str) -> None:
    factory = PluginBackendFactory()
    one, two = (asyncio.run(factory.create_compute_backend(config)) for _ in range(2))
    assert one is not two
    assert one.name() == name
    status = one.status()
    assert status.is_initialized
    assert status.is_ready
    assert status.active_devices == [Device.CPU]


@pytest.mark.clause("BK-FACTORY-1")
def test_another_kind_is_the_plug_in_of_its_display_name() -> None:
    factory = PluginBackendFactory(points=[point("tensorrt")])
    config = dataclasses.replace(CPU, backend_type=BackendType.TensorRT)
    assert asyncio.run(factory.create_compute_backend(config)).name() == "numpy"


@pytest.mark.clause("BK-FACTORY-4", "BK-NUMPY-9")
def test_the_settings_reach_the_backend() -> None:
    backend: Any = asyncio.run(PluginBackendFactory().create_compute_backend(CPU))
    usage = backend.memory_manager().usage(Device.CPU)[MemoryType.General]
    assert usage.committed_bytes == 512
    assert backend.status().backend_specific["optimization_level"] == 1


@pytest.mark.clause("BK-FACTORY-2", "BK-FACTORY-3")
@pytest.mark.parametrize(
    ("config", "kind", "complaint"),
    [
        *(
            (dataclasses.replace(CPU, backend_type=kind), UnsupportedError, rf"{kind} needs a plug-in.*: cpu, custom")
            for kind in (BackendType.Candle, BackendType.OnnxRuntime, BackendType.TensorRT, BackendType.Metal)
        ),
        (dataclasses.replace(CPU, optimization_level=4), ConfigError, "optimization_level: got 4, expected 0 to 3"),
        (dataclasses.replace(CPU, device=Device.cuda(0)), DeviceError, 'expected cpu.*"plugin": "torch"'),
        (custom(None, device=Device.Metal), DeviceError, "got metal, expected cpu"),
        (
            dataclasses.replace(CPU, backend_options={"plugin": "torch"}),
            ConfigError,
            "plugin, expected none for .* cpu",
        ),
        (custom("torch", backend_options={"plugin": "torch", "fast": 1}), ConfigError, "got fast"),
        (custom(None, backend_options={"plugin": ""}), ConfigError, "the name of a plug-in"),
        (custom(None, backend_options={"plugin": 3}), ConfigError, "the name of a plug-in"),
    ],
)
def test_settings_that_cannot_work(config: BackendConfig, kind: type[Exception], complaint: str) -> None:
    factory = PluginBackendFactory()
    with pytest.raises(kind, match=complaint):
        factory.validate_config(config)
    with pytest.raises(kind, match=complaint):
        asyncio.run(factory.create_compute_backend(config))


@pytest.mark.clause("BK-FACTORY-3")
@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": 0},
        {"alignment": 48},
        {"pool_size": 63},
        {"pool_size": None, "growth_strategy": MemoryGrowthStrategy.Static},
        {"enable_pooling": False, "growth_strategy": MemoryGrowthStrategy.Static},
    ],
)
def test_memory_settings_that_cannot_work(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CPU, memory_config=dataclasses.replace(MEMORY, **changes))
    with pytest.raises(ConfigError, match="memory_config"):
        PluginBackendFactory().validate_config(config)


@pytest.mark.clause("BK-FACTORY-2")
def test_a_plug_in_that_does_not_load_fails_as_plug_ins_do() -> None:
    factory = PluginBackendFactory()
    with pytest.raises(NotFoundError, match="'cupyy', expected one of"):
        asyncio.run(factory.create_compute_backend(custom("cupyy")))
    with pytest.raises(NotFoundError, match="surely_absent"):
        asyncio.run(factory.create_compute_backend(custom("surely_absent:make")))
    with pytest.raises(UnsupportedError, match="cuda"):
        asyncio.run(factory.create_compute_backend(custom("torch", device=Device.cuda(99))))


class Fussy(NumpyBackend):
    made: list[Fussy] = []  # noqa: RUF012  (what the factory made, for the test to look at)

    def __init__(self, _device: str) -> None:
        super().__init__()
        self.made.append(self)

    async def initialize(self, device: Device) -> None:
        raise DeviceError(f"{device} is on fire")


@pytest.mark.clause("BK-FACTORY-5")
@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, DeviceError), ({"memory_config": dataclasses.replace(MEMORY, enable_pooling=False)}, UnsupportedError)],
)
def test_a_half_made_backend_is_shut_down(
    changes: dict[str, Any], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fussy_plugin", sys.modules[__name__])
    Fussy.made.clear()
    with pytest.raises(kind):
        asyncio.run(PluginBackendFactory().create_compute_backend(custom("fussy_plugin:Fussy", **changes)))
    (made,) = Fussy.made
    assert not made.status().is_ready
    with pytest.raises(BackendError, match="shut down"):
        made.tensor_ops()


@pytest.mark.clause("BK-FACTORY-6")
def test_validating_imports_no_plug_in() -> None:
    program = """
import sys
from ferrum_ref.backend_registry import PluginBackendFactory
from ferrum_ref.interfaces.backend import *
from ferrum_ref.types.devices import Device
memory = BackendMemoryConfig(None, 64, True, MemoryGrowthStrategy.Dynamic)
config = BackendConfig(BackendType.Custom, Device.CPU, 0, False, memory, {"plugin": "torch"})
factory = PluginBackendFactory()
factory.validate_config(config)
factory.supported_backend_types()
sys.exit(any(name in sys.modules for name in ("torch", "ferrum_torch", "ferrum_ref.numpy_backend")))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.clause("BK-FACTORY-7")
@pytest.mark.parametrize("plugin", ["numpy", "torch"])
def test_a_loader_makes_tensors_of_the_factorys_backend(plugin: str, tmp_path: Any) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "w.npy", values)
    factory = PluginBackendFactory(load_backend(plugin))
    made = asyncio.run(factory.create_weight_loader(LOADER))
    spec = TensorSpec("w", [2, 3], DataType.FP32, Device.CPU, WeightSource.File(str(tmp_path / "w.npy"), None), [])
    tensor = asyncio.run(made.load_tensor(spec))
    assert type(tensor) is type(load_backend(plugin).tensor_factory().from_numpy(values))
    np.testing.assert_array_equal(tensor.to_numpy(), values)
    default = asyncio.run(PluginBackendFactory().create_weight_loader(LOADER))
    assert type(asyncio.run(default.load_tensor(spec))).__name__ == "NumpyTensor"
    with pytest.raises(ConfigError):
        asyncio.run(factory.create_weight_loader(dataclasses.replace(LOADER, max_concurrent_downloads=0)))
