"""Reading executor inputs: each row's real tokens, where they stand, and where they go in its cache.

Clauses: MX-INPUT-1..5, MX-PREFILL-3, MX-PREFILL-6, MX-DECODE-4 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError, ShapeError
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput
from ferrum_ref.interfaces.tensor import TensorRef

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InputRows:
    """The rows of one input: real tokens, their columns, and their positions where the caller gave some."""

    tokens: list[list[int]]
    columns: list[slice]
    positions: list[list[int]] | None
    num_columns: int

    def __len__(self) -> int:
        return len(self.tokens)


def prefill_rows(input: PrefillInput) -> InputRows:
    """Every row without its padding. Pure.  [MX-INPUT-3..5, MX-PREFILL-6]

    Raises ModelError (rank of the ids, no row, no token, a row of padding only, a mask with a hole or other values than
    0 and 1), ShapeError naming a mask or positions of another shape than the ids, InvalidParameterError for ids that
    are no integers.
    """
    ids = _ids("prefill", input.input_ids, input.batch_size(), input.sequence_length())
    if not ids.size:
        raise ModelError(f"prefill: the prompt is empty (input_ids {list(ids.shape)}); give at least one token a row")
    columns = [slice(0, ids.shape[1])] * len(ids)
    if input.attention_mask is not None:
        mask = _beside("prefill", "attention_mask", input.attention_mask, input.input_ids, ids.shape)
        columns = [_real_columns(row, index) for index, row in enumerate(mask)]
    return _rows("prefill", ids, columns, input.position_ids, input.input_ids)


def decode_rows(input: DecodeInput) -> InputRows:
    """One token a row. Pure.  Raises ModelError for several tokens a row; else as `prefill_rows`.  [MX-DECODE-4]"""
    batch = input.batch_size()
    ids = _ids("decode", input.input_ids, batch, input.input_ids.numel() // max(batch, 1))
    if not len(ids) or ids.shape[1] != 1:
        raise ModelError(
            f"decode: expected one token id a row, got input_ids {list(input.input_ids.shape())}; run several tokens"
            " through prefill"
        )
    return _rows("decode", ids, [slice(0, 1)] * len(ids), input.position_ids, input.input_ids)


def check_positions(operation: str, given: Sequence[int], start: int) -> None:
    """Raises ModelError unless given is start, start + 1, ...  [MX-PREFILL-3; D-66]"""
    if given[0] != start or any(after - before != 1 for before, after in pairwise(given)):
        raise ModelError(
            f"{operation}: position_ids must be {start}, {start + 1}, ... for {len(given)} tokens"
            f" (the cache holds {start}), got {list(given[:4])}..."
        )


def _rows(
    operation: str, ids: Ints, columns: list[slice], position_ids: TensorRef | None, given_ids: TensorRef
) -> InputRows:
    positions = None
    if position_ids is not None:
        table = _beside(operation, "position_ids", position_ids, given_ids, ids.shape)
        positions = [row[where].tolist() for row, where in zip(table, columns, strict=True)]
    tokens = [row[where].tolist() for row, where in zip(ids, columns, strict=True)]
    return InputRows(tokens, columns, positions, ids.shape[1])


def _ids(operation: str, tensor: TensorRef, batch: int, length: int) -> Ints:
    if batch < 1:
        raise ModelError(f"{operation}: input_ids {list(tensor.shape())} have no row; give at least one sequence")
    return np.array(tensor.to_vec_u32(), dtype=np.int64).reshape(batch, length)


def _beside(operation: str, name: str, tensor: TensorRef, ids: TensorRef, shape: tuple[int, ...]) -> Ints:
    """A tensor that goes with the ids, `[B, T]`; for a single row both may have either rank."""
    got = tensor.shape()
    if got != ids.shape() and not (shape[0] == 1 and got in ((shape[1],), (1, shape[1]))):
        raise ShapeError(f"{operation}: {name} is {list(got)}, expected the shape of input_ids, {list(ids.shape())}")
    return np.array(tensor.to_vec_u32(), dtype=np.int64).reshape(shape)


def _real_columns(mask: Ints, row: int) -> slice:
    """The columns of the ones."""
    (ones,) = np.nonzero(mask)
    if mask.max() > 1 or (len(ones) and ones[-1] - ones[0] + 1 != len(ones)):
        raise ModelError(
            f"prefill: attention_mask row {row} must be 1 for the prompt and 0 for padding before or after it, in one"
            f" piece; got {mask[:8].tolist()}..."
        )
    if not len(ones):
        raise ModelError(f"prefill: row {row} of the prompt is empty: its attention_mask is all 0; leave the row out")
    return slice(int(ones[0]), int(ones[-1]) + 1)
