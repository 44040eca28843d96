"""Splines backwards: against transformers', and against the forward formula of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.vits.modeling_vits import _unconstrained_rational_quadratic_spline

from ferrum_ref.models.vits_spline import inverse_spline


def raw(seed: int, count: int, bins: int, scale: float = 1.5) -> Any:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, width)) * scale for width in (bins, bins, bins - 1)]


def forward(x: Any, widths: Any, heights: Any, slopes: Any, bound: float) -> Any:
    """transformers' own spline, forwards."""
    tensors = [torch.from_numpy(each)[None, None] for each in (widths, heights, slopes)]
    found, _ = _unconstrained_rational_quadratic_spline(
        torch.from_numpy(x)[None, None], *tensors, reverse=False, tail_bound=bound
    )
    return found[0, 0].numpy()


@pytest.mark.clause("FM-VITS-7")
@given(st.integers(0, 999), st.integers(1, 12), st.sampled_from([0.5, 5.0, 20.0]))
def test_forward_gives_it_back(seed: int, bins: int, bound: float) -> None:
    y = np.random.default_rng(seed).uniform(-1.2 * bound, 1.2 * bound, 50)
    parts = raw(seed, 50, bins)
    x = inverse_spline(y, *parts, bound)
    outside = np.abs(y) > bound
    np.testing.assert_array_equal(x[outside], y[outside])
    assert (np.abs(x[~outside]) <= bound * (1 + 1e-12)).all()
    assert np.abs(forward(x, *parts, bound) - y).max() <= 1e-9 * 2 * bound


@pytest.mark.clause("FM-VITS-7")
@pytest.mark.parametrize("bins", [2, 10])
def test_as_transformers_backwards(bins: int) -> None:
    y = np.linspace(-6, 6, 401)
    parts = raw(3, 401, bins)
    tensors = [torch.from_numpy(each)[None, None] for each in parts]
    expected, _ = _unconstrained_rational_quadratic_spline(
        torch.from_numpy(y)[None, None], *tensors, reverse=True, tail_bound=5.0
    )
    # transformers moves the last knot by 1e-6, so that the end itself falls into the last bin
    assert np.abs(inverse_spline(y, *parts, 5.0) - expected[0, 0].numpy()).max() < 1e-9


@pytest.mark.clause("FM-VITS-7")
def test_ends_and_order() -> None:
    widths, heights, slopes = (np.repeat(each, 1001, 0) for each in raw(7, 1, 8))
    y = np.linspace(-5, 5, 1001)
    x = inverse_spline(y, widths, heights, slopes, 5.0)
    assert (np.diff(x) > 0).all()
    assert abs(x[0] + 5) < 1e-12
    assert abs(x[-1] - 5) < 1e-12
    assert inverse_spline(np.array([7.0]), *(each[:1] for each in (widths, heights, slopes)), 5.0).tolist() == [7.0]


@pytest.mark.clause("FM-VITS-7")
def test_extreme_parameters_stay_finite() -> None:
    parts = raw(1, 200, 6, scale=300.0)
    y = np.linspace(-5, 5, 200)
    x = inverse_spline(y, *parts, 5.0)
    assert np.isfinite(x).all()
    assert (np.abs(x) <= 5 * (1 + 1e-9)).all()
