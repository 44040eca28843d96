"""Two packings of the same 4-bit weights (D-54)."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import BackendError, InvalidParameterError
from ferrum_ref.kernels.repack import q4_0_from_metal, q4_0_to_metal


def metal_values(block: bytes) -> list[float]:
    """What the Metal kernel reads, element by element."""
    (scale,) = struct.unpack("<f", block[:4])
    return [scale * ((block[4 + i // 2] >> (4 if i % 2 else 0)) % 16 - 8) for i in range(32)]


def ggml_values(packed) -> list[float]:
    return gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0).reshape(-1).tolist()


@pytest.mark.clause("KN-REPACK-1")
def test_the_block_of_the_clause():
    ggml = np.frombuffer(struct.pack("<e", 1) + bytes(i | 0xF0 for i in range(16)), np.uint8)
    metal = q4_0_to_metal(ggml)
    assert metal.tobytes()[:6] == struct.pack("<f", 1) + b"\x10\x32"
    quanta = [*range(16), *[15] * 16]
    assert metal_values(metal.tobytes()) == [q - 8 for q in quanta] == ggml_values(ggml)
    as_if = struct.pack("<f", 1) + ggml.tobytes()[2:]  # ggml's nibbles read in Metal's order
    assert metal_values(as_if) != ggml_values(ggml)


@pytest.mark.clause("KN-REPACK-1")
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1,), (2, 3), (4, 1, 2), (0, 2)]))
def test_the_numbers_stay_and_one_undoes_the_other(seed, shape):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, 18), dtype=np.uint8)
    blocks[..., :2] = rng.standard_normal(shape).astype("<f2")[..., None].view(np.uint8)
    ggml = blocks.reshape(*shape[:-1], shape[-1] * 18)
    before = ggml.copy()
    metal = q4_0_to_metal(ggml)
    assert metal.shape == (*shape[:-1], shape[-1] * 20)
    flat = metal.reshape(-1, 20)
    assert [v for block in flat for v in metal_values(block.tobytes())] == (ggml_values(ggml) if ggml.size else [])
    assert (q4_0_from_metal(metal) == ggml).all()
    assert (ggml == before).all()
    assert (q4_0_from_metal(np.asfortranarray(metal)) == ggml).all()


@pytest.mark.clause("KN-REPACK-2")
def test_refusals():
    for scale in (0.1, 1e9, float("nan"), 2.0**-30):
        block = np.frombuffer(struct.pack("<f", scale) + bytes(16), np.uint8)
        with pytest.raises(InvalidParameterError, match="float16 holds exactly"):
            q4_0_from_metal(block)
    for bad in (np.zeros(19, np.uint8), np.zeros(20, np.int8), np.uint8(0).reshape(())):
        with pytest.raises(BackendError, match="q4_0_from_metal"):
            q4_0_from_metal(bad)
    for bad in (np.zeros(20, np.uint8), np.zeros(18, np.int8)):
        with pytest.raises(BackendError, match="q4_0_to_metal"):
            q4_0_to_metal(bad)
