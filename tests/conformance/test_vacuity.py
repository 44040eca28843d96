"""Results that say nothing are rejected in every cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ferrum_ref.parity.honest.catalogue import HONEST
from ferrum_ref.parity.ops.catalogue import EVERY
from ferrum_ref.parity.ops.operation import Expected, Inputs, Operation
from ferrum_ref.parity.runner import FAILED, draw_case, judged
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES
from ferrum_ref.types.algorithm import Algorithm

FIRST_HONEST = {one.operation: one.run for one in reversed(HONEST)}


def constant(array: np.ndarray) -> np.ndarray:
    """The same shape, one value; bytes of packed weights become zero."""
    return np.full(array.shape, 0 if array.dtype == np.uint8 else 0.5).astype(array.dtype)


def settings_ignored(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """A kernel that takes no notice of positions, ids, slots, lengths, table, eps, tokens or seeds."""
    stand_ins = {
        "positions": lambda old: np.arange(len(old)),
        "ids": lambda old: np.zeros_like(old),
        "slots": lambda old: np.arange(len(old)),
        "table": lambda old: np.zeros_like(old),
        "lens": lambda old: np.minimum(old, 1),
        "eps": lambda old: 0.0,
        "tokens": lambda old: np.zeros_like(old),
        "seeds": lambda old: np.full_like(old, 12345),
    }
    for name, make in stand_ins.items():
        if name in inputs.settings:
            yield name, replace(inputs, settings={**inputs.settings, name: make(inputs.settings[name])})


def inputs_ignored(operation: Operation, inputs: Inputs) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    kernel = FIRST_HONEST[operation.name]
    for name, array in inputs.arrays.items():
        yield f"{name} ignored", kernel(replace(inputs, arrays={**inputs.arrays, name: constant(array)}))
    for name, changed in settings_ignored(inputs):
        yield f"{name} ignored", kernel(changed)
    if operation.name in ("attention", "paged_attention"):
        yield "mean of V", kernel(replace(inputs, arrays={**inputs.arrays, "q": np.zeros_like(inputs.arrays["q"])}))


def vacuous(
    operation: Operation, inputs: Inputs, expected: list[Expected]
) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    floats = all(one.dtype.kind != "i" for one in expected)
    yield "zeros", tuple(np.zeros(one.value.shape, dtype=one.dtype) for one in expected)
    if floats:
        yield "NaN", tuple(np.full(one.value.shape, np.nan).astype(one.dtype) for one in expected)
        scaled = [np.asarray(one.value).astype(np.float64) * 1.01 for one in expected]
        yield "oracle * 1.01", tuple(value.astype(one.dtype) for value, one in zip(scaled, expected, strict=True))
    yield from inputs_ignored(operation, inputs)
    for axis in range(expected[0].value.ndim):
        flipped = [np.flip(np.asarray(one.value), axis).astype(one.dtype) for one in expected if one.value.ndim > axis]
        rolled = [
            np.roll(np.asarray(one.value), 1, axis).astype(one.dtype) for one in expected if one.value.ndim > axis
        ]
        if len(flipped) == len(expected):
            yield f"axis {axis} reversed", tuple(flipped)
            yield f"axis {axis} shifted", tuple(rolled)


@pytest.mark.clause("PA-GUARD-3", "PA-VERDICT-2", "PA-VERDICT-5")
@pytest.mark.parametrize("operation", EVERY, ids=lambda operation: operation.name)
def test_vacuous_results_are_rejected(operation: Operation) -> None:
    subject = FunctionSubject("vacuous", {})
    for storage in STORAGES.values():
        met: dict[str, bool] = {}
        for index in (index for index, case in enumerate(operation.cases) if case.small):
            inputs = draw_case(operation, storage, index, 0)
            with np.errstate(all="ignore"):
                expected = list(operation.expect(inputs, Algorithm()))
                for name, outputs in vacuous(operation, inputs, expected):
                    result = judged(subject, operation, storage, index, 0, expected, outputs)
                    met[name] = met.get(name, False) or result.status == FAILED
        survived = [name for name, rejected in met.items() if not rejected]
        assert not survived, (storage.name, survived)
