"""Rotary tables against the formula in float64 and against transformers' own tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.models.decoder_rope import rope_tables

UNIT = 2.0**-24


@pytest.mark.clause("LM-ROPE-1")
@given(half=st.integers(1, 128), theta=st.floats(1.5, 1e7), num_positions=st.integers(1, 300), row=st.integers(0, 299))
def test_angles_stay_within_their_bound(half: int, theta: float, num_positions: int, row: int) -> None:
    cos, sin = rope_tables(2 * half, num_positions, theta)
    assert cos.shape == sin.shape == (num_positions, half)
    assert cos.dtype == sin.dtype == np.float32
    position = row % num_positions
    exact = position * theta ** (-np.arange(0, 2 * half, 2) / (2 * half))
    bound = exact * (3 + math.log(theta)) * UNIT * (1 + 1e-6) + UNIT
    assert (np.abs(cos[position] - np.cos(exact)) <= bound).all()
    assert (np.abs(sin[position] - np.sin(exact)) <= bound).all()


@pytest.mark.clause("LM-ROPE-1")
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
def test_same_tables_as_transformers(head_dim: int, theta: float) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    num_positions = 4096
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=num_positions,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    rope = LlamaRotaryEmbedding(config)
    expected = rope(torch.zeros(1), torch.arange(num_positions)[None])
    ours = rope_tables(head_dim, num_positions, theta)
    # float32 pow differs between libraries in its last bit now and then; that bit is multiplied by the position.
    last_bit = np.arange(num_positions)[:, None] * rope.inv_freq.numpy() * 2 * UNIT
    same_angles = 0
    for table, other in zip(ours, expected, strict=True):
        difference = np.abs(table - other[0, :, : head_dim // 2].numpy())
        assert (difference <= last_bit + 2 * UNIT).all()
        same_angles += int((difference.max(axis=0) <= 2 * UNIT).sum())
    assert same_angles >= 0.9 * head_dim


@pytest.mark.clause("LM-ROPE-2")
@pytest.mark.parametrize(
    ("head_dim", "max_tokens", "theta"), [(0, 4, 1e4), (3, 4, 1e4), (4, 0, 1e4), (4, 4, 0.0), (4, 4, float("nan"))]
)
def test_impossible_tables_are_refused(head_dim: int, max_tokens: int, theta: float) -> None:
    with pytest.raises(InvalidParameterError, match="rope_tables"):
        rope_tables(head_dim, max_tokens, theta)
