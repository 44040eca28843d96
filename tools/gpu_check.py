#!/usr/bin/env python3
"""Every CUDA backend on this machine's GPU: the judge's whole suite, a whole model, its own tests, every kernel's time.

    make gpu-check                      (or: python tools/gpu_check.py [--device cuda] [--out benchmarks/results])

Needs an NVIDIA GPU, nothing of this project installed, and no network; a backend whose packages are missing is told and
left out. Every stage is a process of its own with a time limit, and none hides another: what each found is written as
it ends, in dated JSON files with the card in their names. All of it takes less than ten minutes (--minutes), compilers
included. Two goals are told for each memory-bound kernel and element type, and do not change the exit status: that one
backend reaches 70 % of the copy bandwidth, and that none takes more than 1.25 times torch's own time. Exit status 0:
what could be run has passed, 1: something failed or was not finished, 2: there is nothing to check.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {
    "torch": "ferrum_torch:make_backend",
    "numba-cuda": "ferrum_numba.gpu:make_backend",
    "cupy": "ferrum_cupy:make_backend",
}
PACKAGES = ("numpy", "torch", "triton", "cupy-cuda13x", "numba", "numba-cuda", "cuda-bindings", "nvidia-cuda-nvrtc")
DTYPES = ("bf16", "fp32")
JUDGED_DTYPES = ("bf16", "fp32", "fp16")  # a process each: one that an illegal address ruins costs the others nothing
PARITY_BUDGET_S = 65.0  # after that no case is started
LIMITS_S = {"parity": 95.0, "model": 90.0, "tests": 60.0, "kernels": 75.0}
TESTS = {"torch": "tests/unit/backends/torch/test_cuda.py", "cupy": "tests/unit/backends/cupy/test_gpu.py"}
LEAST_SHARE = 0.70  # of the copy bandwidth, that one backend reaches at least
MOST_TIMES_TORCH = 1.25  # that none exceeds
PASSED, FAILED, LEFT_OUT, TIMED_OUT, UNFINISHED = "passed", "failed", "left out", "timed out", "unfinished"
MOST_TOLD = 4000


@dataclass
class Stage:
    """One process: what it is to do, how it ended, and in whose words."""

    kind: str
    backend: str
    command: list[str]
    dtype: str = ""
    status: str = "not started"
    seconds: float = 0.0
    message: str = ""
    file: str = ""
    document: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.kind, self.backend, self.dtype) if part)


class Check:
    """The stages of one run and the files that they leave."""

    def __init__(self, out: Path, card: str, deadline_s: float) -> None:
        self.out, self.card, self.deadline_s = out, card, deadline_s
        self.date = datetime.date.today().isoformat()
        self.stem = f"{self.date}_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}"
        self.stages: list[Stage] = []
        self._lock = threading.Lock()  # backends are judged side by side, and tell the same file

    def run(self, stage: Stage) -> Stage:
        """Run it, judge how it ended, write what it said; nothing of it is raised."""
        self.stages.append(stage)
        if stage.kind == "kernels" and version("torch") is None:
            stage.status, stage.message = LEFT_OUT, "torch is not installed; the kernels are timed beside its own"
            return self._told(stage)
        limit_s = min(LIMITS_S[stage.kind], self.deadline_s - time.monotonic())
        if limit_s < 5.0:
            stage.status, stage.message = UNFINISHED, "no time was left (--minutes)"
            return self._told(stage)
        began_s = time.monotonic()
        code, output, errors = finished(stage.command, limit_s)
        stage.seconds = time.monotonic() - began_s
        stage.message = errors.strip()[-MOST_TOLD:]
        self._judge(stage, code, output, limit_s)
        return self._told(stage)

    def _judge(self, stage: Stage, code: int | None, output: str, limit_s: float) -> None:
        if code is None:
            stage.status, stage.message = TIMED_OUT, f"stopped after {limit_s:.0f} s; {stage.message}"
        elif code == 2 and "Unsupported operation" in stage.message:
            stage.status = LEFT_OUT
        else:
            stage.status = PASSED if code == 0 else FAILED
        if stage.kind == "tests":
            if "No module named pytest" in stage.message:
                stage.status, stage.message = LEFT_OUT, "pytest is not installed"
            else:
                stage.message = output.strip()[-MOST_TOLD:] or stage.message
            return
        if stage.kind == "kernels":  # writes its own file, kernel by kernel
            stage.document = read_json(self.path(stage))
            stage.file = self.path(stage).name if stage.document is not None else ""
            print(output, end="", flush=True)
            return
        try:
            stage.document = json.loads(output)
        except ValueError:
            if stage.status == PASSED:
                stage.status, stage.message = FAILED, f"no JSON came: {output[-500:]!r}; {stage.message}"
            return
        if stage.kind == "parity" and stage.status == PASSED and (late := num_late(stage.document)):
            stage.status, stage.message = UNFINISHED, f"{late} cases were not started: the budget was used up"
        document = {"card": self.card, "date": self.date, "stage": stage.name, "seconds": stage.seconds}
        self.path(stage).write_text(json.dumps({**document, **stage.document}, indent=1) + "\n", "utf-8")
        stage.file = self.path(stage).name

    def _told(self, stage: Stage) -> Stage:
        print(f"{stage.name}: {stage.status} in {stage.seconds:.0f} s{described(stage)}", flush=True)
        self.write_summary()
        return stage

    def path(self, stage: Stage) -> Path:
        return self.out / f"{self.stem}_{stage.name.replace(' ', '_')}.json"

    def write_summary(self) -> None:
        stages = [{k: v for k, v in asdict(stage).items() if k != "document"} for stage in list(self.stages)]
        machine = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        document = {"card": self.card, "date": self.date, "driver": smi("driver_version"), "machine": machine}
        document |= {"exit_code": self.exit_code(), "goals": goals(list(self.stages)), "stages": stages}
        text = json.dumps(document, indent=1)
        with self._lock:
            (self.out / f"{self.stem}_summary.json").write_text(text + "\n", "utf-8")

    def exit_code(self) -> int:
        """0: all passed that could be run, 1: something did not, 2: nothing could be run. Pure."""
        found = {stage.status for stage in self.stages}
        if found <= {LEFT_OUT}:
            return 2
        return 0 if found <= {PASSED, LEFT_OUT} else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="names, with commas")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole run (default 9.5)")
    parser.add_argument("--card", help="do not ask nvidia-smi: the card's name, or any word to try this without one")
    parser.add_argument("--quick", action="store_true", help="a few cases and small shapes: to try this tool")
    arguments = parser.parse_args()
    names = arguments.backends.split(",")
    if unknown := [name for name in names if name not in BACKENDS]:
        parser.error(f"unknown backend {unknown[0]!r}, expected one of {', '.join(BACKENDS)}")
    card = arguments.card or smi("name")
    if card is None:
        print("gpu_check: error: nvidia-smi finds no GPU here", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.out, card, time.monotonic() + 60.0 * arguments.minutes)
    check.write_summary()
    print(f"judging {', '.join(names)} on {card}, side by side ...", flush=True)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: judge(check, name, arguments), names))
    available = [name for name in names if any(s.backend == name and s.status != LEFT_OUT for s in check.stages)]
    for dtype in DTYPES:
        for name in available:
            stage = Stage("kernels", name, [], dtype)
            check.path(stage).unlink(missing_ok=True)
            stage.command = timing(name, dtype, check.path(stage), arguments)
            check.run(stage)
    code = check.exit_code()
    for goal in goals(check.stages):
        print(goal["words"])
    for stage in check.stages:
        print(f"{stage.name:28} {stage.status:12} {stage.seconds:6.0f} s  {stage.file}")
    print(f"gpu_check: exit status {code}; {check.out / f'{check.stem}_summary.json'}")
    return code


def judge(check: Check, name: str, arguments: argparse.Namespace) -> None:
    """Everything that is judged of one backend, if it is there."""
    for stage in judging(name, arguments):
        if check.run(stage).status == LEFT_OUT:
            return


def judging(name: str, arguments: argparse.Namespace) -> Iterator[Stage]:
    """What is judged of one backend, one after the other."""
    target = ["--backend", BACKENDS[name], "--device", arguments.device]
    command = [sys.executable, "-m", "ferrum_ref.cli.main", "parity", *target, "--model", "none", "--json"]
    budget = ["--budget", str(PARITY_BUDGET_S)]
    for dtype in JUDGED_DTYPES:
        chosen = ["--dtype", dtype, *(["--small", "--op", "rms_norm"] if arguments.quick else budget)]
        yield Stage("parity", name, [*command, *chosen], dtype)
    yield Stage("model", name, [sys.executable, str(ROOT / "tools" / "gpu_model.py"), *target])
    if name in TESTS and not arguments.quick:  # of what the judge does not ask: graphs, streams, awaited operations
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-W", "default"]
        yield Stage("tests", name, [sys.executable, "-m", "pytest", *options, "-k", "not judge", TESTS[name]])


def timing(name: str, dtype: str, out: Path, arguments: argparse.Namespace) -> list[str]:
    script = str(ROOT / "benchmarks" / "gpu_kernels.py")
    target = f"{name}={BACKENDS[name]}"
    command = [sys.executable, script, "--device", arguments.device, "--backends", target, "--dtype", dtype]
    return [*command, "--json", str(out), *(["--quick", "--rounds", "1"] if arguments.quick else [])]


def finished(command: Sequence[str], limit_s: float) -> tuple[int | None, str, str]:
    """(exit status, or None beyond the limit; output; errors) of a process with all that it starts."""
    paths = [str(ROOT), str(ROOT / "backends"), str(ROOT / "simulator"), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4", **os.environ}
    if not {"CUDA_HOME", "CUDA_PATH"} & environment.keys() and (toolkit := cuda_home()) is not None:
        environment["CUDA_HOME"] = str(toolkit)  # where numba-cuda looks for NVVM when no wheel of it is installed
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return None, output, errors
    return process.returncode, output, errors


def cuda_home() -> Path | None:
    """A CUDA toolkit with NVVM on this machine."""
    found = shutil.which("nvcc")
    beside = [Path(found).resolve().parent.parent] if found else []
    for folder in (*beside, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)):
        if (folder / "nvvm").is_dir():
            return folder
    return None


def described(stage: Stage) -> str:
    """What a finished stage found, in a line; its failures in further ones. Pure."""
    if stage.document is None:
        return f": {' '.join(stage.message.split())[-500:]}" if stage.message else ""
    if stage.kind == "model":
        remark = stage.document.get("remark") or ""
        return f": {stage.document['name']}{'; ' if remark else ''}{remark}"
    if stage.kind == "kernels":
        failed = [f"\n  FAILED {row['kernel']}: {row['failed']}" for row in stage.document["rows"] if row["failed"]]
        return f": {len(stage.document['rows'])} kernels{''.join(failed)}"
    counts: dict[str, int] = {}
    lines = []
    for cell in stage.document["cells"]:
        for status, count in cell["cases"].items():
            counts[status] = counts.get(status, 0) + count
        for failure in cell["failures"][:1]:
            lines.append(
                f"\n  FAILED {cell['operation']} {cell['dtype']}: {failure['message']}; {failure['reproduce']}"
            )
    return ": " + ", ".join(f"{count} {status}" for status, count in counts.items() if count) + "".join(lines)


def goals(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the kernels' stages say of the two goals, for each kernel and element type. Pure."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages:
        for row in (stage.document or {}).get("rows", []) if stage.kind == "kernels" else []:
            if not row["is_goal"]:
                continue
            key = (row["kernel"], stage.dtype)
            new = {"kernel": key[0], "dtype": key[1], "share_of_copy": {}, "times_torch": {}, "starved": []}
            entry = found.setdefault(key, new)
            entry["starved"] += [name for name in row["starved"] if name == stage.backend]
            for figure, source in (("share_of_copy", "share_of_floor"), ("times_torch", "times_torch")):
                if stage.backend in row[source]:
                    entry[figure][stage.backend] = row[source][stage.backend]
    for entry in found.values():
        shares, times = entry["share_of_copy"], entry["times_torch"]
        best = max(shares, key=shares.get, default=None)
        behind = {name: each for name, each in times.items() if each > MOST_TIMES_TORCH}
        entry["reaches_bandwidth"] = best is not None and shares[best] >= LEAST_SHARE
        entry["keeps_up_with_torch"] = not behind
        reached = f"{best} {shares[best]:.0%} of copy bandwidth" if best is not None else "nothing was measured"
        late = ", ".join(f"{name} {each:.2f}" for name, each in behind.items())
        beside = (
            f"BEHIND torch: {late}" if late else f"none above {MOST_TIMES_TORCH} torch" if times else "torch has none"
        )
        starved = f"; the host has its part in the time of {', '.join(entry['starved'])}" if entry["starved"] else ""
        entry["words"] = (
            f"{entry['kernel']:30} {entry['dtype']}: {reached}, {LEAST_SHARE:.0%} "
            f"{'MET' if entry['reaches_bandwidth'] else 'MISSED'}; {beside}{starved}"
        )
    return list(found.values())


def num_late(document: Any) -> int:
    """Cases that the judge did not start for want of time. Pure."""
    return sum(int(cell["cases"].get("skipped", 0)) for cell in document["cells"])


def read_json(path: Path) -> Any:
    """The file's document, None where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def smi(field_name: str) -> str | None:
    """What the driver says of the first GPU."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60.0)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
