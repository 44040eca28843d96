"""From settings to a workload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ferrum_ref.errors import InvalidParameterError
from ferrum_sim.settings import WorkloadSettings
from ferrum_sim.workload.arrivals import ArrivalProcess
from ferrum_sim.workload.lengths import LengthDistribution
from ferrum_sim.workload.request import Workload
from ferrum_sim.workload.synthetic import SyntheticSpec, embedded_chat, generate
from ferrum_sim.workload.traces import read_trace

DEFAULT_NUM_REQUESTS = 1000
DEFAULT_PROMPT_TOKENS = "lognormal:700,0.9,6900"
DEFAULT_OUTPUT_TOKENS = "lognormal:150,0.7,1000"
PRIORITY_STREAM = 0x5052494F


def build_workload(settings: WorkloadSettings) -> Workload:
    """The workload the settings describe. Pure but for reading the trace.  [SI-WORKLOAD-3..6]

    Raises InvalidParameterError for settings that contradict each other, and what readers and parsers raise.
    """
    if settings.trace is not None:
        _refuse(settings, "a trace", "arrivals", "num_requests", "prompt_tokens", "output_tokens")
    if settings.limit is not None and settings.limit < 1:
        raise InvalidParameterError(f"build_workload: limit is {settings.limit}; expected a whole number >= 1")
    if settings.seed < 0:
        raise InvalidParameterError(f"build_workload: seed is {settings.seed}; expected a whole number >= 0")
    if settings.trace is not None:
        workload = read_trace(settings.trace, settings.limit)
    else:
        workload = generate(_recipe(settings), settings.seed).limited(settings.limit)
    return _with_priorities(workload.scaled(settings.rate_scale), settings)


def _refuse(settings: WorkloadSettings, given: str, *names: str) -> None:
    for name in names:
        if getattr(settings, name) is not None:
            raise InvalidParameterError(
                f"build_workload: {name} is '{getattr(settings, name)}' beside {given}; expected one or the other"
            )


def _recipe(settings: WorkloadSettings) -> SyntheticSpec:
    if settings.arrivals is None:
        _refuse(settings, "the embedded workload (no arrivals given)", "prompt_tokens", "output_tokens")
        embedded = embedded_chat()
        return embedded if settings.num_requests is None else embedded_chat(num_requests=settings.num_requests)
    num_requests = DEFAULT_NUM_REQUESTS if settings.num_requests is None else settings.num_requests
    prompt = settings.prompt_tokens or DEFAULT_PROMPT_TOKENS
    output = settings.output_tokens or DEFAULT_OUTPUT_TOKENS
    return SyntheticSpec(
        ArrivalProcess.parse(settings.arrivals),
        _lengths(prompt, "prompt"),
        _lengths(output, "output"),
        num_requests,
        description=f"{num_requests} requests, {settings.arrivals}, prompts {_name(prompt)}, outputs {_name(output)}",
    )


def _name(text: str) -> str:
    """The text without the folder of an empirical trace: results must not depend on where files lie."""
    name, _, rest = text.partition(":")
    return f"{name}:{Path(rest).name}" if name == "empirical" else text


def _lengths(text: str, kind: str) -> LengthDistribution:
    name, _, path = text.partition(":")
    if name != "empirical":
        return LengthDistribution.parse(text)
    requests = read_trace(Path(path)).requests
    is_prompt = kind == "prompt"
    return LengthDistribution.empirical(
        tuple(request.num_prompt_tokens if is_prompt else request.num_output_tokens for request in requests)
    )


def _with_priorities(workload: Workload, settings: WorkloadSettings) -> Workload:
    """Each request is of high priority with the stated probability, by a stream of its own."""
    fraction = settings.high_priority_fraction
    if not 0.0 <= fraction <= 1.0:
        raise InvalidParameterError(f"build_workload: high_priority_fraction is {fraction}; expected 0 to 1")
    if fraction == 0.0:
        return workload
    rng = np.random.default_rng([settings.seed, PRIORITY_STREAM])
    is_high = rng.random(len(workload.requests)) < fraction
    requests = tuple(
        replace(request, priority="high") if high else request
        for request, high in zip(workload.requests, is_high, strict=True)
    )
    return Workload(requests, f"{workload.description}, {fraction:g} of high priority", workload.notes)
