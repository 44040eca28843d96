"""Options shared by `run` and `compare`, and the settings they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from ferrum_sim.metrics.summary import SummaryOptions
from ferrum_sim.settings import POLICIES, UNLIMITED, MachineSettings, RunSettings, WorkloadSettings


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number >= `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or value > 2**53:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number >= {least}")
        return value

    return parse


def real(least: float, is_open: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number >= `least` (> `least` when `is_open`)."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (is_open and value == least):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {'>' if is_open else '>='} {least:g}")
        return value

    return parse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add every option that says what is simulated. Mutates the parser."""
    _add_workload_options(parser)
    _add_machine_options(parser)
    _add_engine_options(parser)
    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--slo-ttft-ms", type=real(0, True), metavar="MS", help="objective for the time to first token"
    )
    figures.add_argument(
        "--slo-tpot-ms", type=real(0, True), metavar="MS", help="objective for the time per output token"
    )
    figures.add_argument(
        "--warmup-s",
        type=real(0),
        default=0.0,
        metavar="S",
        help="leave out requests that arrive in the first S seconds",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--step-by-step", action="store_true", help="take each step singly; same results to the last bit, slower"
    )
    how.add_argument("--check", action="store_true", help="check the engine's invariants at every step")


def _add_workload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload (without --trace and --arrivals: an embedded chat workload)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="Azure CSV or Mooncake JSON lines, read as they are")
    source.add_argument(
        "--arrivals", metavar="SPEC", help="poisson:RATE, constant:RATE, gamma:RATE,CV or weibull:RATE,SHAPE"
    )
    group.add_argument("--num-requests", type=whole(1), metavar="N", help="how many requests to generate")
    group.add_argument(
        "--prompt-tokens", metavar="SPEC", help="fixed:N, uniform:A,B, lognormal:MEDIAN,SIGMA[,MAX] or empirical:TRACE"
    )
    group.add_argument("--output-tokens", metavar="SPEC", help="as --prompt-tokens")
    group.add_argument("--limit", type=whole(1), metavar="N", help="only the first N requests")
    group.add_argument(
        "--rate-scale", type=real(0, True), default=1.0, metavar="X", help="X times the arrival rate (default 1)"
    )
    group.add_argument(
        "--high-priority-fraction", type=real(0), default=0.0, metavar="F", help="make this share of high priority"
    )
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of everything random (default 0)")


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and hardware ('ferrum-sim list' shows the known ones)")
    group.add_argument(
        "--model", default="llama-3-8b", metavar="NAME", help="a known model or a config.json (default llama-3-8b)"
    )
    group.add_argument("--hardware", default="h100", metavar="NAME", help="a known accelerator (default h100)")
    group.add_argument(
        "--tensor-parallel",
        "--num-gpus",
        type=whole(1),
        default=1,
        metavar="N",
        help="accelerators that share each layer",
    )
    group.add_argument("--compute-efficiency", type=real(0, True), metavar="F", help="reachable share of peak FLOP/s")
    group.add_argument("--memory-efficiency", type=real(0, True), metavar="F", help="reachable share of bandwidth")
    group.add_argument(
        "--host-overhead-ms", type=real(0), metavar="MS", help="time per step outside the accelerator (default 2)"
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-num-batched-tokens",
        type=whole(1),
        default=2048,
        metavar="N",
        help="token budget of a step (default 2048)",
    )
    group.add_argument(
        "--max-num-seqs", type=whole(1), default=256, metavar="N", help="requests running at once (default 256)"
    )
    group.add_argument("--block-size", type=whole(1), default=16, metavar="N", help="tokens per KV block (default 16)")
    group.add_argument(
        "--num-blocks", type=whole(1), metavar="N", help="KV blocks (default: as many as fit beside the weights)"
    )
    group.add_argument(
        "--prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="reuse cached prompt beginnings"
    )
    group.add_argument(
        "--max-waiting-requests", type=whole(0), default=UNLIMITED, metavar="N", help="reject beyond (default: never)"
    )
    group.add_argument("--policy", choices=POLICIES, default="fcfs", help="order of the waiting queue (default fcfs)")


def settings_of(args: argparse.Namespace) -> RunSettings:
    """The settings that parsed options stand for. Pure."""
    workload = WorkloadSettings(
        trace=args.trace,
        arrivals=args.arrivals,
        num_requests=args.num_requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        rate_scale=args.rate_scale,
        limit=args.limit,
        high_priority_fraction=args.high_priority_fraction,
        seed=args.seed,
    )
    machine = MachineSettings(
        model=args.model,
        hardware=args.hardware,
        tensor_parallel=args.tensor_parallel,
        compute_efficiency=args.compute_efficiency,
        memory_efficiency=args.memory_efficiency,
        host_overhead_s=_milliseconds(args.host_overhead_ms),
    )
    return RunSettings(
        workload=workload,
        machine=machine,
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        prefix_caching=args.prefix_caching,
        policy=args.policy,
        max_waiting_requests=args.max_waiting_requests,
        summary=SummaryOptions(_milliseconds(args.slo_ttft_ms), _milliseconds(args.slo_tpot_ms), args.warmup_s),
        step_by_step=args.step_by_step,
        check=args.check,
    )


def _milliseconds(value: float | None) -> float | None:
    return None if value is None else value / 1e3
