"""Runs cases and judges them.  Clauses: PA-RUN-1..5."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.parity.ops.catalogue import EVERY, OPERATIONS, operation_named
from ferrum_ref.parity.ops.operation import DRAWN, Case, Expected, Inputs, Operation
from ferrum_ref.parity.subject import Subject
from ferrum_ref.parity.units import STORAGES, Array, Storage, storage_named
from ferrum_ref.parity.verdict import Verdict, judge

PASSED, FAILED, UNSUPPORTED, SKIPPED = "passed", "failed", "unsupported", "skipped"
WAIVED = "waived"  # a failure that is known, with a reason and a date


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case on one dtype with one seed: its status, the verdict on its worst output, and how to run it again."""

    operation: str
    dtype: str
    case_index: int
    label: str
    seed: int
    status: str
    ratio_det: float
    ratio_sharp: float | None
    verdict: Verdict | None
    message: str
    reproduce: str
    ratio_prob: float | None = None
    ratio_statistical: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What to run: empty sequences mean everything. seeds are first_seed .. first_seed + num_seeds - 1.

    every_scheme: with the further packed forms of `quantized_linear`, where no operation is named.
    """

    operations: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    case_index: int | None = None
    first_seed: int = 0
    num_seeds: int = 1
    only_small: bool = False
    every_scheme: bool = False

    def items(self) -> list[tuple[Operation, Storage, int, int]]:
        """(operation, dtype, case, seed) in table order, seed by seed.

        Raises InvalidParameterError for an unknown name, a case that the operation does not have, or no seed.
        """
        operations = [operation_named(name) for name in self.operations]
        operations = operations or list(EVERY if self.every_scheme else OPERATIONS)
        storages = [storage_named(name) for name in self.dtypes] or list(STORAGES.values())
        if self.num_seeds < 1 or self.first_seed < 0:
            raise InvalidParameterError(
                f"parity: seed {self.first_seed} and {self.num_seeds} seeds, expected a seed >= 0 and at least one"
            )
        seeds = range(self.first_seed, self.first_seed + self.num_seeds)
        return [
            (operation, storage, index, seed)
            for seed in seeds
            for operation in operations
            for storage in storages
            for index in self._indices(operation)
        ]

    def _indices(self, operation: Operation) -> list[int]:
        if self.case_index is None:
            return [index for index, case in enumerate(operation.cases) if case.small or not self.only_small]
        if not 0 <= self.case_index < len(operation.cases):
            raise InvalidParameterError(
                f"parity: case {self.case_index} of {operation.name}, expected 0 .. {len(operation.cases) - 1}"
            )
        return [self.case_index]


def draw_case(operation: Operation, storage: Storage, case_index: int, seed: int) -> Inputs:
    """The inputs of a case: a function of its four names alone, the same in every process.  [PA-RUN-1]"""
    entropy = [seed, case_index, zlib.crc32(operation.name.encode()), zlib.crc32(storage.name.encode())]
    rng, case = np.random.default_rng(entropy), operation.cases[case_index]
    return operation.draw(operation.drawn(rng) if case.probe == DRAWN else case, storage, rng)


def run_case(subject: Subject, operation: Operation, storage: Storage, case_index: int, seed: int) -> CaseResult:
    """Draws, runs and judges one case; an exception of the subject is a failure, not the caller's.  [PA-RUN-2..4]"""
    report = _Reporter(subject, operation, storage, case_index, seed)
    try:
        subject.check_offers(storage)
        inputs = draw_case(operation, storage, case_index, seed)
        report.case = inputs.case
        before = _digests(inputs)
        outputs = subject.run(operation, inputs)
    except UnsupportedError as error:
        return report.result(UNSUPPORTED, error.message)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the verdict on the subject
        return report.result(FAILED, f"raised {type(error).__name__}: {error}")
    if changed := [name for name, digest in _digests(inputs).items() if digest != before[name]]:
        return report.result(FAILED, f"changed its input {', '.join(changed)}, or what lies beside it; work on a copy")
    with np.errstate(all="ignore"):  # an accumulator that bounds nothing makes infinities and NaN
        expected = operation.expect(inputs, subject.declared(operation))
    return report.judged(expected, outputs)


def judged(
    subject: Subject,
    operation: Operation,
    storage: Storage,
    case_index: int,
    seed: int,
    expected: Sequence[Expected],
    outputs: Sequence[Array],
) -> CaseResult:
    """The result of a case whose outputs are at hand. Pure."""
    return _Reporter(subject, operation, storage, case_index, seed).judged(expected, outputs)


def run(
    subject: Subject,
    selection: Selection,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[CaseResult]:
    """Every selected case in order; once `budget_s` seconds are over, the rest come out as skipped.  [PA-RUN-5]"""
    start = clock()
    for operation, storage, case_index, seed in selection.items():
        if budget_s is not None and clock() - start >= budget_s:
            message = f"the budget of {budget_s:g} s was used up"
            yield _Reporter(subject, operation, storage, case_index, seed).result(SKIPPED, message)
        else:
            yield run_case(subject, operation, storage, case_index, seed)


def _digests(inputs: Inputs) -> dict[str, bytes]:
    """Of each array with all that its buffer holds, and of each setting: tables, lengths and parameters too."""
    parts = {name: _buffer(array).tobytes() for name, array in inputs.arrays.items()}
    for name, setting in inputs.settings.items():
        parts[name] = setting.tobytes() if isinstance(setting, np.ndarray) else repr(setting).encode()
    return {name: hashlib.blake2b(part, digest_size=16).digest() for name, part in parts.items()}


def _buffer(array: Array) -> Array:
    """The array that a view is a view of."""
    return array.base if isinstance(array.base, np.ndarray) else array


@dataclass(slots=True)
class _Reporter:
    """Makes the result of one case."""

    subject: Subject
    operation: Operation
    storage: Storage
    case_index: int
    seed: int
    case: Case | None = None  # as it was drawn

    def judged(self, expected: Sequence[Expected], outputs: Sequence[Array]) -> CaseResult:
        if len(outputs) != len(expected):
            return self.result(FAILED, f"returned {len(outputs)} outputs, expected {len(expected)}")
        verdicts = [judge(wanted, got) for wanted, got in zip(expected, outputs, strict=True)]
        failed = [verdict for verdict in verdicts if not verdict.passed]
        worst = max(failed or verdicts, key=lambda verdict: verdict.ratio_det)
        return self.result(FAILED if failed else PASSED, worst.fault, worst, verdicts)

    def result(
        self, status: str, message: str, verdict: Verdict | None = None, verdicts: Sequence[Verdict] = ()
    ) -> CaseResult:
        nothing = float("inf") if status == FAILED else 0.0
        return CaseResult(
            operation=self.operation.name,
            dtype=self.storage.name,
            case_index=self.case_index,
            label=(self.case or self.operation.cases[self.case_index]).label,
            seed=self.seed,
            status=status,
            ratio_det=max((one.ratio_det for one in verdicts), default=nothing),
            ratio_sharp=_largest([one.ratio_sharp for one in verdicts]),
            verdict=verdict,
            message=message,
            reproduce=f"ferrum-ref parity {self.subject.selector()} --op {self.operation.name} "
            f"--dtype {self.storage.name} --case {self.case_index} --seed {self.seed}",
            ratio_prob=_largest([one.ratio_prob for one in verdicts]),
            ratio_statistical=_largest([one.ratio_statistical for one in verdicts]),
        )


def _largest(ratios: Sequence[float | None]) -> float | None:
    return max((ratio for ratio in ratios if ratio is not None), default=None)
