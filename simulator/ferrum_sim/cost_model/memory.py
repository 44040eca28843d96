"""How many KV-cache blocks fit beside the weights."""

from __future__ import annotations

from ferrum_ref.errors import ResourceExhaustedError
from ferrum_sim.cost_model.hardware import HardwareSheet
from ferrum_sim.cost_model.model_sheet import ModelSheet

# What a serving engine uses of the memory, and what it keeps for activations, graphs and workspaces. With vLLM's
# default fraction, the reserve reproduces the 2588 blocks of 16 tokens that vLLM 0.19 found for Llama-3.1-8B on an
# RTX 4090 (25,250,627,584 bytes) to within one block.
MEMORY_FRACTION = 0.90
RESERVE_BYTES = 1180 * 2**20


def kv_capacity_blocks(
    model: ModelSheet,
    hardware: HardwareSheet,
    block_size: int,
    tensor_parallel: int = 1,
    memory_fraction: float = MEMORY_FRACTION,
    reserve_bytes: int = RESERVE_BYTES,
) -> int:
    """floor((fraction * memory - weights/N - reserve) / bytes of a block on one of N accelerators).  [SI-MEMORY-1]

    Each accelerator holds ceil(G/N) kv heads of every layer. Pure.
    Raises ResourceExhaustedError when the weights leave no room for one block.
    """
    heads_per_device = -(-model.num_kv_heads // tensor_parallel)
    block_bytes = model.kv_bytes_per_token // model.num_kv_heads * heads_per_device * block_size
    usable_bytes = int(memory_fraction * hardware.memory_bytes)
    free_bytes = usable_bytes - -(-model.weight_bytes // tensor_parallel) - reserve_bytes
    if free_bytes < block_bytes:
        raise ResourceExhaustedError(
            f"kv_capacity_blocks: {model.name} needs {model.weight_bytes / 1e9:.1f} GB for its weights and "
            f"{tensor_parallel} x {hardware.title} offers {tensor_parallel * usable_bytes / 1e9:.1f} GB; "
            "expected room for the KV cache: use more accelerators (--tensor-parallel) or larger ones"
        )
    return free_bytes // block_bytes
