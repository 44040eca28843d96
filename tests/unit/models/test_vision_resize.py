"""Fitting pictures: against torch's antialiased bicubic in float64, pass by pass, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ferrum_ref.errors import InvalidParameterError, ModelError
from ferrum_ref.models.vision_resize import fit_image, resize_bicubic


def torch_pass(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float64]:
    """One pass of torch's filter in float64, as a byte before it is rounded."""
    import torch

    values = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float64))
    found = torch.nn.functional.interpolate(values, size=(height, width), mode="bicubic", antialias=True)
    return np.clip(found[0].numpy().transpose(1, 2, 0), 0, 255)


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.clause("FM-RESIZE-2")
@pytest.mark.parametrize("sizes", [(37, 24), (24, 37), (10, 3), (7, 30), (64, 16), (336, 14), (5, 1), (1, 6)])
def test_each_pass_is_the_filter_rounded_once(sizes: tuple[int, int]) -> None:
    old, new = sizes
    # rounding of the weights: half of 2**-22 of at most 4 * max(old / new, 1) + 1 bytes of 255
    slack = 0.5 + 255 * 2**-23 * (4 * max(old / new, 1) + 2)
    image = noise(old, 6)
    assert np.abs(resize_bicubic(image, new, 6) - torch_pass(image, new, 6)).max() <= slack
    image = noise(6, old)
    assert np.abs(resize_bicubic(image, 6, new) - torch_pass(image, 6, new)).max() <= slack


@pytest.mark.clause("FM-RESIZE-2")
def test_across_first_then_down() -> None:
    image = noise(11, 9)
    across = resize_bicubic(image, 20, 9)
    assert np.array_equal(resize_bicubic(image, 20, 17), resize_bicubic(across, 20, 17))
    assert np.array_equal(resize_bicubic(image, 11, 9), image)


@pytest.mark.clause("FM-RESIZE-2")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255))
def test_one_colour_stays(old: int, new: int, value: int) -> None:
    image = np.full((old, 2, 3), value, dtype=np.uint8)
    assert (resize_bicubic(image, 2, new) == value).all()


@pytest.mark.clause("FM-RESIZE-1")
def test_shorter_side_then_the_middle() -> None:
    wide = noise(640, 480, 1)
    found = np.frombuffer(fit_image(wide.tobytes(), 640, 480, 336), dtype=np.uint8).reshape(336, 336, 3)
    assert np.array_equal(found, resize_bicubic(wide, 448, 336)[:, 56:392])
    tall = noise(5, 12, 2)  # 12 * 4 // 5 = 9 rows, two above and three below the middle four
    found = np.frombuffer(fit_image(tall.tobytes(), 5, 12, 4), dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(found, resize_bicubic(tall, 4, 9)[2:6])
    square = noise(8, 8, 3)
    assert fit_image(square.tobytes(), 8, 8, 8) == square.tobytes()


@pytest.mark.clause("FM-RESIZE-1")
def test_a_circle_stays_a_circle() -> None:
    rows, columns = np.mgrid[:120, :200]
    disc = ((rows - 59.5) ** 2 + (columns - 99.5) ** 2 < 50**2) * np.uint8(255)
    image = np.repeat(disc[:, :, None], 3, axis=2).astype(np.uint8)
    found = np.frombuffer(fit_image(image.tobytes(), 200, 120, 60), dtype=np.uint8).reshape(60, 60, 3)[:, :, 0] > 127
    assert abs(int(found[30].sum()) - int(found[:, 30].sum())) <= 1
    assert 49 <= found[30].sum() <= 51


@pytest.mark.clause("FM-RESIZE-3")
def test_refusals() -> None:
    for sides in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(InvalidParameterError, match="sides of 1 or more"):
            fit_image(b"", *sides)
    with pytest.raises(ModelError, match="11 bytes for 2 x 2, expected 12"):
        fit_image(bytes(11), 2, 2, 1)
