"""Attention by torch's scaled_dot_product_attention, where what that computes is what the backend then declares.

Which of its kernels torch takes depends on the device, the types and the shapes; all that the cases below can meet keep
scores, maximum and sums in float32. What else they do, `declared` says. On the CPU: blocks of 512 keys, an exponential
that torch calls good to 20 ulp, 16-bit probabilities where V is 16-bit. On a GPU: blocks of 32 keys or more, the
hardware's exp2, 16-bit probabilities; not float32, for which a kernel may take TF32.
Clauses: BK-TORCH-36..37 (specs/backend_torch.md).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ferrum_ref.interfaces.kernel_ops import AttentionParams
from ferrum_ref.types.algorithm import Algorithm

HALVES = frozenset({torch.float16, torch.bfloat16})
MOST_MASK_ELEMENTS = 1 << 24  # of a mask that has to be written out: 32 MB in 16 bits


def declared(plain: Algorithm, on_gpu: bool) -> Algorithm:
    """How attention is computed with fused kernels, `plain` being how without. Pure.  [BK-TORCH-37]"""
    if on_gpu:
        return replace(plain, rounds_probabilities=True, key_block=32, exponent_roundings=3)
    return replace(plain, rounds_probabilities=True, key_block=512, exp_ulp=20.0)


def is_covered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None
) -> bool:
    """True where the fused kernels mean what `attention` means, as declared. Pure.  [BK-TORCH-36]

    q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv). No sinks, no cap; one type, 16-bit or, on the CPU, float32; Dv = D;
    every row sees a key; a mask that must be written out is of moderate size.
    """
    num_rows, num_keys = q.shape[1], k.shape[1]
    if sinks is not None or params.logit_softcap or not (q.numel() and k.numel()) or v.shape[3] != q.shape[3]:
        return False
    if not (q.dtype is k.dtype is v.dtype) or not (q.dtype in HALVES or (q.is_cpu and q.dtype is torch.float32)):
        return False
    if params.causal and num_rows > num_keys:
        return False
    return not _needs_mask(num_rows, num_keys, params) or num_rows * num_keys <= MOST_MASK_ELEMENTS


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """As `attention.attention`, for covered operands: (B, T, H, D) in q's type. Pure.  [BK-TORCH-36]"""
    num_rows, num_keys, num_heads, num_groups = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if num_rows == 1 and params.causal and params.sliding_window:
        first = max(0, num_keys - params.sliding_window)  # one row's window is a slice
        k, v = k[:, first:], v[:, first:]
    queries, keys, values = (_heads_first(data) for data in (q, k, v))
    if num_rows == 1:  # the heads of a group as its rows: every kernel takes that, and K and V are read once
        queries = queries.reshape(q.shape[0], num_groups, num_heads // num_groups, q.shape[3])
    mask = _mask(num_rows, num_keys, params, q.device) if _needs_mask(num_rows, num_keys, params) else None
    mixed = torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=params.causal and mask is None and num_rows > 1,
        scale=params.softmax_scale,
        enable_gqa=num_rows > 1 and num_heads != num_groups,
    )
    return mixed.reshape(q.shape) if num_rows == 1 else mixed.transpose(1, 2)


def _heads_first(data: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) as (B, H, T, D) whose last axis is a run: others go to a kernel that rounds once more."""
    return (data if data.stride(3) == 1 else data.contiguous()).transpose(1, 2)


def _needs_mask(num_rows: int, num_keys: int, params: AttentionParams) -> bool:
    """True unless "all keys", "the lower triangle of a square" or a slice says which keys a row sees. Pure."""
    if not params.causal or num_rows == 1:
        return False
    return num_rows != num_keys or 0 < params.sliding_window < num_keys


def _mask(num_rows: int, num_keys: int, params: AttentionParams, device: torch.device) -> torch.Tensor:
    """True where row t, at position S - T + t, sees key j: (T, S). Pure."""
    own = torch.arange(num_keys - num_rows, num_keys, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    visible = keys <= own
    return visible & (keys > own - params.sliding_window) if params.sliding_window else visible
