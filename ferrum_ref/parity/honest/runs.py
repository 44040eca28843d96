"""Runs honest variants through the judge.  Clauses: PA-GUARD-2, PA-GUARD-5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ferrum_ref.parity.honest.catalogue import HONEST, Honest
from ferrum_ref.parity.ops.catalogue import operation_named
from ferrum_ref.parity.runner import CaseResult, draw_case, judged
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES


def honest_runs(
    operation_name: str, seeds: Iterable[int], dtypes: Sequence[str] = (), only_small: bool = True
) -> Iterator[tuple[Honest, CaseResult]]:
    """Every honest algorithm of one operation on every case, dtype and seed; expectations are shared between them."""
    operation = operation_named(operation_name)
    variants = [one for one in HONEST if one.operation == operation_name]
    indices = [index for index, case in enumerate(operation.cases) if case.small or not only_small]
    for seed in seeds:
        for dtype in dtypes or STORAGES:
            storage = STORAGES[dtype]
            for index in indices:
                inputs = draw_case(operation, storage, index, seed)
                with np.errstate(all="ignore"):
                    expected = {one: operation.expect(inputs, one) for one in {one.algorithm for one in variants}}
                for one in variants:
                    with np.errstate(all="ignore"):
                        outputs = one.run(inputs)
                    subject = FunctionSubject(one.name, {})
                    yield one, judged(subject, operation, storage, index, seed, expected[one.algorithm], outputs)
