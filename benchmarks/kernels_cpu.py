#!/usr/bin/env python3
"""Kernels of a CPU backend beside the numpy reference's: same inputs, same threads, same process, calls in turn.

    python benchmarks/kernels_cpu.py [--backend numba-cpu] [--threads N] [--rounds 5] [--only TEXT ...] [--json OUT]

Each round times a few calls of one, then of the other; a figure is the median over the rounds, a ratio the median of
their ratios. "plain" is the textbook formula in numpy, one array operation after another, for the norms; the reference
backend's kernels avoid most of its temporaries. Inputs and outputs are float32. Gigabytes are the bytes of the operands
that must be read and written; the last line says how fast this machine copies, which bounds every kernel.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import copy_bandwidth, machine

NAMES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FACTORIES = {"numba-cpu": "ferrum_numba.cpu:make_backend"}  # known without being registered
AT_LEAST_S = 0.05  # of calls in a row, before the other backend's turn
PAUSE_S = 0.1  # between turns: BLAS's idle threads spin for tens of ms before they go to sleep
Case = tuple[str, int, Callable[[Any], Callable[[], Any]], Callable[[], Any] | None]


def main() -> int:
    args = parse_args()
    if any(os.environ.get(name) != str(args.threads) for name in NAMES):  # read by the libraries when they are loaded
        environment = {**os.environ, **dict.fromkeys(NAMES, str(args.threads))}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment, check=False).returncode
    from ferrum_ref.plugins import load_backend

    backends = {"numpy": load_backend("numpy"), args.backend: load_backend(FACTORIES.get(args.backend, args.backend))}
    results = {}
    print(f"{args.backend} beside numpy, {args.threads} threads, medians of {args.rounds} rounds taken in turn")
    print(f"{'':40}{'numpy us':>11}{args.backend + ' us':>14}{'GB/s':>7}{'ratio':>7}{'plain us':>10}{'ratio':>7}")
    for name, num_bytes, prepare, plain in cases():
        if args.only and not any(text in name for text in args.only):
            continue
        calls = [prepare(backend) for backend in backends.values()]
        found = measured([*calls, *([plain] if plain else [])], args.rounds)
        times = dict(zip(("numpy_s", "backend_s", "plain_s"), found, strict=False))
        medians = [statistics.median(rounds) for rounds in found]
        shares = [
            statistics.median(one / ours for one, ours in zip(rounds, found[1], strict=True))
            for rounds in (found[0], *found[2:])
        ]
        line = f"{name:40}{medians[0] * 1e6:11.1f}{medians[1] * 1e6:14.1f}{num_bytes / medians[1] / 1e9:7.1f}"
        line += f"{shares[0]:7.2f}" + (f"{medians[2] * 1e6:10.1f}{shares[1]:7.2f}" if plain else "")
        print(line, flush=True)
        results[name] = {
            **times,
            "ratio": shares[0],
            "bytes": num_bytes,
            **({"plain_ratio": shares[1]} if plain else {}),
        }
    copied = copy_bandwidth()
    print(f"copying reads and writes {copied / 1e9:.1f} GB/s on one thread")
    report = {
        "benchmark": "kernels_cpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": args.backend,
        "threads": args.threads,
        "rounds": args.rounds,
        "kernels": results,
        "copy_bytes_per_s": copied,
        "machine": machine("numba", "llvmlite"),
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numba-cpu", metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each backend (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases with one of these texts in their names")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, dated, with the machine in them")
    return parser.parse_args()


def measured(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds a call, for each of the calls, round by round."""
    counts = []
    for call in calls:
        call()  # compiles
        began_s = time.perf_counter()
        call()
        counts.append(max(1, int(AT_LEAST_S / (time.perf_counter() - began_s))))
    found: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, count, times in zip(calls, counts, found, strict=True):
            time.sleep(PAUSE_S)
            began_s = time.perf_counter()
            for _ in range(count):
                call()
            if number:  # the first round warms up
                times.append((time.perf_counter() - began_s) / count)
    return found


def cases() -> Iterator[Case]:
    """(name, bytes that must be moved, backend -> call), one by one."""
    yield from norms()
    yield from activations()
    yield from decode_attention()
    yield from prefill_attention()
    yield from products()


def drawn(*shape: int) -> Any:
    import numpy as np

    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def norms() -> Iterator[Case]:
    for rows, size in ((512, 4096), (128, 576), (64, 4096), (1, 4096)):
        x, weight = drawn(rows, size), drawn(size)

        def fused(backend: Any, x: Any = x, weight: Any = weight) -> Callable[[], Any]:
            norm, make = backend.kernel_ops().norm_ops(), backend.tensor_factory().from_numpy
            data, gain = make(x), make(weight)
            return lambda: norm.rms_norm(data, gain, 1e-5)

        def residual(backend: Any, x: Any = x, weight: Any = weight) -> Callable[[], Any]:
            norm, make = backend.kernel_ops().norm_ops(), backend.tensor_factory().from_numpy
            data, gain = make(x), make(weight)
            return lambda: norm.rms_norm_residual(data, data, gain, 1e-5)

        def layer(backend: Any, x: Any = x, weight: Any = weight) -> Callable[[], Any]:
            ops, make = backend.tensor_ops(), backend.tensor_factory().from_numpy
            data, gain = make(x), make(weight)
            return lambda: ops.layer_norm(data, gain, gain, 1e-5)

        yield f"rms_norm {rows}x{size}", 2 * x.nbytes, fused, lambda x=x, w=weight: plain_rms_norm(x, w)
        yield f"rms_norm_residual {rows}x{size}", 4 * x.nbytes, residual, lambda x=x, w=weight: plain_rms_norm(x + x, w)
        yield f"layer_norm {rows}x{size}", 2 * x.nbytes, layer, lambda x=x, w=weight: plain_layer_norm(x, w)


def plain_rms_norm(x: Any, weight: Any) -> Any:
    import numpy as np

    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(1e-5)) * weight


def plain_layer_norm(x: Any, weight: Any) -> Any:
    import numpy as np

    centred = x - np.mean(x, axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + np.float32(1e-5)) * weight + weight


def activations() -> Iterator[Case]:
    gate, x = drawn(128, 1536), drawn(1, 128, 12, 64)
    tables = drawn(2, 256, 32)

    def silu_mul(backend: Any) -> Callable[[], Any]:
        data = backend.tensor_factory().from_numpy(gate)
        return lambda: backend.kernel_ops().activation_ops().silu_mul(data, data)

    def rotary(backend: Any) -> Callable[[], Any]:
        data, cos, sin = (backend.tensor_factory().from_numpy(array) for array in (x, *tables))
        return lambda: backend.kernel_ops().position_ops().rotary_embedding(data, cos, sin, range(128))

    yield "silu_mul 128x1536", 3 * gate.nbytes, silu_mul, None
    yield "rotary_embedding 128x12x64", 2 * x.nbytes, rotary, None


def decode_attention() -> Iterator[Case]:
    import numpy as np

    from ferrum_ref.interfaces.kernel_ops import AttentionParams

    for batch, keys, heads, groups, size in ((1, 4096, 9, 3, 64), (1, 4096, 32, 8, 128), (8, 4096, 9, 3, 64)):
        num_blocks = batch * keys // 16
        table = np.random.default_rng(0).permutation(num_blocks).reshape(batch, -1)
        arrays = (drawn(batch, heads, size), *(drawn(num_blocks, 16, groups, size) for _ in range(2)))
        params = AttentionParams(
            num_heads=heads, num_kv_heads=groups, head_dim=size, softmax_scale=size**-0.5, causal=True
        )

        def attend(backend: Any, arrays: Any = arrays, table: Any = table, params: Any = params) -> Callable[[], Any]:
            attention = backend.kernel_ops().attention_ops()
            q, k, v = (backend.tensor_factory().from_numpy(array) for array in arrays)
            lens = [table.shape[1] * 16] * len(table)
            return lambda: attention.paged_attention(q, k, v, table, params, context_lens=lens)

        yield f"paged decode {batch}x{keys} H={heads} G={groups} D={size}", arrays[1].nbytes * 2, attend, None


def prefill_attention() -> Iterator[Case]:
    from ferrum_ref.interfaces.kernel_ops import AttentionParams

    params = AttentionParams(num_heads=9, num_kv_heads=3, head_dim=64, softmax_scale=0.125, causal=True)
    for tokens in (128, 1024):
        arrays = (drawn(1, tokens, 9, 64), *(drawn(1, tokens, 3, 64) for _ in range(2)))

        def attend(backend: Any, arrays: Any = arrays) -> Callable[[], Any]:
            attention = backend.kernel_ops().attention_ops()
            q, k, v = (backend.tensor_factory().from_numpy(array) for array in arrays)
            return lambda: attention.attention(q, k, v, params)

        yield f"prefill attention {tokens} H=9 G=3 D=64", sum(array.nbytes for array in arrays), attend, None


def products() -> Iterator[Case]:
    import numpy as np

    from ferrum_ref.interfaces.kernel_ops import QuantScheme

    for name, block, scheme in (("q4_0", 18, QuantScheme.Q4_0(32)), ("q8_0", 34, QuantScheme.Q8_0(32))):
        for rows in (1, 128):
            packed = np.random.default_rng(1).integers(0, 60, (4096, 4096 // 32 * block)).astype(np.uint8)
            x = drawn(rows, 4096)

            def multiply(
                backend: Any, x: Any = x, packed: Any = packed, scheme: QuantScheme = scheme
            ) -> Callable[[], Any]:
                linear, make = backend.kernel_ops().linear_ops(), backend.tensor_factory().from_numpy
                data, weight = make(x), make(packed)
                return lambda: linear.quantized_linear(data, weight, scheme)

            yield f"quantized_linear {name} {rows}x4096x4096", packed.nbytes, multiply, None
    dense, x = drawn(4096, 4096), drawn(1, 4096)

    def linear(backend: Any) -> Callable[[], Any]:
        data, weight = backend.tensor_factory().from_numpy(x), backend.tensor_factory().from_numpy(dense)
        return lambda: backend.kernel_ops().linear_ops().linear(data, weight)

    yield "linear 1x4096x4096", dense.nbytes, linear, None


if __name__ == "__main__":
    sys.exit(main())
