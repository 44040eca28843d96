"""Convolutions over time, against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import ShapeError
from ferrum_ref.models.audio import convolution
from ferrum_ref.models.audio.convolution import ConvolutionOps, same_padding
from ferrum_ref.numpy_backend import make_backend

OPS = ConvolutionOps(make_backend("cpu"), "test")


def random(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(values: Any) -> torch.Tensor:
    return torch.from_numpy(values).double()


def bound(weight: Any, x: Any, terms: int) -> float:
    """gamma of a sum of that many products, of the largest sum of their sizes that can be."""
    return float((terms + 4) * 2**-24 * np.abs(weight).max() * np.abs(x).max() * terms)


SMALL = st.integers(1, 6)


@pytest.mark.clause("FM-CONV-1")
@given(
    length=st.integers(1, 40), width=SMALL, out=SMALL, taps=st.integers(1, 7), dilation=st.integers(1, 4),
    stride=st.integers(1, 4), before=st.integers(0, 9), behind=st.integers(0, 9), has_bias=st.booleans(),
    block=st.sampled_from([1, 50, 1 << 20]),
)  # fmt: skip
def test_convolve(
    length: int, width: int, out: int, taps: int, dilation: int, stride: int, before: int, behind: int, has_bias: bool,
    block: int,
) -> None:  # fmt: skip
    x, weight, bias = random(length, length, width), random(taps, out, width, taps), random(7, out)
    part = OPS.read(
        weight, bias if has_bias else None, dilation=dilation, stride=stride, padding=(before, behind)
    )  # fmt: skip
    whole = length + before + behind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_BLOCK_ELEMENTS", block)
        if whole <= dilation * (taps - 1):
            with pytest.raises(ShapeError, match="moments"):
                OPS.convolve(OPS.rows(x), part)
            return
        found = OPS.convolve(OPS.rows(x), part).to_numpy()
    padded = torch.nn.functional.pad(double(x).T[None], (before, behind))
    offset = double(bias) if has_bias else None
    expected = torch.nn.functional.conv1d(padded, double(weight), offset, stride=stride, dilation=dilation)[0].T.numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= bound(weight, x, taps * width) + 2**-23 * np.abs(bias).max()


@pytest.mark.clause("FM-CONV-2")
def test_inputs_that_are_refused() -> None:
    part = OPS.read(random(0, 2, 3, 5), None, dilation=2, padding=(1, 1))
    with pytest.raises(ShapeError, match="expected 3 channels and at least 7 moments"):
        OPS.convolve(OPS.rows(random(1, 9, 4)), part)
    with pytest.raises(ShapeError, match="expected 3 channels and at least 7 moments"):
        OPS.convolve(OPS.rows(random(1, 6, 3)), part)
    assert OPS.convolve(OPS.rows(random(1, 7, 3)), part).shape() == (1, 2)


@pytest.mark.clause("FM-CONV-3")
@given(length=st.integers(1, 30), width=SMALL, half=st.integers(0, 3), dilation=st.integers(1, 9))
def test_depthwise(length: int, width: int, half: int, dilation: int) -> None:
    taps = 2 * half + 1
    x, weight, bias = random(1, length, width), random(2, width, 1, taps), random(3, width)
    found = OPS.depthwise(OPS.rows(x), OPS.read_depthwise(weight, bias, dilation)).to_numpy()
    expected = torch.nn.functional.conv1d(
        double(x).T[None], double(weight), double(bias), padding=half * dilation, dilation=dilation, groups=width
    )[0].T.numpy()
    assert found.shape == (length, width)
    assert np.abs(found - expected).max() <= bound(weight, x, taps) + 2**-22 * taps * np.abs(bias).max()


@pytest.mark.clause("FM-CONV-4")
@given(
    length=st.integers(1, 12), width=SMALL, out=SMALL, stride=st.integers(1, 6), more=st.integers(0, 4), data=st.data()
)
def test_upsample(length: int, width: int, out: int, stride: int, more: int, data: st.DataObject) -> None:
    taps = stride + more
    padding = data.draw(st.integers(0, (taps - 1) // 2 if length == 1 else more))
    x, weight, bias = random(1, length, width), random(2, width, out, taps), random(3, out)
    found = OPS.upsample(OPS.rows(x), OPS.read_upsampling(weight, bias, stride, padding)).to_numpy()
    expected = torch.nn.functional.conv_transpose1d(
        double(x).T[None], double(weight), double(bias), stride=stride, padding=padding
    )[0].T.numpy()
    assert found.shape == expected.shape
    terms = width * -(-taps // stride)
    assert np.abs(found - expected).max() <= bound(weight, x, terms) + 2**-23 * np.abs(bias).max()


@pytest.mark.clause("FM-CONV-5")
def test_leaky_relu() -> None:
    x, slope = random(0, 50, 3), np.array([0.1], np.float32)
    found = OPS.leaky_relu(OPS.rows(x), OPS.rows(slope)).to_numpy()
    np.testing.assert_array_equal(found, torch.nn.functional.leaky_relu(torch.from_numpy(x), float(slope[0])).numpy())


@pytest.mark.clause("FM-CONV-3")
def test_same_padding() -> None:
    assert [same_padding(taps, dilation) for taps, dilation in ((1, 9), (3, 1), (3, 4), (4, 1), (2, 1))] == [
        (0, 0), (1, 1), (4, 4), (1, 2), (0, 1),
    ]  # fmt: skip
