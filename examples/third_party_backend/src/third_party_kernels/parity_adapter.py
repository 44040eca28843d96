"""What ferrum-ref's judge is told: which function is which operation, and how it computes."""

from __future__ import annotations

from third_party_kernels.kernels import linear, rms_norm, rms_norm_with_a_bug, silu_mul

kernels = {"rms_norm": rms_norm, "silu_mul": silu_mul, "linear": linear}
with_a_bug = {**kernels, "rms_norm": rms_norm_with_a_bug}
