"""What encoders share: attention within sequences, activations by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.models.encoder_ops import EncoderOps
from ferrum_ref.models.hidden_activation import hidden_activation
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType

BACKEND = make_backend()
KERNELS = BACKEND.kernel_ops()


@pytest.mark.clause("FM-ENCODER-1")
@pytest.mark.parametrize("lengths", [[4], [2, 2, 2], [3, 3, 1, 5, 5], [1, 4, 1]])
def test_rows_attend_to_their_own_sequence(lengths: list[int]) -> None:
    import torch

    heads, width = 2, 6
    qkv = np.random.default_rng(1).standard_normal((sum(lengths), 3 * width)).astype(np.float32)
    found = EncoderOps(BACKEND, "test").attend(BACKEND.tensor_factory().from_numpy(qkv), lengths, heads).to_numpy()
    start = 0
    for length in lengths:
        rows = torch.from_numpy(qkv[start : start + length]).double().reshape(length, 3, heads, width // heads)
        q, k, v = rows.permute(1, 2, 0, 3)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).permute(1, 0, 2).reshape(length, width)
        single = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
        noise = float((single.permute(1, 0, 2).reshape(length, width) - exact).abs().max())
        error = np.abs(found[start : start + length] - exact.numpy()).max()
        assert error <= 4 * max(noise, 2**-24 * float(v.abs().max()))
        start += length


class Without(KernelOps):
    """numpy's kernels without one part."""

    def __init__(self, lacking: str) -> None:
        self._lacking = lacking

    def backend_name(self) -> str:
        return "without"

    def attention_ops(self) -> Any:
        return None if self._lacking == "attention" else KERNELS.attention_ops()

    def linear_ops(self) -> Any:
        return None if self._lacking == "linear" else KERNELS.linear_ops()


@pytest.mark.clause("FM-ENCODER-2")
@pytest.mark.parametrize("lacking", ["attention", "linear"])
def test_a_backend_without_kernels_is_refused(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    monkeypatch.setattr(type(backend), "kernel_ops", lambda self: Without(lacking))
    with pytest.raises(UnsupportedError, match=f"numpy.*offers no {lacking} kernels"):
        EncoderOps(backend, "BertEncoder")


X = np.linspace(-6, 6, 241, dtype=np.float32)


@pytest.mark.clause("FM-ACT-1")
@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "swish"]
)
def test_activations_are_transformers(name: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    found = hidden_activation(name, BACKEND, DataType.FP32)(BACKEND.tensor_factory().from_numpy(X)).to_numpy()
    exact = ACT2FN[name](torch.from_numpy(X.astype(np.float64))).numpy()
    noise = np.abs(ACT2FN[name](torch.from_numpy(X)).numpy() - exact).max()
    assert np.abs(found - exact).max() <= 4 * max(noise, 2**-24 * 6)


@pytest.mark.clause("FM-ACT-1")
def test_numbers_of_the_clause() -> None:
    two = BACKEND.tensor_factory().from_numpy(np.float32([2]))
    values = {
        name: float(hidden_activation(name, BACKEND, DataType.FP32)(two).to_numpy()[0])
        for name in ("quick_gelu", "silu", "gelu_new", "gelu")
    }
    assert {name: round(value, 6) for name, value in values.items()} == {
        "quick_gelu": 1.935659,
        "silu": 1.761594,
        "gelu_new": 1.954598,
        "gelu": 1.9545,
    }


@pytest.mark.clause("FM-ACT-1")
@pytest.mark.parametrize("name", ["gelu_10", "tanh", "", "GELU"])
def test_unknown_activations_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="hidden_act: got"):
        hidden_activation(name, BACKEND, DataType.FP32)
