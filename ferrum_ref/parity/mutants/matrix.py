"""Which suite kills which mutant: the judge, and four hand-set tolerances with random inputs and with our probes.

Clauses: PA-MUTANT-1..5 (specs/parity.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ferrum_ref.parity.engine.law import fault_of
from ferrum_ref.parity.engine.laws import LAWS
from ferrum_ref.parity.engine.parts import EngineParts
from ferrum_ref.parity.honest.catalogue import HONEST, Honest
from ferrum_ref.parity.mutants.catalogue import MUTANTS
from ferrum_ref.parity.mutants.engine import ENGINE_MUTANTS, EngineMutant
from ferrum_ref.parity.mutants.hand_set import HAND_SET
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.ops.catalogue import EVERY, operation_named
from ferrum_ref.parity.ops.operation import IID, Expected, Inputs, Operation
from ferrum_ref.parity.runner import FAILED, draw_case, judged
from ferrum_ref.parity.subject import FunctionSubject
from ferrum_ref.parity.units import STORAGES, Array, Storage
from ferrum_ref.types.algorithm import Algorithm

OURS = "judge"
WITH_PROBES = "+probes"
REQUIRED_SHARE = 0.98
SUITES = (OURS, *(name for one in HAND_SET for name in (one.name, one.name + WITH_PROBES)))


@dataclass
class MatrixRow:
    """One mutant: of `cells` (dtype, seed) pairs, how many each suite rejects; hand-set suites judge no engine part.

    survived: the pairs that the judge let pass.
    """

    group: str
    operation: str
    name: str
    cells: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    survived: list[tuple[str, int]] = field(default_factory=list)

    def count(self, killers: Iterable[str], dtype: str, seed: int) -> None:
        """One more pair and the suites that rejected it."""
        self.cells += 1
        found = set(killers)
        for suite in found:
            self.kills[suite] = self.kills.get(suite, 0) + 1
        if OURS not in found:
            self.survived.append((dtype, seed))


@dataclass(frozen=True)
class Setup:
    """One case as drawn, with the expectations of every declaration asked for."""

    operation: Operation
    storage: Storage
    case_index: int
    seed: int
    inputs: Inputs
    expected: dict[Algorithm, Sequence[Expected]]

    @classmethod
    def of(
        cls, operation: Operation, storage: Storage, case_index: int, seed: int, algorithms: Iterable[Algorithm]
    ) -> Setup:
        inputs = draw_case(operation, storage, case_index, seed)
        with np.errstate(all="ignore"):
            expected = {one: operation.expect(inputs, one) for one in set(algorithms)}
        return cls(operation, storage, case_index, seed, inputs, expected)

    def rejected_by(self, algorithm: Algorithm, run: Callable[[Inputs], tuple[Array, ...]]) -> set[str]:
        """The suites that reject what `run` makes of this case."""
        with np.errstate(all="ignore"):
            outputs = run(self.inputs)
        expected = self.expected[algorithm]
        subject = FunctionSubject("mutant", {})
        result = judged(subject, self.operation, self.storage, self.case_index, self.seed, expected, outputs)
        rejecting = {OURS} if result.status == FAILED else set()
        for suite in HAND_SET:
            if not suite.accepts(self.operation.name, self.storage.name, expected, outputs):
                rejecting.add(suite.name + WITH_PROBES)
                if self.inputs.case.probe == IID:
                    rejecting.add(suite.name)
        return rejecting


def small_cases(operation: Operation) -> list[int]:
    """The cases of the default suite that cost milliseconds."""
    return [index for index, case in enumerate(operation.cases) if case.small]


def kill_matrix(
    seeds: Sequence[int],
    mutants: Sequence[Mutant] = MUTANTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MatrixRow]:
    """Every kernel mutant in each of its dtypes on every seed; only small cases are used. Pure.  [PA-MUTANT-1..3]"""
    rows = {mutant: MatrixRow(mutant.group, mutant.operation, mutant.name) for mutant in mutants}
    names = list(dict.fromkeys(mutant.operation for mutant in mutants))
    total, done = len(names) * len(seeds), 0
    for name in names:
        mine = [mutant for mutant in mutants if mutant.operation == name]
        for seed in seeds:
            for storage in STORAGES.values():
                _one_cell(operation_named(name), storage, seed, mine, rows)
            done += 1
            progress(done, total)
    return [rows[mutant] for mutant in mutants]


def _one_cell(
    operation: Operation, storage: Storage, seed: int, mutants: Sequence[Mutant], rows: dict[Mutant, MatrixRow]
) -> None:
    affected = [mutant for mutant in mutants if storage.name in mutant.dtypes]
    killers: dict[Mutant, set[str]] = {mutant: set() for mutant in affected}
    for index in small_cases(operation):
        setup = Setup.of(operation, storage, index, seed, (mutant.algorithm for mutant in affected))
        for mutant in affected:
            killers[mutant] |= setup.rejected_by(mutant.algorithm, mutant.run)
    for mutant in affected:
        rows[mutant].count(killers[mutant], storage.name, seed)


def engine_matrix(
    parts: EngineParts,
    seeds: Sequence[int],
    mutants: Sequence[EngineMutant] = ENGINE_MUTANTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MatrixRow]:
    """Every engine mutant made of the reference's parts, against all laws. Pure.  [PA-MUTANT-4]"""
    rows = []
    for done, mutant in enumerate(mutants, 1):
        row, wrong = MatrixRow(mutant.group, "-", mutant.name), mutant.mutate(parts)
        for seed in seeds:
            row.count({OURS} if any(fault_of(law, wrong, seed) for law in LAWS) else (), "-", seed)
        rows.append(row)
        progress(done, len(mutants))
    return rows


@dataclass
class FalseAlarms:
    """Of `runs` honest runs, how many each suite rejects."""

    runs: int = 0
    alarms: dict[str, int] = field(default_factory=dict)


def honest_matrix(
    seeds: Sequence[int],
    operations: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FalseAlarms]:
    """By operation: every honest algorithm on every small case, dtype and seed. Pure.  [PA-GUARD-5]"""
    counts = {}
    names = operations or [operation.name for operation in EVERY]
    for done, name in enumerate(names, 1):
        counts[name] = _honest_count(operation_named(name), [one for one in HONEST if one.operation == name], seeds)
        progress(done, len(names))
    return counts


def _honest_count(operation: Operation, variants: Sequence[Honest], seeds: Sequence[int]) -> FalseAlarms:
    count = FalseAlarms()
    for seed in seeds:
        for storage in STORAGES.values():
            for index in small_cases(operation):
                setup = Setup.of(operation, storage, index, seed, (one.algorithm for one in variants))
                for one in variants:
                    count.runs += 1
                    for suite in setup.rejected_by(one.algorithm, one.run):
                        count.alarms[suite] = count.alarms.get(suite, 0) + 1
    return count


def killed_share(rows: Sequence[MatrixRow], seed: int | None = None) -> float:
    """The share of mutants that the judge kills in every dtype, on every seed or on the given one. Pure."""
    alive = sum(any(seed is None or seed == found for _, found in row.survived) for row in rows)
    return 1.0 - alive / max(len(rows), 1)
