"""Drawing a token: an admissible set for every seed, and the distribution over many seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import SamplingParams
from ferrum_ref.parity import oracle
from ferrum_ref.parity.choices import Choice, Law
from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.ops import bridge
from ferrum_ref.parity.ops.operation import Case, Expected, Inputs, Operation, case
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

WIDE = Algorithm(accumulate="fp64")  # the contract computes in float64; a coarser declaration widens the set


class SampleToken(Operation):
    """logits (V,), one SamplingParams, n seeds; the output is n indices.

    Two levels of logits a distance of about ln V apart make the temperature most visible: the variance of the scaled
    logits is then (ln V)^2 / 4, and n draws see a relative error r of the temperature with r ln V sqrt(n) / 2 standard
    deviations.
    """

    name = "sample_token"
    cases = (
        case("plain", V=40, n=64),
        case("temperature", V=257, n=64, temperature=0.7),
        case("top-k", V=50, n=400, top_k=5),
        case("top-k ties", V=50, n=400, top_k=4),
        case("top-p", V=33, n=300, top_p=0.6),
        case("top-p crossing", V=8, n=300, top_p=0.5),
        case("top-k and top-p", V=64, n=200, top_k=20, top_p=0.8, temperature=1.3),
        case("penalty", V=30, n=200, penalty=1.7),
        case("penalty before temperature", V=12, n=200, penalty=2.0, temperature=0.5, top_k=4),
        case("masked", V=65, n=200),
        case("first is masked", V=9, n=200, seeds="lowest"),
        case("last is masked", V=9, n=200, seeds="highest"),
        case("greedy", V=100, n=4, temperature=0.0),
        case("one candidate", V=20, n=8, top_k=1),
        case("padded vocabulary", V=128, n=200, padding=28),
        case("large logits", V=40, n=100, scale=300.0),
        case("beyond 256", V=1000, n=50),
        case("equal", V=64, n=640, row=True),
        case("two levels", small=False, V=1024, n=20480),
        case("expected 50", small=False, V=200, n=10000),
        case("greedy ties", V=100, n=4, temperature=0.0),
        case("greedy below 1e-5", V=50, n=20, temperature=5e-6),
        case("penalty and top-k", V=20, n=100, penalty=2.0, top_k=3),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes, probe = case.sizes, case.probe
        num = sizes["V"]
        logits = sizes.get("scale", 1.5) * rng.standard_normal(num)
        listed: list[int] = []
        if probe == "top-k ties":  # the fourth largest has two equals
            logits[rng.permutation(num)[:6]] = np.array([9.0, 8.5, 8.0, 7.5, 7.5, 7.5])
        if probe == "top-p crossing":  # masses 0.4, 0.3, ...: the id that crosses 0.5 is kept
            logits = np.log(np.array([0.4, 0.3, 0.1, 0.08, 0.06, 0.03, 0.02, 0.01]))[rng.permutation(num)]
        if probe == "greedy ties":
            logits[rng.permutation(num)[:3]] = 9.0
        if probe == "greedy below 1e-5":  # who divides by the temperature draws either of the equals
            logits[[7, 30]] = 9.0
        if probe == "penalty and top-k":  # the two best fall out of the best three
            logits = np.minimum(logits, 1.0)
            logits[:6] = np.array([3.0, 2.9, 2.5, 2.0, 1.9, 1.8])
            listed = [0, 1]
        if probe in ("penalty", "penalty before temperature"):  # one id negative, one listed twice, one with count 0
            logits[:4] = np.array([3.0, 2.5, 2.0, -0.5])
            listed = [0, 1, 3, 1, 2]
        if probe == "masked":
            logits[rng.permutation(num)[: num // 2]] = -np.inf
        if probe == "first is masked":
            logits[0] = -np.inf
        if probe == "last is masked":
            logits[-1] = -np.inf
        if probe == "padded vocabulary":
            logits[num - sizes["padding"] :] = -np.inf
        if probe == "beyond 256":
            logits[700] = 12.0
        if probe == "equal":
            logits[:] = logits[0]
        if probe == "two levels":
            logits[:] = 0.0
            logits[rng.integers(num)] = math.log(num - 1)
        if probe == "expected 50":  # one id is drawn once in two hundred times
            logits[:] = 0.0
        stored = storage.round(logits)
        params = SamplingParams(
            sizes.get("temperature", 1.0),
            sizes.get("top_k", 0),
            sizes.get("top_p", 1.0),
            sizes.get("penalty", 1.0),
            listed,
            [1, 2, 1, 1, 0][: len(listed)],
            0,
        )
        array = stored.reshape(1, -1) if sizes.get("row") else stored
        settings = {"params": params, "seeds": _seeds(sizes.get("seeds"), sizes["n"], rng)}
        return Inputs(case, storage, {"logits": array}, settings)

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        logits, ops = bridge.tensor(backend, inputs, "logits"), bridge.sampling_ops(backend)
        params: SamplingParams = inputs.settings["params"]
        drawn = [ops.sample_token(logits, _seeded(params, int(seed))) for seed in inputs.settings["seeds"]]
        return (np.array(drawn, dtype=np.int64),)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        params, seeds = inputs.settings["params"], inputs.settings["seeds"]
        scores, p = oracle.sampling_law(inputs.exact("logits").reshape(-1), params)
        uniform = oracle.uniforms(seeds)
        model = ErrorModel(WIDE if algorithm.accumulate == "fp32" else algorithm, inputs.storage)
        error = float(model.gamma(p.size) + 2.0 * model.tau(model.algorithm.exp_ulp))
        error += float(np.max(np.abs(scores[p > 0.0]), initial=0.0)) * 4.0 * model.unit
        choice = Choice(*oracle.drawn_between(p, uniform, error), p > 0.0)
        value = np.asarray(choice.first, dtype=np.int64)
        independent = "seeds" not in inputs.case.sizes
        law = Law(p, scores) if independent else None
        return [Expected("index", value, ("draw",), np.dtype(np.int64), choice=choice, law=law)]


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        params.temperature,
        params.top_k,
        params.top_p,
        params.repetition_penalty,
        params.repetition_token_ids,
        params.repetition_token_freqs,
        seed,
    )


def _seeds(kind: str | None, count: int, rng: np.random.Generator) -> Array:
    """Random seeds; or those of the `count` lowest (highest) draws among many, u = 0 included."""
    if kind is None:
        return rng.integers(0, 2**32, count)
    many = np.append(np.array([0]), rng.integers(0, 2**32, 200 * count))
    order = np.argsort(oracle.uniforms(many), kind="stable")
    return many[order[:count] if kind == "lowest" else order[-count:]]
