"""From an executor's input to appends, and from what the forward gave to its output.

Clauses: MX-INPUT-1..5, MX-OUTPUT-1..6, MX-VERIFY-1 (specs/model_executor.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import ModelError
from ferrum_ref.executor.advance import Advanced, Append
from ferrum_ref.executor.batch_handle import BatchCacheHandle, cache_rows
from ferrum_ref.executor.inputs import InputRows, decode_rows, prefill_rows
from ferrum_ref.executor.observation import padded, padded_weights
from ferrum_ref.interfaces.kv_cache import KvCacheHandle
from ferrum_ref.interfaces.model_executor import DecodeInput, DecodeOutput, PrefillInput, PrefillOutput
from ferrum_ref.interfaces.tensor import TensorFactory, TensorRef
from ferrum_ref.types.parity_mode import ParityMode

Start = Callable[[str, "KvCacheHandle | None", "Sequence[int] | None", int], int]


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """A prefill input, read and checked as far as it can be without its caches."""

    input: PrefillInput
    rows: InputRows
    handles: tuple[KvCacheHandle, ...]
    last_only: bool

    @staticmethod
    def read(input: PrefillInput, parity_mode: ParityMode) -> PrefillRequest:
        """Raises as `prefill_rows`; UnsupportedError: more or fewer caches than rows."""
        rows = prefill_rows(input)
        handles = () if input.kv_cache is None else cache_rows("prefill", input.kv_cache, len(rows))
        return PrefillRequest(input, rows, handles, input.last_only or parity_mode is ParityMode.UPSTREAM)

    def appends(self, start: Start) -> Iterator[Append]:
        """One a row. `start` places the tokens and checks positions."""
        for index, tokens in enumerate(self.rows.tokens):
            handle = self.handles[index] if self.handles else None
            positions = self.rows.positions[index] if self.rows.positions is not None else None
            at = start("prefill", handle, positions, len(tokens))
            yield Append(handle, tokens, at, "last" if self.last_only else "all")

    def output(self, done: Advanced, first: int, factory: TensorFactory) -> PrefillOutput:
        """From the rows [first, first + B) of a forward.  [MX-OUTPUT-1..6]"""
        mine = slice(first, first + len(self.rows))
        logits, columns, width = done.logits[mine], self.rows.columns, self.rows.num_columns
        last = np.stack([rows[-1] for rows in logits])
        whole = last[:, None] if self.last_only else _padded(logits, columns, width)
        handles = done.handles[mine]
        return PrefillOutput(
            factory.from_numpy(whole),
            self.input.kv_cache or (handles[0] if len(handles) == 1 else BatchCacheHandle(handles)),
            hidden_states=self._tensors(done.hidden, self.input.wants_hidden_states, mine, _padded, factory),
            attention_weights=self._tensors(
                done.weights, self.input.wants_attention_weights, mine, padded_weights, factory
            ),
            last_logits=factory.from_numpy(last),
        )

    def _tensors(
        self,
        layers: list[list[npt.NDArray[Any]]] | None,
        wanted: bool,
        mine: slice,
        pad: Callable[..., npt.NDArray[Any]],
        factory: TensorFactory,
    ) -> list[TensorRef] | None:
        if layers is None or not wanted:
            return None
        return [factory.from_numpy(pad(parts[mine], self.rows.columns, self.rows.num_columns)) for parts in layers]


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """A decode input, read and checked as far as it can be without its caches."""

    input: DecodeInput
    rows: InputRows
    handles: tuple[KvCacheHandle, ...]

    @staticmethod
    def read(input: DecodeInput) -> DecodeRequest:
        """Raises as `decode_rows`; UnsupportedError: more or fewer caches than rows."""
        rows = decode_rows(input)
        return DecodeRequest(input, rows, cache_rows("decode", input.kv_cache, len(rows)))

    def appends(self, start: Start) -> Iterator[Append]:
        """One a row. `start` places the token and checks positions."""
        for index, handle in enumerate(self.handles):
            positions = self.rows.positions[index] if self.rows.positions is not None else None
            yield Append(handle, self.rows.tokens[index], start("decode", handle, positions, 1), "last")

    def output(self, done: Advanced, first: int, factory: TensorFactory) -> DecodeOutput:
        """From the rows [first, first + B) of a forward.  [MX-OUTPUT-3..5]"""
        mine = slice(first, first + len(self.rows))
        hidden = weights = None
        if done.hidden is not None and self.input.wants_hidden_states:
            hidden = factory.from_numpy(np.concatenate(done.hidden[-1][mine]))
        if done.weights is not None and self.input.wants_attention_weights:
            weights = [factory.from_numpy(padded_weights(layer[mine], self.rows.columns, 1)) for layer in done.weights]
        return DecodeOutput(factory.from_numpy(np.concatenate(done.logits[mine])), self.input.kv_cache, hidden, weights)


def verify_chain(inputs: Sequence[DecodeInput]) -> tuple[KvCacheHandle, list[int], list[int] | None]:
    """One sequence's handle, tokens and positions (None: none given). Pure.  [MX-VERIFY-1]

    Raises ModelError where the inputs name several caches, or only some of them positions.
    """
    tokens: list[int] = []
    positions: list[int] = []
    (handle,) = cache_rows("forward_verify", inputs[0].kv_cache, 1)
    for input in inputs:
        rows = decode_rows(input)
        if cache_rows("forward_verify", input.kv_cache, len(rows)) != (handle,):
            raise ModelError(
                f"forward_verify: successive tokens of one sequence, got caches {handle.cache_id()} and"
                f" {input.kv_cache.cache_id()}; use batch_decode for several sequences"
            )
        tokens += rows.tokens[0]
        positions += rows.positions[0] if rows.positions is not None else []
    if positions and len(positions) != len(tokens):
        raise ModelError(
            f"forward_verify: {len(positions)} of {len(tokens)} inputs have position_ids; give all or none"
        )
    return handle, tokens, positions or None


def _padded(parts: Sequence[npt.NDArray[Any]], columns: Sequence[slice], num_columns: int) -> npt.NDArray[Any]:
    """`padded`, without a copy where there is nothing to pad. Pure."""
    if len(parts) == 1 and len(parts[0]) == num_columns:
        return parts[0][None]
    return padded(parts, columns, num_columns)
