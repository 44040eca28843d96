"""Capabilities, data, and the default bodies of ComputeBackend."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from ferrum_ref.errors import InvalidParameterError, SerializationError, UnsupportedError
from ferrum_ref.interfaces import backend as contract
from ferrum_ref.interfaces import weights
from ferrum_ref.interfaces.backend import (
    BackendCapabilities,
    BackendConfig,
    BackendMemoryConfig,
    BackendRequirements,
    BackendStatus,
    BackendType,
    ComputeBackend,
    KernelHandle,
    MemoryGrowthStrategy,
)
from ferrum_ref.serialization import from_json, to_json
from ferrum_ref.types import config as engine_config
from ferrum_ref.types import models
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.parity_mode import ParityMode

CAPABILITIES = BackendCapabilities(
    supported_dtypes=[DataType.FP32, DataType.BF16],
    supported_devices=[Device.CPU, Device.cuda(0)],
    max_tensor_dims=8,
    supports_fp16=False,
    supports_bf16=True,
    supports_int8=False,
    supports_flash_attention=True,
    supports_paged_attention=False,
    supports_tensor_parallelism=False,
    supports_pipeline_parallelism=False,
    max_batch_size=16,
    max_sequence_length=4096,
    memory_alignment=64,
    supports_custom_kernels=False,
    supports_cuda_graphs=False,
    extra_capabilities={"compute": 9.0, "nothing": None, "graphs": True, "sizes": [1, {"a": 2}]},
)
MODEST = BackendRequirements(
    required_devices=[Device.CPU],
    required_dtypes=[DataType.BF16],
    min_batch_size=16,
    min_sequence_length=4096,
    requires_flash_attention=True,
    requires_paged_attention=False,
    extra_requirements={"compute": 9},
)
MEMORY = BackendMemoryConfig(
    pool_size=None, alignment=64, enable_pooling=True, growth_strategy=MemoryGrowthStrategy.Dynamic
)
CONFIG = BackendConfig(
    backend_type=BackendType.CPU,
    device=Device.CPU,
    optimization_level=2,
    enable_debug=False,
    memory_config=MEMORY,
    backend_options={},
)


@pytest.mark.clause("BK-CAPS-1")
def test_devices_dtypes_and_sizes():
    assert CAPABILITIES.meets_requirements(MODEST)
    for changes in (
        {"required_devices": [Device.CPU, Device.cuda(1)]},
        {"required_dtypes": [DataType.BF16, DataType.FP16]},
        {"min_batch_size": 17},
        {"min_sequence_length": 4097},
    ):
        for mode in ParityMode:
            lacking = dataclasses.replace(MODEST, **changes)
            assert not CAPABILITIES.meets_requirements(lacking, parity_mode=mode)


@pytest.mark.clause("BK-CAPS-2", "BK-CAPS-3")
def test_flags_and_extras_count_here_and_not_upstream():
    paged = dataclasses.replace(MODEST, requires_paged_attention=True)
    assert not CAPABILITIES.meets_requirements(paged)
    assert CAPABILITIES.meets_requirements(paged, parity_mode=ParityMode.UPSTREAM)
    assert dataclasses.replace(CAPABILITIES, supports_paged_attention=True).meets_requirements(paged)
    no_flash = dataclasses.replace(CAPABILITIES, supports_flash_attention=False)
    assert not no_flash.meets_requirements(MODEST)
    assert no_flash.meets_requirements(MODEST, parity_mode=ParityMode.UPSTREAM)


@pytest.mark.clause("BK-CAPS-2", "BK-CAPS-3")
@pytest.mark.parametrize(
    ("extra", "is_met"),
    [
        ({"compute": 9.0}, True),
        ({"compute": 9, "nothing": None}, True),
        ({"graphs": True, "sizes": [1, {"a": 2.0}]}, True),
        ({"compute": 8}, False),
        ({"compute": 9, "other": None}, False),
        ({"nothing": 0}, False),
        ({"graphs": 1}, False),
        ({"sizes": [True, {"a": 2}]}, False),
        ({"sizes": [1, {"a": 2, "b": 3}]}, False),
        ({"sizes": [1]}, False),
    ],
)
def test_extra_requirements(extra, is_met):
    asked = dataclasses.replace(MODEST, extra_requirements=extra)
    assert CAPABILITIES.meets_requirements(asked) is is_met
    assert CAPABILITIES.meets_requirements(asked, parity_mode=ParityMode.UPSTREAM)


@pytest.mark.clause("BK-DATA-1")
def test_kinds_have_their_display_names():
    assert [str(kind) for kind in BackendType] == ["candle", "onnx_runtime", "tensorrt", "metal", "cpu", "custom"]
    handle = KernelHandle(7)
    assert handle.value == handle._0 == 7
    assert {handle: 1}[KernelHandle(7)] == 1
    for number in (-1, 2**64):
        with pytest.raises(InvalidParameterError, match="KernelHandle"):
            KernelHandle(number)


@pytest.mark.clause("BK-DATA-2")
def test_records_demand_every_field_in_upstreams_order():
    for record, names in (
        (
            BackendConfig,
            "backend_type device optimization_level enable_debug memory_config backend_options",
        ),
        (BackendMemoryConfig, "pool_size alignment enable_pooling growth_strategy"),
        (
            BackendStatus,
            "is_initialized is_ready active_devices memory_usage operations_completed last_error backend_specific",
        ),
        (
            BackendRequirements,
            "required_devices required_dtypes min_batch_size min_sequence_length requires_flash_attention "
            "requires_paged_attention extra_requirements",
        ),
    ):
        fields = dataclasses.fields(record)
        assert [field.name for field in fields] == names.split()
        assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)
    for changes in ({"optimization_level": 256}, {"optimization_level": -1}):
        with pytest.raises(InvalidParameterError, match="optimization_level"):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InvalidParameterError, match="pool_size"):
        dataclasses.replace(MEMORY, pool_size=2**64)


@pytest.mark.clause("BK-DATA-3")
def test_a_status_with_gpu_memory_is_json_and_back():
    usage = {Device.cuda(0): 1024, Device.CPU: 5}
    status = BackendStatus(True, True, [Device.cuda(0)], usage, 3, None, {"x": [1]})
    text = to_json(status)
    assert json.loads(text)["memory_usage"] == {"cuda:0": 1024, "cpu": 5}  # upstream: "key must be a string"
    assert from_json(BackendStatus, text) == status
    with pytest.raises(SerializationError, match="memory_usage"):
        from_json(BackendStatus, text.replace("cuda:0", "tpu:0"))


@pytest.mark.clause("BK-DATA-2", "BK-DATA-3")
@pytest.mark.parametrize("value", [CAPABILITIES, MODEST, CONFIG, MEMORY])
def test_records_survive_json(value):
    assert from_json(type(value), to_json(value)) == value
    assert json.loads(to_json(CONFIG))["backend_type"] == "CPU"


@pytest.mark.clause("BK-DATA-4")
def test_names_that_upstream_defines_twice_stay_apart():
    from ferrum_ref.interfaces import model_builder

    assert contract.BackendConfig is not engine_config.BackendConfig
    assert not hasattr(engine_config.BackendConfig, "memory_config")
    assert contract.BackendType is not engine_config.BackendType
    assert "CPU" not in engine_config.BackendType.__members__
    assert "CPU" in BackendType.__members__
    assert contract.QuantizationConfig is not models.QuantizationConfig
    assert not hasattr(contract.QuantizationConfig, "SmoothQuant")
    assert contract.TensorSpec is not model_builder.TensorSpec
    assert contract.WeightLoader is weights.WeightLoader


class Minimal(ComputeBackend):
    def name(self):
        return "minimal"

    def capabilities(self):
        return CAPABILITIES

    def tensor_ops(self):
        raise UnsupportedError("no operations")

    def tensor_factory(self):
        raise UnsupportedError("no tensors")

    async def initialize(self, device):
        return None

    def supports_device(self, device):
        return False

    def version(self):
        return "0"

    async def synchronize(self, device):
        return None

    def status(self):
        return BackendStatus(False, False, [], {}, 0, None, {})

    async def shutdown(self):
        return None


@pytest.mark.clause("BK-COMPUTE-4")
def test_default_bodies():
    backend = Minimal()
    assert backend.kernel_ops() is None
    assert backend.kernel_executor() is None
    with pytest.raises(UnsupportedError, match="'minimal' has none"):
        backend.memory_manager()


@pytest.mark.clause("BK-COMPUTE-8")
def test_a_backend_without_settings_takes_those_that_ask_for_nothing():
    backend = Minimal()
    for alignment in (1, 64):
        memory = dataclasses.replace(MEMORY, alignment=alignment)
        backend.configure(dataclasses.replace(CONFIG, memory_config=memory, optimization_level=3))
    for changes, complaint in (
        ({"enable_debug": True}, "enable_debug"),
        ({"memory_config": dataclasses.replace(MEMORY, pool_size=64)}, r"memory_config\.pool_size"),
        ({"memory_config": dataclasses.replace(MEMORY, alignment=128)}, r"memory_config\.alignment.*divisor of 64"),
    ):
        with pytest.raises(UnsupportedError, match=complaint):
            backend.configure(dataclasses.replace(CONFIG, **changes))


@pytest.mark.clause("BK-COMPUTE-7")
def test_every_holder_of_a_torch_backend_sees_its_shutdown():
    from ferrum_ref.plugins import load_backend

    mine = yours = load_backend("torch")
    asyncio.run(mine.initialize(Device.CPU))
    asyncio.run(yours.shutdown())
    assert not mine.status().is_ready
