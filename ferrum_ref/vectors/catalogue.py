"""The committed set: specs/vectors/.   Clauses: GV-SET-1..3.

Cases that one kernel bug each has been seen to pass: a random one says that the operation is there at all, the others
why it is right. Small enough that the whole set stays below a megabyte.
"""

from __future__ import annotations

from typing import Final

from ferrum_ref.vectors.catalogue_attention import ATTENTION
from ferrum_ref.vectors.selection import ALL, BF16, BOTH, FP16, FP32, Group, Pick

QLINEAR: Final = ("KN-QLINEAR-1",)
K: Final = ("QT-K-1", "QT-MATRIX-3")


def _packed(name: str, form: str, lost_terms: int, clauses: tuple[str, ...], storages: tuple[str, ...]) -> Group:
    """The cases of a packed form; lost_terms: the number of that case in its list. Pure."""
    picks = (
        Pick(0, FP32),
        Pick(2, storages),
        Pick(3, BF16, ("order of the codes", "zero point")),
        Pick(7, FP32, (), ("KN-QLINEAR-2",)),
        Pick(8, FP32, (), ("KN-QLINEAR-2",)),
        Pick(10, BOTH),
        Pick(lost_terms, FP32, ("small terms after a large one",)),
    )
    return Group(f"quantized_linear_{name}", f"y = x @ W.T; W (N, K) is uint8, {form}", clauses, picks)


NORMS: Final = (
    Group(
        "rms_norm",
        "y = x / sqrt(mean(x^2) + eps) * weight over the last axis",
        ("KN-RMSNORM-1",),
        (
            Pick(1, ALL),
            Pick(2, ALL, ("eps decides",), ("KN-RMSNORM-2",)),
            Pick(3, BOTH),
            Pick(7, FP32, ("width off every tile",)),
            Pick(11, FP32, ("eps decides",), ("KN-RMSNORM-2",)),
            Pick(13, BOTH),
            Pick(14, FP32, (), ("KN-RMSNORM-2",)),
            Pick(16, FP32, ("empty",), ("KN-RMSNORM-4",)),
            Pick(24, FP32, ("one row is NaN",)),
        ),
    ),
    Group(
        "rms_norm_residual",
        "residual = x + residual; y = rms_norm of that sum before it is rounded; both are outputs",
        ("KN-RMSNORM-5", "KN-RMSNORM-6"),
        (
            Pick(1, BF16, ("D-16",)),
            Pick(2, ALL, ("D-16", "cancellation")),
            Pick(6, FP32, ("D-16", "eps decides")),
            Pick(10, FP32, ("empty",)),
        ),
    ),
    Group(
        "layer_norm",
        "y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last axis; no bias input: 0",
        ("KN-LAYERNORM-1",),
        (
            Pick(1, ALL),
            Pick(2, FP32, ("eps decides",)),
            Pick(3, BOTH, ("cancellation",), ("KN-LAYERNORM-2",)),
            Pick(7, FP32),
            Pick(10, BF16, ("no bias",)),
            Pick(12, ALL, ("cancellation", "two passes"), ("KN-LAYERNORM-2",)),
        ),
    ),
)
POSITIONS: Final = (
    Group(
        "rotary_embedding",
        "x (B, T, H, D), rows p = positions[t] of cos and sin (P, D/2): "
        "(x[i], x[i + D/2]) -> (x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s)",
        ("KN-ROPE-1", "KN-ROPE-5"),
        (
            Pick(0, FP16),
            Pick(2, ALL),
            Pick(8, BF16, ("D-15", "tables in fp32"), ("KN-ROPE-2",)),
            Pick(10, FP32, ("D-15",), ("KN-ROPE-2",)),
        ),
    ),
)
ACTIVATIONS: Final = (
    Group(
        "silu_mul",
        "y = gate / (1 + exp(-gate)) * up",
        ("KN-SILU-1",),
        (
            Pick(0, ALL),
            Pick(1, BOTH),
            Pick(2, FP32, (), ("KN-SILU-2",)),
            Pick(6, BOTH),
            Pick(9, FP32, ("empty",)),
            Pick(12, BOTH, ("no overflow of exp(-x)",), ("KN-SILU-2",)),
            Pick(17, FP32, (), ("KN-SILU-2",)),
        ),
    ),
    Group(
        "gelu",
        "y = x / 2 (1 + erf(x / sqrt(2)))",
        ("KN-GELU-1",),
        (
            Pick(0, FP32),
            Pick(1, ALL, ("D-14",)),
            Pick(3, FP32),
            Pick(12, BOTH, ("cancellation of 1 + erf",), ("KN-GELU-3",)),
            Pick(17, FP32, (), ("KN-GELU-3",)),
        ),
    ),
    Group(
        "gelu_tanh",
        "y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))",
        ("KN-GELU-2",),
        (Pick(1, BOTH, ("D-14",)), Pick(12, FP32, ("cancellation of 1 + tanh",), ("KN-GELU-3",))),
    ),
    Group(
        "softmax",
        "p = exp(x - max) / sum(exp(x - max)) along `axis`; a lane of -inf only is NaN",
        ("KN-SOFTMAX-1",),
        (
            Pick(0, FP32),
            Pick(2, ALL),
            Pick(3, BOTH, ("maximum taken off",)),
            Pick(4, FP32, ("-inf has probability 0",)),
            Pick(6, FP32, ("axis in the middle",)),
            Pick(8, FP32),
            Pick(10, FP32, ("NaN lane",), ("KN-SOFTMAX-2",)),
            Pick(15, FP32),
            Pick(18, FP32, ("maximum taken off",)),
            Pick(19, FP32, ("NaN lane",), ("KN-SOFTMAX-2",)),
        ),
    ),
)
PRODUCTS: Final = (
    Group(
        "linear",
        "y = x @ weight.T; x (..., K), weight (N, K)",
        ("KN-LINEAR-1",),
        (
            Pick(0, ALL),
            Pick(2, ALL),
            Pick(3, FP32),
            Pick(7, FP32, ("D-51", "rank 3")),
            Pick(8, FP32, ("rank 1",)),
            Pick(10, BOTH, ("cancellation",)),
            Pick(14, FP32, ("empty sum",), ("KN-LINEAR-2",)),
            Pick(21, FP32, ("small terms after a large one",)),
            Pick(27, FP32, ("one row is NaN",)),
        ),
    ),
    _packed(
        "q4_0", "18 bytes for 32: float16 d, 16 bytes, low nibbles 0..15, high 16..31; (q - 8) d", 19, QLINEAR, BOTH
    ),
    _packed("q8_0", "34 bytes for 32: float16 d, 32 int8; q d", 19, QLINEAR, BOTH),
    _packed(
        "q4_k",
        "144 bytes for 256, ggml's: float16 d and dmin, 12 bytes of 6-bit scales and minima, nibbles",
        14,
        K,
        BF16,
    ),
)
CHOICES: Final = (
    Group(
        "embedding",
        "y = table[ids], bit for bit; rows that nobody asks for hold NaN",
        ("KN-EMBED-1",),
        (Pick(0, FP32), Pick(1, FP16), Pick(3, ALL)),
    ),
    Group(
        "argmax",
        "index of the first maximum of logits (V,) or (1, V)",
        ("KN-ARGMAX-1",),
        (
            Pick(0, ALL, ("D-03",)),
            Pick(3, FP32, ("D-03",)),
            Pick(4, FP32),
            Pick(6, ALL, ("one unit in the last place",)),
            Pick(7, FP32),
            Pick(11, FP32, ("D-03", "-0 equals 0")),
            Pick(12, FP32),
            Pick(13, BOTH, ("D-03",)),
        ),
    ),
)
GROUPS: Final[tuple[Group, ...]] = (*NORMS, *POSITIONS, *ATTENTION, *ACTIVATIONS, *PRODUCTS, *CHOICES)
