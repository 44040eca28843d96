#!/usr/bin/env python3
"""Kernel by kernel on the CPU: the numpy reference and the torch backend, through the contracts, in turns.

    python benchmarks/torch_kernels_cpu.py [--threads N] [--dtype fp32] [--rounds 7] [--json OUT]

Shapes are those of SmolLM2-135M: one decode step at 512 cached tokens, and a prefill of 128. Figures are the medians
over the rounds of the mean time of a call, wrappers included. Weights rotate through enough copies to defeat caches.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCAB, CACHED = 576, 1536, 9, 3, 64, 49152, 512
NUM_COPIES = 48  # of a layer's weight: 170 MB of float32
BACKENDS = ("numpy", "torch")
SECONDS_PER_ROUND = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each backend (default: all cores)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, dated, with the machine in them")
    args = parser.parse_args()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy and torch are imported
        os.environ[name] = str(args.threads)
    calls = {name: kernels_of(name, args.dtype) for name in BACKENDS}
    rows = [measure(label, [calls[name][label] for name in BACKENDS], args.rounds) for label in calls[BACKENDS[0]]]
    print(f"{'microseconds a call, ' + args.dtype:34} {'numpy':>9} {'torch':>9} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['kernel']:34} {row['numpy_us']:9.1f} {row['torch_us']:9.1f} {row['numpy_us'] / row['torch_us']:7.2f}"
        )
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        report = {"date": datetime.date.today().isoformat(), **machine, "threads": args.threads, "dtype": args.dtype}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def kernels_of(name: str, dtype: str) -> dict[str, Callable[[], Any]]:
    """Each measured call of one backend, by label."""
    import numpy as np

    from ferrum_ref.interfaces.kernel_ops import AttentionParams
    from ferrum_ref.plugins import load_backend
    from ferrum_ref.types.devices import DataType

    backend = load_backend(name)
    factory, kernels = backend.tensor_factory(), backend.kernel_ops()
    rng, target = np.random.default_rng(0), DataType[dtype.upper()]

    def draw(*shape: int) -> Any:
        return factory.from_numpy(rng.standard_normal(shape, np.float32)).to_dtype(target)

    params = AttentionParams(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, True)
    gain, cos, sin = draw(HIDDEN), draw(2048, HEAD_DIM // 2), draw(2048, HEAD_DIM // 2)
    keys, values = draw(1, CACHED, KV_HEADS, HEAD_DIM), draw(1, CACHED, KV_HEADS, HEAD_DIM)
    cache = draw(64, 16, KV_HEADS, HEAD_DIM)
    table = np.random.default_rng(1).permutation(64)[: CACHED // 16]
    weights = itertools.cycle([draw(FEED_FORWARD, HIDDEN) for _ in range(NUM_COPIES)])
    head = draw(VOCAB, HIDDEN)
    calls: dict[str, Callable[[], Any]] = {}
    for step, rows in (("decode", 1), ("prefill 128", 128)):
        x, heads, gate = draw(rows, HIDDEN), draw(1, rows, HEADS, HEAD_DIM), draw(rows, FEED_FORWARD)
        new = draw(rows, KV_HEADS, HEAD_DIM)
        positions = np.arange(CACHED - rows, CACHED)
        calls |= {
            f"{step}: rms_norm_residual": lambda x=x: kernels.norm_ops().rms_norm_residual(x, x, gain, 1e-5),
            f"{step}: rotary_embedding": lambda h=heads, p=positions: kernels.position_ops().rotary_embedding(
                h, cos, sin, p
            ),
            f"{step}: write_kv": lambda n=new, p=positions: kernels.attention_ops().write_kv(cache, n, p),
            f"{step}: attention": lambda h=heads: kernels.attention_ops().attention(h, keys, values, params),
            f"{step}: paged_attention": lambda h=heads: kernels.attention_ops().paged_attention(
                h, cache, cache, table, params, context_lens=[CACHED]
            ),
            f"{step}: silu_mul": lambda g=gate: kernels.activation_ops().silu_mul(g, g),
            f"{step}: linear 576 -> 1536": lambda x=x: kernels.linear_ops().linear(x, next(weights)),
        }
    one, logits = draw(1, HIDDEN), draw(VOCAB)
    calls["decode: linear 576 -> 49152"] = lambda: kernels.linear_ops().linear(one, head)
    calls["decode: argmax of 49152"] = lambda: kernels.sampling_ops().argmax(logits)
    return calls


def measure(label: str, calls: list[Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median over the rounds of each call's mean time, the backends taking turns."""
    repeats = []
    for call in calls:
        call()
        began_s = time.perf_counter()
        call()
        repeats.append(max(1, min(2000, int(SECONDS_PER_ROUND / (time.perf_counter() - began_s)))))
    times_us: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for found, call, count in zip(times_us, calls, repeats, strict=True):
            began_s = time.perf_counter()
            for _ in range(count):
                call()
            found.append((time.perf_counter() - began_s) / count * 1e6)
    numpy_us, torch_us = (statistics.median(found) for found in times_us)
    return {"kernel": label, "numpy_us": numpy_us, "torch_us": torch_us}


if __name__ == "__main__":
    raise SystemExit(main())
