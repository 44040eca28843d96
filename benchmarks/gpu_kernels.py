#!/usr/bin/env python3
"""Each kernel's time against the floor that this card sets, beside torch's own kernel for the same work.

    python benchmarks/gpu_kernels.py [--device cuda] [--backends torch,numba-cuda,cupy] [--dtype bf16] [--json OUT]

The floor is max(bytes / copy bandwidth, operations / matmul rate), both ceilings measured in the same run on the same
card. Bytes are what the work must move at least: every input read once, every output written once. "floor" is the share
of the floor that a kernel reaches (1 is the card's own limit), "vs torch" its time divided by torch's. The contenders
take turns; figures are medians over the rounds of the mean time of a launch, wrappers included. Large operands rotate
through copies so that caches do not help. `--device cpu --quick` runs the same script where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ferrum_ref.errors import FerrumError, UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams, QuantScheme
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SECONDS_PER_ROUND = 0.1
CACHE_BYTES = 128 << 20  # larger than any card's cache
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Sizes:
    """Shapes of the work: a model of 8 billion parameters, or something that a CPU does in no time."""

    rows: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int

    @staticmethod
    def of(quick: bool) -> Sizes:
        return Sizes(64, 256, 512, 8, 2, 64, 4, 256) if quick else Sizes(8192, 4096, 14336, 32, 8, 128, 64, 4096)


@dataclass
class Work:
    """One kernel: what it must move and compute, torch's own way, and each backend's."""

    name: str
    num_bytes: float
    num_operations: float
    torch_call: Callable[[], Any] | None
    calls: dict[str, Callable[[], Any]]
    torch_way: str = ""


def main() -> int:
    args = parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu_kernels: error: torch finds no CUDA device here (--device cpu --quick tries the script)",
            file=sys.stderr,
        )
        return 2
    sizes = Sizes.of(args.quick)
    card = Card(args.device, args.dtype, args.quick)
    backends = opened(args.backends.split(","), args.device)
    if not backends:
        return 2
    rows = []
    for work in works(card, sizes, backends):
        rows.append(measured(work, card, args.rounds))
        print(line(rows[-1], list(backends)), flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "card": card.name,
        "device": args.device,
        "dtype": args.dtype,
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "copy_bytes_per_s": card.bandwidth,
        "matmul_operations_per_s": card.rate,
        "rounds": args.rounds,
        "sizes": sizes.__dict__,
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="torch,numba-cuda,cupy", help="names, with commas")
    parser.add_argument("--dtype", choices=tuple(TORCH_TYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, dated, with the card in them")
    return parser.parse_args()


class Card:
    """The device as torch sees it, and its ceilings.  `sync` waits for everything, whoever launched it."""

    def __init__(self, device: str, dtype: str, quick: bool) -> None:
        self.device, self.dtype, self.torch_type = torch.device(device), dtype, TORCH_TYPES[dtype]
        self.is_cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.is_cuda else platform.processor() or "cpu"
        count = (1 << 22) if quick else (1 << 29)
        source = torch.empty(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * count / self.time_of(lambda: target.copy_(source))
        side = 256 if quick else 8192
        a = torch.randn(side, side, device=self.device).to(self.torch_type)
        self.rate = 2 * side**3 / self.time_of(lambda: a @ a)
        print(f"{self.name}, {dtype}: copies {self.bandwidth / 1e9:,.0f} GB/s, matmul {self.rate / 1e12:,.1f} TFLOP/s")

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time_of(self, call: Callable[[], Any], rounds: int = 5) -> float:
        """Median seconds of one launch, launches queued back to back."""
        return statistics.median(self.times_of({"": call}, rounds)[""])

    def times_of(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        counts = {}
        for name, call in calls.items():
            call()
            self.sync()
            began_s = time.perf_counter()
            call()
            self.sync()
            counts[name] = max(1, min(1000, int(SECONDS_PER_ROUND / (time.perf_counter() - began_s))))
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                self.sync()
                began_s = time.perf_counter()
                for _ in range(counts[name]):
                    call()
                self.sync()
                found[name].append((time.perf_counter() - began_s) / counts[name])
        return found


def opened(names: list[str], device: str) -> dict[str, ComputeBackend]:
    """The backends that are available; the others with their reason on standard error."""
    found = {}
    for name in names:
        try:
            found[name] = load_backend(name, device)
        except FerrumError as error:
            print(f"{name}: {error.message}", file=sys.stderr)
    return found


class Operands:
    """Random tensors, the same numbers in torch and in every backend, in copies that defeat the cache."""

    def __init__(self, card: Card, backends: dict[str, ComputeBackend]) -> None:
        self.card, self.backends, self.rng = card, backends, np.random.default_rng(0)

    def draw(self, *shape: int, rotate: bool = True) -> tuple[Callable[[], torch.Tensor], dict[str, Callable[[], Any]]]:
        """A source of torch tensors and, for each backend, one of its own."""
        values = self.rng.standard_normal(shape, np.float32)
        return self.of(values, DataType[self.card.dtype.upper()], rotate)

    def of(
        self, values: Any, dtype: DataType | None, rotate: bool = True
    ) -> tuple[Callable[[], torch.Tensor], dict[str, Callable[[], Any]]]:
        size = values.size * (dtype.size_bytes() if dtype else values.itemsize)
        copies = max(1, min(16, -(-CACHE_BYTES // size))) if rotate and self.card.is_cuda else 1
        plain = torch.from_numpy(values).to(self.card.device)
        native = plain.to(self.card.torch_type) if dtype else plain
        ring = itertools.cycle([native.clone() for _ in range(copies)])
        own: dict[str, Callable[[], Any]] = {}
        for name, backend in self.backends.items():
            factory = backend.tensor_factory()
            tensor = factory.from_numpy(values)
            cycle = itertools.cycle(
                [(tensor.to_dtype(dtype) if dtype else factory.from_numpy(values)) for _ in range(copies)]
            )
            own[name] = lambda cycle=cycle: next(cycle)
        return lambda: next(ring), own


def works(card: Card, sizes: Sizes, backends: dict[str, ComputeBackend]) -> list[Work]:
    """Everything that is measured."""
    element = DataType[card.dtype.upper()].size_bytes()
    make = Operands(card, backends)
    kernels = {name: backend.kernel_ops() for name, backend in backends.items()}
    found: list[Work] = []

    def add(
        name: str,
        num_bytes: float,
        operations: float,
        torch_call: Any,
        per_backend: Callable[[str, Any], Any],
        way: str,
    ) -> None:
        calls = {backend: per_backend(backend, ops) for backend, ops in kernels.items() if ops is not None}
        found.append(Work(name, num_bytes, operations, torch_call, calls, way))

    rows, hidden, inner = sizes.rows, sizes.hidden, sizes.feed_forward
    x, xs = make.draw(rows, hidden)
    gain, gains = make.draw(hidden, rotate=False)
    add(
        "rms_norm", 2 * rows * hidden * element, 0, lambda: functional.rms_norm(x(), (hidden,), gain(), 1e-5),
        lambda b, ops: lambda: ops.norm_ops().rms_norm(xs[b](), gains[b](), 1e-5), "rms_norm",
    )  # fmt: skip
    r, rs = make.draw(rows, hidden)

    def torch_residual() -> Any:
        total = x() + r()
        return functional.rms_norm(total, (hidden,), gain(), 1e-5), total

    add(
        "rms_norm_residual", 4 * rows * hidden * element, 0, torch_residual,
        lambda b, ops: lambda: ops.norm_ops().rms_norm_residual(xs[b](), rs[b](), gains[b](), 1e-5), "add, rms_norm",
    )  # fmt: skip
    gate, gates = make.draw(rows // 4, inner)
    add(
        "silu_mul", 3 * (rows // 4) * inner * element, 0, lambda: functional.silu(gate()) * gate(),
        lambda b, ops: lambda: ops.activation_ops().silu_mul(gates[b](), gates[b]()), "silu, mul",
    )  # fmt: skip
    heads, heads_of = make.draw(1, rows, sizes.heads, sizes.head_dim)
    cos, cos_of = make.draw(rows, sizes.head_dim // 2, rotate=False)
    positions = np.arange(rows)

    def torch_rope() -> Any:
        first, second = heads().chunk(2, -1)
        c, s = cos()[None, :, None], cos()[None, :, None]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    add(
        "rotary_embedding", 2 * rows * sizes.heads * sizes.head_dim * element, 0, torch_rope,
        lambda b, ops: lambda: ops.position_ops().rotary_embedding(heads_of[b](), cos_of[b](), cos_of[b](), positions),
        "mul, sub, add, cat",
    )  # fmt: skip
    weight, weights = make.draw(inner, hidden)
    for label, count in (("linear, 1 row", 1), (f"linear, {rows // 4} rows", rows // 4)):
        few, fews = make.draw(count, hidden, rotate=False)
        moved = (inner * hidden + count * (hidden + inner)) * element
        add(
            label, moved, 2 * count * inner * hidden, lambda few=few: functional.linear(few(), weight()),
            lambda b, ops, fews=fews: lambda: ops.linear_ops().linear(fews[b](), weights[b]()), "linear",
        )  # fmt: skip
    _, ones = make.draw(1, hidden, rotate=False)
    for label, scheme, block_bytes in (
        ("quantized_linear q4_0, 1 row", QuantScheme.Q4_0(group_size=32), 18),
        ("quantized_linear q8_0, 1 row", QuantScheme.Q8_0(group_size=32), 34),
    ):
        packed = make.rng.integers(0, 256, (inner, hidden // 32 * block_bytes), np.uint8)
        packed.reshape(inner, -1, block_bytes)[:, :, :2] = np.array([0x11, 0x21], np.uint8)  # small positive scales
        _, packs = make.of(packed, None)
        add(
            label, packed.size + (hidden + inner) * element, 2 * inner * hidden, None,
            lambda b, ops, packs=packs, scheme=scheme: lambda: ops.linear_ops().quantized_linear(
                ones[b](), packs[b](), scheme
            ),
            "torch has no kernel for this layout",
        )  # fmt: skip
    add_attention(add, make, sizes, element)
    return found


def add_attention(add: Any, make: Operands, sizes: Sizes, element: int) -> None:
    """Paged decode attention: one query a sequence, keys and values in shuffled blocks."""
    batch, context, kv_heads, size = sizes.batch, sizes.context, sizes.kv_heads, sizes.head_dim
    blocks = batch * context // BLOCK_SIZE
    cache, caches = make.draw(blocks, BLOCK_SIZE, kv_heads, size, rotate=False)
    other, others = make.draw(blocks, BLOCK_SIZE, kv_heads, size, rotate=False)
    query, queries = make.draw(batch, sizes.heads, size, rotate=False)
    table = np.random.default_rng(1).permutation(blocks).reshape(batch, -1)
    lengths = [context] * batch
    params = AttentionParams(sizes.heads, kv_heads, size, size**-0.5, True)

    def torch_attention() -> Any:
        """Contiguous keys and values: torch has no paged kernel, so it is spared the gathering."""
        k, v = (each().view(batch, context, kv_heads, size).transpose(1, 2) for each in (cache, other))
        return functional.scaled_dot_product_attention(query().unsqueeze(2), k, v, enable_gqa=True)

    add(
        f"paged_attention, {batch} x {context}", 2 * batch * context * kv_heads * size * element,
        4 * batch * context * sizes.heads * size, torch_attention,
        lambda b, ops: lambda: ops.attention_ops().paged_attention(
            queries[b](), caches[b](), others[b](), table, params, context_lens=lengths
        ),
        "scaled_dot_product_attention, contiguous",
    )  # fmt: skip


def measured(work: Work, card: Card, rounds: int) -> dict[str, Any]:
    """Seconds of torch's way and of each backend, and what they are of the floor."""
    floor_s = max(work.num_bytes / card.bandwidth, work.num_operations / card.rate)
    calls = {"torch's own": work.torch_call} if work.torch_call else {}
    unsupported: dict[str, str] = {}
    for name, call in work.calls.items():
        try:
            call()
            calls[name] = call
        except UnsupportedError as error:
            unsupported[name] = error.message
    times = {name: statistics.median(found) for name, found in card.times_of(calls, rounds).items()}
    own = times.get("torch's own")
    return {
        "kernel": work.name,
        "bytes": work.num_bytes,
        "operations": work.num_operations,
        "floor_s": floor_s,
        "torch_way": work.torch_way,
        "seconds": times,
        "share_of_floor": {name: floor_s / seconds for name, seconds in times.items()},
        "times_torch": {name: seconds / own for name, seconds in times.items() if own and name != "torch's own"},
        "unsupported": unsupported,
    }


def line(row: dict[str, Any], names: list[str]) -> str:
    """One row of the printed table."""
    parts = [f"{row['kernel']:30} floor {row['floor_s'] * 1e6:9.1f} us"]
    for name in ("torch's own", *names):
        if name in row["seconds"]:
            ratio = f", {row['times_torch'][name]:.2f}x torch" if name in row["times_torch"] else ""
            parts.append(
                f"{name} {row['seconds'][name] * 1e6:.1f} us ({row['share_of_floor'][name]:.0%} of floor{ratio})"
            )
        elif name in row["unsupported"]:
            parts.append(f"{name} unsupported")
    return " | ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
