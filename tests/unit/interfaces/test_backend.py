"""Capabilities and the default bodies of ComputeBackend."""

from __future__ import annotations

import dataclasses

import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import BackendCapabilities, BackendRequirements, BackendStatus, ComputeBackend
from ferrum_ref.types.devices import DataType, Device

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
    extra_capabilities={"compute": 9.0, "nothing": None},
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


@pytest.mark.clause("BK-CAPS-1")
def test_devices_dtypes_and_sizes():
    assert CAPABILITIES.meets_requirements(MODEST)
    for changes in (
        {"required_devices": [Device.CPU, Device.cuda(1)]},
        {"required_dtypes": [DataType.BF16, DataType.FP16]},
        {"min_batch_size": 17},
        {"min_sequence_length": 4097},
    ):
        assert not CAPABILITIES.meets_requirements(dataclasses.replace(MODEST, **changes))


@pytest.mark.clause("BK-CAPS-2")
def test_flags_and_extras_count():
    paged = dataclasses.replace(MODEST, requires_paged_attention=True)
    assert not CAPABILITIES.meets_requirements(paged)  # upstream: met
    assert dataclasses.replace(CAPABILITIES, supports_paged_attention=True).meets_requirements(paged)
    assert not dataclasses.replace(CAPABILITIES, supports_flash_attention=False).meets_requirements(MODEST)
    for extra in ({"compute": 8}, {"compute": 9, "other": None}, {"nothing": 0}):
        assert not CAPABILITIES.meets_requirements(dataclasses.replace(MODEST, extra_requirements=extra))


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
