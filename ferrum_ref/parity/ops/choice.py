"""Exact operations: table look-up and argmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.parity import oracle
from ferrum_ref.parity.bounds.choice import admissible_maxima
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, case
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm


class Embedding(Operation):
    """table (V, E), ids (T,): rows come out bit for bit; rows that nobody asks for hold NaN."""

    name = "embedding"
    cases = (
        case(IID, V=11, E=7, T=5),
        case("repeated ids", V=40, E=64, T=9),
        case("first and last", V=129, E=80, T=2),
        case("special values", V=8, E=16, T=8),
        case("strided", V=9, E=12, T=4),
        case(IID, V=9, E=12, T=0),
        case(IID, small=False, V=70000, E=8, T=33),
        case(IID, V=7, E=1100, T=3),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        num_rows, size, num_tokens = case.sizes["V"], case.sizes["E"], case.sizes["T"]
        table, ids = draws.normal(rng, (num_rows, size), storage), rng.integers(num_rows, size=num_tokens)
        if case.probe == "repeated ids":
            ids = np.full(num_tokens, ids[0])
        if case.probe == "first and last":
            ids = np.array([0, num_rows - 1])
        if case.probe == "special values":
            table[:, :4] = np.array([-0.0, np.inf, -np.inf, storage.smallest_normal / 2]).astype(table.dtype)
        unused = np.setdiff1d(np.arange(num_rows), ids)
        table[unused] = np.nan
        arrays = {"table": draws.strided(table) if case.probe == "strided" else table}
        return Inputs(case, storage, arrays, {"ids": ids.astype(np.int64)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        table = bridge.tensor(backend, inputs, "table")
        return bridge.host(bridge.linear_ops(backend).embedding(table, inputs.settings["ids"]))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        value = oracle.embedding(inputs.arrays["table"], inputs.settings["ids"])
        return [Expected("y", value, ("token", "feature"), inputs.storage.numpy_dtype)]


class ArgMax(Operation):
    """logits (V,) or (1, V): the first of the largest."""

    name = "argmax"
    cases = (
        case("ties", shape=(40,), winners=3),
        case("ties", shape=(1, 129), winners=2),
        case(IID, shape=(7,)),
        case("all equal", shape=(33,)),
        case("masked", shape=(1, 50)),
        case("negative", shape=(65,)),
        case("neighbours", shape=(70,)),
        case("last", shape=(257,)),
        case(IID, shape=(1,)),
        case("ties far apart", shape=(50257,), winners=2),
        case(IID, small=False, shape=(1, 151936)),
        case("signed zeros", shape=(40,)),
        case("most negative", shape=(70,)),
        case("infinities", shape=(1, 50)),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        shape = case.sizes["shape"]
        num = shape[-1]
        logits = draws.normal(rng, (num,), storage)
        if "winners" in case.sizes:
            logits[rng.permutation(num)[: case.sizes["winners"]]] = 9.0
        if case.probe == "all equal":
            logits[:] = logits[0]
        if case.probe == "masked":
            logits[rng.permutation(num)[: num // 2]] = -np.inf
        if case.probe == "negative":
            logits = storage.round(-50.0 - np.abs(logits.astype(np.float64)))
        if case.probe == "neighbours":  # one unit in the last place apart
            logits[:] = 1.0
            logits[rng.integers(1, num)] = 1.0 + 2.0 * storage.unit
        if case.probe == "last":
            logits[-1] = 20.0
        if case.probe == "signed zeros":  # they are equal, so the first is chosen; their codes are not
            logits = -np.abs(logits)
            logits[17], logits[29] = -0.0, 0.0
        if case.probe == "most negative":
            logits[:] = -storage.largest
            logits[rng.integers(1, num)] *= logits.dtype.type(0.5)
        if case.probe == "infinities":
            logits[[11, 40]] = np.inf
        return Inputs(case, storage, {"logits": logits.reshape(shape)})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        logits = bridge.tensor(backend, inputs, "logits")
        return (np.array(bridge.sampling_ops(backend).argmax(logits), dtype=np.int64),)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        logits = inputs.exact("logits").reshape(-1)
        index = admissible_maxima(logits)[0]
        return [Expected("index", np.array(index, dtype=np.int64), (), np.dtype(np.int64))]
