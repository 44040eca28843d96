"""Data sheets of accelerators. Every figure has its source beside it.  [SI-HARDWARE-1]"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ferrum_ref.errors import NotFoundError

MIB = 2**20


@dataclass(frozen=True, slots=True)
class HardwareSheet:
    """One accelerator: dense bf16 peak (no sparsity), memory bandwidth, memory, link to its peers in one direction.

    `compute_efficiency` and `memory_efficiency` are the fractions of the two peaks that large matrix products and long
    reads reach. They are measured where `efficiency_source` says so and otherwise assumed.
    """

    name: str
    title: str
    peak_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float
    compute_efficiency: float = 0.70
    memory_efficiency: float = 0.80
    efficiency_source: str = "assumed"


_SHEETS = (
    HardwareSheet(
        "a100-80g",
        "NVIDIA A100 80GB SXM",
        # NVIDIA A100 Tensor Core GPU datasheet (June 2021), SXM column: BF16 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s
        # (both directions together).
        312e12,
        2039e9,
        81920 * MIB,  # "80GB HBM2e"; total reported by the driver
        300e9,
    ),
    HardwareSheet(
        "h100",
        "NVIDIA H100 80GB SXM",
        # NVIDIA H100 Tensor Core GPU datasheet, SXM column: BF16 1,979 TFLOPS with sparsity = 989.5 dense, 3.35 TB/s,
        # NVLink 900 GB/s (both directions together).
        989.5e12,
        3350e9,
        81559 * MIB,  # "80GB"; total reported by the driver
        450e9,
    ),
    HardwareSheet(
        "h200",
        "NVIDIA H200 141GB SXM",
        # NVIDIA H200 Tensor Core GPU datasheet: BF16 1,979 TFLOPS with sparsity = 989.5 dense, 4.8 TB/s,
        # NVLink 900 GB/s (both directions together).
        989.5e12,
        4800e9,
        143771 * MIB,  # "141GB"; total reported by the driver
        450e9,
    ),
    HardwareSheet(
        "l4",
        "NVIDIA L4 24GB",
        # NVIDIA L4 datasheet: BF16 242 TFLOPS with sparsity = 121 dense, 300 GB/s, PCIe Gen4 x16 64 GB/s
        # (both directions together).
        121e12,
        300e9,
        23034 * MIB,  # "24GB"; total reported by the driver
        32e9,
    ),
    HardwareSheet(
        "rtx4090",
        "NVIDIA GeForce RTX 4090 24GB",
        # NVIDIA Ada GPU architecture whitepaper v2.02, table 2: BF16 with FP32 accumulate 165.2 dense, 1,008 GB/s;
        # PCIe Gen4 x16, 64 GB/s both directions.
        165.2e12,
        1008e9,
        25250627584,  # total_memory reported by CUDA
        32e9,
        # Operator times measured under vLLM 0.19 (LLMServingSim 2, CASYS Lab, KAIST): matrix products of 512 to
        # 2048 tokens reach 0.94 to 0.96 of the peak, reads of the weights 0.91 and of long contexts 0.80 to 0.90 of
        # the bandwidth.
        compute_efficiency=0.92,
        memory_efficiency=0.88,
        efficiency_source="measured",
    ),
)
HARDWARE: Mapping[str, HardwareSheet] = MappingProxyType({sheet.name: sheet for sheet in _SHEETS})


def find_hardware(name: str) -> HardwareSheet:
    """The sheet called `name`. Raises NotFoundError listing the known ones. Pure.  [SI-HARDWARE-1]"""
    sheet = HARDWARE.get(name.lower())
    if sheet is None:
        raise NotFoundError(f"find_hardware: no sheet named '{name}'; expected one of {', '.join(HARDWARE)}")
    return sheet
