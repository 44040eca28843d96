"""Seeded synthetic workloads: an arrival process, two length distributions and, if wanted, shared system prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.workload.arrivals import ArrivalProcess
from ferrum_sim.workload.lengths import LengthDistribution
from ferrum_sim.workload.request import SimRequest, Workload, fresh_run


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """A recipe. With `num_shared_prefixes` > 0 each prompt begins with one of that many prefixes of
    `shared_prefix_tokens` tokens (its own tokens come on top)."""

    arrivals: ArrivalProcess
    prompt_tokens: LengthDistribution
    output_tokens: LengthDistribution
    num_requests: int
    num_shared_prefixes: int = 0
    shared_prefix_tokens: int = 0
    description: str = "synthetic"


def embedded_chat(rate_per_s: float = 8.0, num_requests: int = 2400) -> SyntheticSpec:
    """The built-in workload: chat-like lengths, Poisson arrivals, eight shared system prompts of 256 tokens. Pure.

    Medians and spreads lie near those of the Azure 2023 conversation trace (median 1020 in, 129 out).  [SI-WORKLOAD-6]
    """
    return SyntheticSpec(
        ArrivalProcess("poisson", rate_per_s),
        LengthDistribution("lognormal", (700.0, 0.9, 6900.0)),
        LengthDistribution("lognormal", (150.0, 0.7, 1000.0)),
        num_requests,
        num_shared_prefixes=8,
        shared_prefix_tokens=256,
        description=f"embedded chat workload, {num_requests} requests, Poisson {rate_per_s:g}/s",
    )


def generate(spec: SyntheticSpec, seed: int) -> Workload:
    """The workload of a recipe and a seed. Pure: equal arguments give equal workloads.  [SI-WORKLOAD-5]

    Arrivals, prompt lengths, output lengths and prefixes draw from four independent streams, so that changing one
    leaves the others as they were (common random numbers).
    Raises InvalidParameterError for num_requests < 1 or a negative seed.
    """
    if spec.num_requests < 1 or seed < 0:
        raise InvalidParameterError(
            f"generate: num_requests is {spec.num_requests} and seed {seed}; expected num_requests >= 1 and seed >= 0"
        )
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)]
    arrivals_s = spec.arrivals.arrivals_s(spec.num_requests, streams[0])
    own_tokens = spec.prompt_tokens.draw(spec.num_requests, streams[1])
    output_tokens = spec.output_tokens.draw(spec.num_requests, streams[2])
    prefixes = streams[3].integers(0, max(1, spec.num_shared_prefixes), spec.num_requests)
    prefix_tokens = spec.shared_prefix_tokens if spec.num_shared_prefixes > 0 else 0
    next_id = spec.num_shared_prefixes * prefix_tokens
    requests = []
    for index in range(spec.num_requests):
        own = fresh_run(next_id, int(own_tokens[index]))
        runs = ((int(prefixes[index]) * prefix_tokens, prefix_tokens), own) if prefix_tokens else (own,)
        num_prompt_tokens = sum(num_tokens for _, num_tokens in runs)
        requests.append(SimRequest(index, float(arrivals_s[index]), num_prompt_tokens, int(output_tokens[index]), runs))
        next_id = sum(own)
    return Workload(tuple(requests), f"{spec.description}, seed {seed}")
