#!/usr/bin/env python3
"""Every CUDA backend on this machine's GPU: the judge's whole suite, the real model, then every kernel's time.

    make gpu-check                      (or: python tools/gpu_check.py [--device cuda] [--out benchmarks/results])

Needs an NVIDIA GPU; a backend whose packages are missing is told and left out. Results are dated JSON files with the
card in their names. Exit status 0: all passed, 1: something failed, 2: there is nothing to check.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {
    "torch": "ferrum_torch:make_backend",
    "numba-cuda": "ferrum_numba.gpu:make_backend",
    "cupy": "ferrum_cupy:make_backend",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="names, with commas")
    arguments = parser.parse_args()
    names = arguments.backends.split(",")
    if unknown := [name for name in names if name not in BACKENDS]:
        parser.error(f"unknown backend {unknown[0]!r}, expected one of {', '.join(BACKENDS)}")
    card = card_name()
    if card is None:
        print("gpu_check: error: nvidia-smi finds no GPU here", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}"
    codes = [judged(name, arguments, stem, card) for name in names]
    timed = [name for name, code in zip(names, codes, strict=True) if code != 2]
    if not timed:
        return 2
    for dtype in ("bf16", "fp32"):
        out = arguments.out / f"{stem}_kernels_{dtype}.json"
        script = str(ROOT / "benchmarks" / "gpu_kernels.py")
        targets = ",".join(BACKENDS[name] for name in timed)
        command = [sys.executable, script, "--device", arguments.device, "--backends", targets, "--dtype", dtype]
        codes.append(subprocess.run([*command, "--json", str(out)], check=False).returncode)
    return 1 if 1 in codes else 0


def card_name() -> str | None:
    """What the driver calls the first GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def judged(name: str, arguments: argparse.Namespace, stem: str, card: str) -> int:
    """The judge's exit status on one backend; its whole document goes to a file, a line to the terminal."""
    command = [sys.executable, "-m", "ferrum_ref.cli.main", "parity", "--backend", BACKENDS[name]]
    command += ["--device", arguments.device, "--json"]
    print(f"{name}: judging on {card} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2 or not done.stdout:
        print(f"{name}: left out: {done.stderr.strip()}", flush=True)
        return 2
    document: dict[str, Any] = {"card": card, "date": datetime.date.today().isoformat(), **json.loads(done.stdout)}
    (arguments.out / f"{stem}_parity_{name}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    counts: dict[str, int] = {}
    for cell in document["cells"]:
        for status, count in cell["cases"].items():
            counts[status] = counts.get(status, 0) + count
    model = document["model"]
    told = "model left out" if model is None else f"{model['name']} {model['status']}"
    print(f"{name}: {', '.join(f'{n} {status}' for status, n in counts.items() if n)}; {told}", flush=True)
    for cell in document["cells"]:
        for failure in cell["failures"][:1]:
            print(f"  FAILED {cell['operation']} {cell['dtype']}: {failure['message']}; {failure['reproduce']}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
