"""What the backend says about its own arithmetic, and that it follows torch's switches without touching them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ferrum_torch import kernel_ops as module

from ferrum_ref.types.algorithm import Algorithm

OPERATIONS = (
    "rms_norm",
    "rms_norm_residual",
    "rotary_embedding",
    "silu_mul",
    "softmax",
    "layer_norm",
    "add",
    "embedding",
)


@pytest.mark.clause("BK-TORCH-19")
def test_plain_float32_by_default(kernels: Any) -> None:
    for operation in (*OPERATIONS, *module.MATRIX_PRODUCTS):
        declared = kernels.declared_algorithm(operation)
        assert declared == Algorithm()
        assert not declared.rounds_probabilities
        assert not declared.rounds_residual
    assert kernels.declared_algorithm("gelu").accumulate == "fp64"


@pytest.mark.clause("BK-TORCH-19")
@pytest.mark.parametrize(
    ("setting", "declared"), [("ieee", "fp32"), ("tf32", "tf32"), ("bf16", "bf16"), ("none", "fp32")]
)
def test_matrix_products_follow_torchs_switch(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, setting: str, declared: str
) -> None:
    switch = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=setting))
    monkeypatch.setattr(module, "torch", SimpleNamespace(backends=SimpleNamespace(mkldnn=switch)))
    assert kernels.declared_algorithm("linear").accumulate == declared
    assert kernels.declared_algorithm("attention").accumulate == declared
    assert kernels.declared_algorithm("rms_norm").accumulate == "fp32"


@pytest.mark.clause("BK-TORCH-19")
def test_torch_has_the_switch_that_is_read() -> None:
    assert torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none", "tf32", "bf16")
    assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none", "tf32")
