"""Masks, positions and ids: what a row's real tokens are and where they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.errors import InvalidParameterError, ModelError, ShapeError
from ferrum_ref.executor.inputs import check_positions, decode_rows, prefill_rows
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput
from ferrum_ref.numpy_backend import make_backend

FACTORY = make_backend().tensor_factory()


def ids(values: Any, dtype: Any = np.uint32) -> Any:
    return FACTORY.from_numpy(np.asarray(values, dtype=dtype))


@pytest.mark.clause("MX-INPUT-3", "MX-INPUT-4")
@given(data=st.data())
def test_rows_are_what_the_mask_leaves(data: st.DataObject) -> None:
    """Random rows of random lengths, padded on either side with arbitrary ids and positions."""
    batch, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values, mask, positions = rng.integers(0, 50, (3, batch, width))
    mask[:] = 0
    expected = []
    for row in range(batch):
        length = int(rng.integers(1, width + 1))
        start, past = int(rng.integers(0, width - length + 1)), int(rng.integers(0, 20))
        mask[row, start : start + length] = 1
        positions[row, start : start + length] = np.arange(past, past + length)
        expected.append((values[row, start : start + length].tolist(), list(range(past, past + length)), start))
    request = PrefillInput.new(ids(values)).with_attention_mask(ids(mask)).with_position_ids(ids(positions))
    found = prefill_rows(request)
    assert (len(found), found.num_columns) == (batch, width)
    assert found.positions is not None
    got = zip(found.tokens, found.positions, [columns.start for columns in found.columns], strict=True)
    assert list(got) == expected


@pytest.mark.clause("MX-INPUT-3", "MX-INPUT-4")
def test_one_row_may_have_either_rank() -> None:
    for own in ([3, 4], [[3, 4]]):
        for beside in ([1, 1], [[1, 1]]):
            request = PrefillInput.new(ids(own)).with_attention_mask(ids(beside))
            assert prefill_rows(request).tokens == [[3, 4]]
    assert decode_rows(DecodeInput.new(ids([9]), None).with_position_ids(ids([[4]]))).positions == [[4]]  # type: ignore[arg-type]


@pytest.mark.clause("MX-INPUT-3", "MX-INPUT-4")
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 3), (2, 1), (1, 1, 2), ()])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    wrong = ids(np.ones(shape))
    for name, request in (
        ("attention_mask", PrefillInput.new(ids([5, 6])).with_attention_mask(wrong)),
        ("position_ids", PrefillInput.new(ids([5, 6])).with_position_ids(wrong)),
    ):
        with pytest.raises(ShapeError) as caught:
            prefill_rows(request)
        assert f"{name} is {list(shape)}" in str(caught.value)
        assert "[2]" in str(caught.value)
    with pytest.raises(ShapeError, match=r"attention_mask is \[2\].*\[2, 2\]"):  # one mask for two rows
        prefill_rows(PrefillInput.new(ids([[5, 6], [7, 8]])).with_attention_mask(ids([1, 1])))


@pytest.mark.clause("MX-INPUT-3", "MX-PREFILL-6")
@pytest.mark.parametrize(
    ("mask", "text"),
    [([[1, 0, 1]], "in one piece"), ([[1, 2, 0]], "must be 1"), ([[0, 0, 0]], "row 0 of the prompt is empty")],
)
def test_masks_that_say_nothing_sensible(mask: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        prefill_rows(PrefillInput.new(ids([[1, 2, 3]])).with_attention_mask(ids(mask)))


@pytest.mark.clause("MX-PREFILL-6", "MX-DECODE-4")
def test_nothing_to_run() -> None:
    for shape in ((0,), (0, 3), (2, 0)):
        with pytest.raises(ModelError, match=r"no row|empty"):
            prefill_rows(PrefillInput.new(ids(np.zeros(shape))))
    for shape in ((0,), (2,), (1, 2), (0, 1)):
        with pytest.raises(ModelError, match=r"one token id|no row"):
            decode_rows(DecodeInput.new(ids(np.zeros(shape)), None))  # type: ignore[arg-type]


@pytest.mark.clause("MX-INPUT-5")
def test_ids_of_any_number_type() -> None:
    for dtype in (np.float32, np.uint32, np.int32, np.uint8):
        assert prefill_rows(PrefillInput.new(ids([3.0, 64.0], dtype))).tokens == [[3, 64]]
    assert prefill_rows(PrefillInput.new(ids([16777217]))).tokens == [[16777217]]  # float32 would make it 16777216
    for bad in (3.5, -1.0, np.nan, np.inf):
        with pytest.raises(InvalidParameterError, match="element 1"):
            prefill_rows(PrefillInput.new(ids([3.0, bad], np.float32)))


@pytest.mark.clause("MX-INPUT-4", "MX-PREFILL-3")
def test_positions_continue_the_cache() -> None:
    check_positions("prefill", [5, 6, 7], 5)
    for given_positions in ([4, 5, 6], [5, 7, 8], [5, 6, 6], [0, 1, 2]):  # upstream restarts at 0 (D-66)
        with pytest.raises(ModelError, match="must be 5, 6"):
            check_positions("prefill", given_positions, 5)
