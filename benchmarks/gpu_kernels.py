#!/usr/bin/env python3
"""Each kernel's time against the floor that this card sets, beside torch's own kernel for the same work.

    python benchmarks/gpu_kernels.py [--device cuda] [--backends torch,numba-cuda,cupy] [--dtype bf16] [--json OUT]

The floor is max(bytes / copy bandwidth, operations / matmul rate), both ceilings measured in the same run on the same
card; bytes are what the work must move at least. "floor" is the share of the floor that a kernel reaches (1 is the
card's own limit), "torch" its time divided by torch's. Times are the device's own, between two CUDA events: everything
is queued while the device is kept busy, so that it never waits for the interpreter; where that fails ("starved") a time
has the host's part in it. "call" is what a call takes from the interpreter to the end, "host" what the interpreter
takes to queue one. Memory-bound kernels have MET or MISSED two goals: 70 % of the copy bandwidth, at most 1.25 times
torch's own time. The contenders take turns; figures are medians over the rounds. Large operands rotate through copies,
so that caches do not help. Results are compared with torch's: a kernel that is fast and wrong fails the run.

`--device cpu --quick` runs the same script where there is no GPU. Exit status 0: measured, 1: a kernel failed or its
result is wrong, 2: there is nothing to measure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_works import Operands, Sizes, Work, works

from ferrum_ref.errors import FerrumError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.plugins import load_backend

TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SECONDS_PER_ROUND = 0.03
MOST_LAUNCHES = 100  # queued at a time: the driver's queue is finite
BUSY_CYCLES_PER_S = 2.2e9  # more than any card's clock, so that it is kept busy for long enough
MOST_BUSY_S = 0.5
BUSIER = (1.5, 5.0, 15.0)  # times what a round should take, until the device does not wait
WARM_UP_S = 0.3  # an idle card runs at a sixth of its clock
LEAST_SHARE, MOST_TIMES_TORCH = 0.70, 1.25
LARGEST_DIFFERENCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}  # ||a - b|| / ||b||: what rounding never reaches
OWN = "torch's own"


def main() -> int:
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_kernels: error: torch finds no CUDA device here (--device cpu --quick tries this)", file=sys.stderr)
        return 2
    card = Card(args.device, args.dtype, args.quick)
    backends = opened(args.backends.split(","), args.device)
    if not backends:
        return 2
    rows: list[dict[str, Any]] = []
    operands = Operands(card.device, card.dtype, card.torch_type, backends)
    for make in works(operands, Sizes.of(args.quick)):
        rows.append(measured(make(), card, args.rounds))
        print(line(rows[-1], list(backends)), flush=True)
        if args.json:  # after each kernel: what was measured is never lost
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report(args, card, rows), indent=1) + "\n", encoding="utf-8")
    for name in backends:
        print(summary(name, rows), flush=True)
    return 1 if any(row["failed"] for row in rows) else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--backends", default="torch,numba-cuda,cupy", help="names, or name=module:factory, with commas"
    )
    parser.add_argument("--dtype", choices=tuple(TORCH_TYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, dated, with the card in them")
    return parser.parse_args()


def report(args: argparse.Namespace, card: Card, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What goes to the file."""
    return {
        "date": datetime.date.today().isoformat(),
        "card": card.name,
        "device": args.device,
        "dtype": args.dtype,
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "copy_bytes_per_s": card.bandwidth,
        "matmul_operations_per_s": card.rate,
        "rounds": args.rounds,
        "sizes": Sizes.of(args.quick).__dict__,
        "rows": rows,
    }


def opened(names: list[str], device: str) -> dict[str, ComputeBackend]:
    """The backends that are available; the others with their reason on standard error."""
    found = {}
    for text in names:
        name, _, target = text.partition("=")
        try:
            found[name] = load_backend(target or name, device)
        except FerrumError as error:
            print(f"{name}: {error.message}", file=sys.stderr)
    return found


@dataclass
class Times:
    """Seconds of one contender's launches, one figure a round; whether the device ever waited for the host."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    call_s: float = 0.0
    is_starved: bool = False
    busier: int = 0  # which of BUSIER was enough


class Card:
    """The device as torch sees it, and its ceilings."""

    def __init__(self, device: str, dtype: str, quick: bool) -> None:
        self.device, self.dtype, self.torch_type = torch.device(device), dtype, TORCH_TYPES[dtype]
        self.is_cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.is_cuda else platform.processor() or "cpu"
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        if self.is_cuda:
            self._keep_busy(WARM_UP_S)
            self.sync()
        count = (1 << 22) if quick else (1 << 30)
        source = torch.ones(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * count / self.time_of(lambda: target.copy_(source))
        side = 256 if quick else 8192
        a = torch.randn(side, side, device=self.device).to(self.torch_type)
        self.rate = 2 * side**3 / self.time_of(lambda: a @ a)
        print(f"{self.name}, {dtype}: copies {self.bandwidth / 1e9:,.0f} GB/s, matmul {self.rate / 1e12:,.1f} TFLOP/s")

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time_of(self, call: Callable[[], Any]) -> float:
        """Median seconds of one launch."""
        return statistics.median(self.times_of({"": call}, rounds=5)[""].device_s)

    def times_of(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
        """The contenders in turns. Raises what a call raises."""
        found = {name: Times() for name in calls}
        counts = {}
        for name, call in calls.items():
            for _ in range(3):  # compiles, fills pools, warms up
                call()
            self.sync()
            began_s = time.perf_counter()
            for _ in range(3):
                call()
            self.sync()
            each_s = (time.perf_counter() - began_s) / 3
            found[name].call_s = each_s
            counts[name] = max(3, min(MOST_LAUNCHES, int(SECONDS_PER_ROUND / each_s)))
        for _ in range(rounds):
            for name, call in calls.items():
                self._one_round(call, counts[name], found[name])
        return found

    def _one_round(self, call: Callable[[], Any], count: int, times: Times) -> None:
        self.sync()
        if not self.is_cuda:
            began_s = time.perf_counter()
            for _ in range(count):
                call()
            times.device_s.append((time.perf_counter() - began_s) / count)
            times.host_s.append(times.device_s[-1])
            return
        for factor in BUSIER[:1] if times.is_starved else BUSIER[times.busier :]:
            seconds, host_s, is_starved = self._queued(call, count, factor * count * times.call_s + 1e-3)
            if not is_starved:
                times.busier = BUSIER.index(factor)
                break
        times.is_starved |= is_starved
        times.device_s.append(seconds)
        times.host_s.append(host_s)

    def _queued(self, call: Callable[[], Any], count: int, busy_s: float) -> tuple[float, float, bool]:
        """Seconds of a call on the device and on the host; whether the device waited for the host."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._keep_busy(busy_s)
        began.record()
        began_s = time.perf_counter()
        for _ in range(count):
            call()
        host_s = (time.perf_counter() - began_s) / count
        is_starved = began.query()  # the device got here before all was queued
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) * 1e-3 / count, host_s, is_starved

    def _keep_busy(self, seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, MOST_BUSY_S) * BUSY_CYCLES_PER_S))


def measured(work: Work, card: Card, rounds: int) -> dict[str, Any]:
    """Seconds of torch's way and of each backend, and what they are of the floor; what failed, with its message."""
    calls, unsupported, failed = {}, {}, {}
    expected, differences = (host(work.expected()) if work.expected else None), {}
    for name, call in {**({OWN: work.torch_call} if work.torch_call else {}), **work.calls}.items():
        try:
            result = host(call())
            card.sync()
            if expected is None:
                expected = result
            elif not (difference := distance(result, expected)) <= LARGEST_DIFFERENCE[card.dtype]:
                failed[name] = f"the result differs by {difference:.3g}, relatively, from what was expected"
            else:
                differences[name] = difference
            calls[name] = call
        except UnsupportedError as error:
            unsupported[name] = error.message
        except Exception as error:  # noqa: BLE001  a contender that fails must not hide the others
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
    floor_s = max(work.num_bytes / card.bandwidth, work.num_operations / card.rate)
    times: dict[str, Times] = {}
    try:
        times = card.times_of(calls, rounds)
    except Exception as error:  # noqa: BLE001  nor the other kernels
        failed["timing"] = f"{type(error).__name__}: {str(error)[:500]}"
    seconds = {name: statistics.median(found.device_s) for name, found in times.items()}
    own = seconds.get(OWN)
    is_memory_bound = work.num_bytes / card.bandwidth > work.num_operations / card.rate
    return {
        "kernel": work.name,
        "is_memory_bound": is_memory_bound,
        "is_goal": work.is_goal and is_memory_bound,
        "bytes": work.num_bytes,
        "operations": work.num_operations,
        "floor_s": floor_s,
        "torch_way": work.torch_way,
        "seconds": seconds,
        "spread": {name: max(t.device_s) / min(t.device_s) for name, t in times.items()},
        "call_seconds": {name: found.call_s for name, found in times.items()},
        "host_seconds": {name: statistics.median(found.host_s) for name, found in times.items()},
        "starved": [name for name, found in times.items() if found.is_starved],
        "share_of_floor": {name: floor_s / each_s for name, each_s in seconds.items()},
        "times_torch": {name: each_s / own for name, each_s in seconds.items() if own and name != OWN},
        "difference": differences,
        "unsupported": unsupported,
        "failed": failed,
    }


def host(result: Any) -> list[Any]:
    """The results of a call as float32 arrays on the host."""
    parts = result if isinstance(result, tuple) else (result,)
    return [
        part.float().cpu().numpy() if isinstance(part, torch.Tensor) else part.to_numpy().astype(np.float32)
        for part in parts
    ]


def distance(results: list[Any], expected: list[Any]) -> float:
    """The largest ||a - b|| / ||b|| of the pairs, whatever their shapes; NaN if there is one. Pure."""
    found = []
    for a, b in zip(results, expected, strict=True):
        if a.size != b.size:
            return math.inf
        difference, size = np.linalg.norm(a.reshape(-1) - b.reshape(-1)), np.linalg.norm(b.reshape(-1))
        found.append(float(difference / size) if size else float(difference))
    return math.nan if any(math.isnan(one) for one in found) else max(found)


def line(row: dict[str, Any], names: list[str]) -> str:
    """One row of the printed table."""
    parts = [f"{row['kernel']:30} floor {row['floor_s'] * 1e6:9.1f} us"]
    for name in (OWN, *names):
        if name in row["failed"]:
            parts.append(f"{name} FAILED: {row['failed'][name]}")
        elif name in row["seconds"]:
            ratio = f", {row['times_torch'][name]:.2f} torch" if name in row["times_torch"] else ""
            starved = ", starved" if name in row["starved"] else ""
            parts.append(
                f"{name} {row['seconds'][name] * 1e6:.1f} us ({row['share_of_floor'][name]:.0%} of floor"
                f"{ratio}{starved}; call {row['call_seconds'][name] * 1e6:.0f} us, host "
                f"{row['host_seconds'][name] * 1e6:.0f} us){goals(row, name) if name != OWN else ''}"
            )
        elif name in row["unsupported"]:
            parts.append(f"{name} unsupported")
    if "timing" in row["failed"]:
        parts.append(f"FAILED: {row['failed']['timing']}")
    return " | ".join(parts)


def goals(row: dict[str, Any], name: str) -> str:
    """Whether one backend's kernel meets the two goals, in words; nothing for work that has none. Pure."""
    if not row["is_goal"]:
        return ""
    share, ratio = row["share_of_floor"][name], row["times_torch"].get(name)
    words = f" [{LEAST_SHARE:.0%} of copy {'MET' if share >= LEAST_SHARE else 'MISSED'}"
    if ratio is not None:
        words += f", {MOST_TIMES_TORCH} torch {'MET' if ratio <= MOST_TIMES_TORCH else 'MISSED'}"
    return words + "]"


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    """The memory-bound kernels of one backend in a line."""
    bound = [row for row in rows if row["is_memory_bound"] and name in row["seconds"]]
    shares = [row["share_of_floor"][name] for row in bound]
    ratios = [row["times_torch"][name] for row in bound if name in row["times_torch"]]
    if not shares:
        return f"{name}: no memory-bound kernel was measured"
    slowest = f", at worst {max(ratios):.2f} of torch's time" if ratios else ""
    return f"{name}: memory-bound kernels reach {min(shares):.0%} to {max(shares):.0%} of the floor{slowest}"


if __name__ == "__main__":
    raise SystemExit(main())
