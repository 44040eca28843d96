"""What a model's files say, as plain data: for people through `ferrum-ref inspect`, for programs as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from ferrum_ref.models.checkpoint import Checkpoint
from ferrum_ref.models.quantized_config import QuantizationSettings

_FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class FormatShare:
    """The tensors of one element format."""

    dtype: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


def format_shares(checkpoint: Checkpoint) -> list[FormatShare]:
    """Per element format: how many tensors, parameters and bytes; the largest first.  Pure.  [MD-INSPECT-1]"""
    by_format: dict[str, list[int]] = {}
    for entry in checkpoint.tensors.values():
        counts = by_format.setdefault(entry.dtype, [0, 0, 0])
        for index, amount in enumerate((1, entry.num_elements, entry.num_bytes)):
            counts[index] += amount
    shares = [FormatShare(dtype, *counts) for dtype, counts in by_format.items()]
    return sorted(shares, key=lambda share: (-share.num_bytes, share.dtype))


def memory(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes: files, tensors as stored, weights as float32, float32 keys and values.  Pure.  [MD-INSPECT-1]"""
    config = checkpoint.config
    return {
        "file_bytes": checkpoint.num_bytes,
        "stored_weight_bytes": sum(entry.num_bytes for entry in checkpoint.tensors.values()),
        "float32_weight_bytes": checkpoint.num_parameters * _FLOAT32_BYTES,
        "float32_kv_bytes_per_token": config.kv_bytes_per_token,
        "float32_kv_bytes_full_context": config.kv_bytes_per_token * config.max_position_embeddings,
    }


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Configuration, parameters, formats and memory as JSON-ready data.  Pure.  [MD-INSPECT-1]"""
    generation = checkpoint.generation
    settings: QuantizationSettings | None = getattr(checkpoint, "quantization", None)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "config": checkpoint.config.to_dict(),
        "generation": {
            "eos_token_ids": list(generation.eos_token_ids),
            "bos_token_id": generation.bos_token_id,
            "pad_token_id": generation.pad_token_id,
        },
        "quantization": None if settings is None else asdict(settings),
        "num_tensors": len(checkpoint.tensors),
        "num_parameters": checkpoint.num_parameters,
        "formats": [
            {
                "dtype": share.dtype,
                "num_tensors": share.num_tensors,
                "num_parameters": share.num_parameters,
                "num_bytes": share.num_bytes,
            }
            for share in format_shares(checkpoint)
        ],
        "memory": memory(checkpoint),
    }
