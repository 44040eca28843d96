"""The work that `gpu_kernels.py` measures: operands, torch's way, each backend's.

Operands are the same numbers in torch and in every backend, in as many copies as it takes to outgrow the caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.kernel_ops import AttentionParams, QuantScheme
from ferrum_ref.types.devices import DataType

CACHE_BYTES = 160 << 20  # several times any card's cache
MOST_COPIES = 16
BLOCK_SIZE = 16
DRAWN = 1 << 24  # random numbers; larger operands repeat them

Source = Callable[[], Any]
PerBackend = Callable[[str, Any], Callable[[], Any]]


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
    expected: Callable[[], Any] | None = None  # the result, where torch has no way that is worth timing
    is_goal: bool = True  # a kernel of this project, to be held to a share of the bandwidth and to torch's time


class Operands:
    """Random tensors in torch and in every backend."""

    def __init__(
        self, device: torch.device, dtype: str, torch_type: torch.dtype, backends: dict[str, ComputeBackend]
    ) -> None:
        self.device, self.torch_type, self.backends = device, torch_type, backends
        self.data_type = DataType[dtype.upper()]
        self.element = self.data_type.size_bytes()
        self.kernels = {name: backend.kernel_ops() for name, backend in backends.items()}
        self.rng = np.random.default_rng(0)
        self._drawn = self.rng.standard_normal(DRAWN, np.float32)

    def draw(self, *shape: int, rotate: bool = True) -> tuple[Source, dict[str, Source]]:
        """A source of torch tensors and, for each backend, one of its own."""
        return self.of(np.resize(self._drawn, shape), self.data_type, rotate)

    def of(self, values: Any, dtype: DataType | None, rotate: bool = True) -> tuple[Source, dict[str, Source]]:
        """The same of given values, in `dtype` or as they are."""
        size = values.size * (dtype.size_bytes() if dtype else values.itemsize)
        is_rotated = rotate and self.device.type == "cuda"
        copies = max(1, min(MOST_COPIES, -(-CACHE_BYTES // size))) if is_rotated else 1
        plain = torch.from_numpy(values).to(self.device)
        native = plain.to(self.torch_type) if dtype else plain
        ring = itertools.cycle([native, *(native.clone() for _ in range(copies - 1))])
        own: dict[str, Source] = {}
        for name, backend in self.backends.items():
            factory = backend.tensor_factory()
            first = factory.from_numpy(values)
            first = first.to_dtype(dtype) if dtype else first
            cycle = itertools.cycle([first, *(factory.from_tensor(first, first.device()) for _ in range(copies - 1))])
            own[name] = lambda cycle=cycle: next(cycle)  # type: ignore[misc]
        return lambda: next(ring), own

    def work(
        self, name: str, num_bytes: float, operations: float, torch_call: Any, per_backend: PerBackend, way: str
    ) -> Work:
        calls = {backend: per_backend(backend, ops) for backend, ops in self.kernels.items() if ops is not None}
        return Work(name, num_bytes, operations, torch_call, calls, way)


def works(make: Operands, sizes: Sizes) -> Iterator[Callable[[], Work]]:
    """Everything that is measured, made one after the other so that memory holds one kernel's operands."""
    yield lambda: rms_norm(make, sizes)
    yield lambda: rms_norm_residual(make, sizes)
    yield lambda: layer_norm(make, sizes)
    yield lambda: silu_mul(make, sizes)
    yield lambda: rotary(make, sizes)
    for scheme, label, block_bytes in (
        (QuantScheme.Q4_0(group_size=32), "q4_0", 18),
        (QuantScheme.Q8_0(group_size=32), "q8_0", 34),
    ):
        yield lambda scheme=scheme, label=label, size=block_bytes: quantized(make, sizes, scheme, label, size)  # type: ignore[misc]
    yield lambda: paged_attention(make, sizes)
    yield lambda: linear(make, sizes, 1)
    yield lambda: linear(make, sizes, sizes.rows // 4)


def rms_norm(make: Operands, sizes: Sizes) -> Work:
    (x, xs), (gain, gains) = make.draw(sizes.rows, sizes.hidden), make.draw(sizes.hidden, rotate=False)
    return make.work(
        "rms_norm", 2 * sizes.rows * sizes.hidden * make.element, 0,
        lambda: functional.rms_norm(x(), (sizes.hidden,), gain(), 1e-5),
        lambda b, ops: lambda: ops.norm_ops().rms_norm(xs[b](), gains[b](), 1e-5), "rms_norm",
    )  # fmt: skip


def rms_norm_residual(make: Operands, sizes: Sizes) -> Work:
    (x, xs), (gain, gains) = make.draw(sizes.rows, sizes.hidden), make.draw(sizes.hidden, rotate=False)
    r, rs = make.draw(sizes.rows, sizes.hidden)

    def torch_residual() -> Any:
        total = x() + r()
        return functional.rms_norm(total, (sizes.hidden,), gain(), 1e-5), total

    return make.work(
        "rms_norm_residual", 4 * sizes.rows * sizes.hidden * make.element, 0, torch_residual,
        lambda b, ops: lambda: ops.norm_ops().rms_norm_residual(xs[b](), rs[b](), gains[b](), 1e-5), "add, rms_norm",
    )  # fmt: skip


def layer_norm(make: Operands, sizes: Sizes) -> Work:
    (x, xs), (gain, gains) = make.draw(sizes.rows, sizes.hidden), make.draw(sizes.hidden, rotate=False)
    tensor_ops = {name: backend.tensor_ops() for name, backend in make.backends.items()}
    return make.work(
        "layer_norm", 2 * sizes.rows * sizes.hidden * make.element, 0,
        lambda: functional.layer_norm(x(), (sizes.hidden,), gain(), gain(), 1e-5),
        lambda b, ops: lambda: tensor_ops[b].layer_norm(xs[b](), gains[b](), gains[b](), 1e-5), "layer_norm",
    )  # fmt: skip


def silu_mul(make: Operands, sizes: Sizes) -> Work:
    rows = sizes.rows // 4
    gate, gates = make.draw(rows, sizes.feed_forward)
    up, ups = make.draw(rows, sizes.feed_forward)
    return make.work(
        "silu_mul", 3 * rows * sizes.feed_forward * make.element, 0, lambda: functional.silu(gate()) * up(),
        lambda b, ops: lambda: ops.activation_ops().silu_mul(gates[b](), ups[b]()), "silu, mul",
    )  # fmt: skip


def rotary(make: Operands, sizes: Sizes) -> Work:
    heads, heads_of = make.draw(1, sizes.rows, sizes.heads, sizes.head_dim)
    cos, cos_of = make.draw(sizes.rows, sizes.head_dim // 2, rotate=False)
    positions = np.arange(sizes.rows)

    def torch_rope() -> Any:
        first, second = heads().chunk(2, -1)
        c, s = cos()[None, :, None], cos()[None, :, None]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    return make.work(
        "rotary_embedding", 2 * sizes.rows * sizes.heads * sizes.head_dim * make.element, 0, torch_rope,
        lambda b, ops: lambda: ops.position_ops().rotary_embedding(heads_of[b](), cos_of[b](), cos_of[b](), positions),
        "mul, sub, add, cat",
    )  # fmt: skip


def quantized(make: Operands, sizes: Sizes, scheme: Any, label: str, block_bytes: int) -> Work:
    """Gate and up in one matrix, as models that are quantised for speed keep them; torch multiplies it unpacked."""
    outputs, inner = 2 * sizes.feed_forward, sizes.hidden
    packed = np.resize(make.rng.integers(0, 256, DRAWN, np.uint8), (outputs, inner // 32 * block_bytes)).copy()
    packed.reshape(outputs, -1, block_bytes)[:, :, :2] = np.array([0x11, 0x21], np.uint8)  # small positive scales
    _, packs = make.of(packed, None)
    one, ones = make.draw(1, inner, rotate=False)
    scale = float(np.array([0x11, 0x21], np.uint8).view(np.float16)[0])

    def expected() -> Any:
        blocks = torch.from_numpy(packed).to(make.device).view(outputs, -1, block_bytes)[:, :, 2:]
        codes = torch.cat((blocks & 15, blocks >> 4), -1).float() - 8 if label == "q4_0" else blocks.view(torch.int8)
        return one().float() @ (scale * codes.float()).view(outputs, inner).t()

    found = make.work(
        f"quantized_linear {label}, 1 row", packed.size + (inner + outputs) * make.element, 2 * outputs * inner, None,
        lambda b, ops: lambda: ops.linear_ops().quantized_linear(ones[b](), packs[b](), scheme),
        "torch has no kernel for this layout",
    )  # fmt: skip
    found.expected = expected
    return found


def linear(make: Operands, sizes: Sizes, rows: int) -> Work:
    outputs, inner = sizes.feed_forward, sizes.hidden
    (weight, weights), (x, xs) = make.draw(outputs, inner), make.draw(rows, inner, rotate=False)
    moved = (outputs * inner + rows * (inner + outputs)) * make.element
    found = make.work(
        f"linear, {rows} rows", moved, 2 * rows * outputs * inner, lambda: functional.linear(x(), weight()),
        lambda b, ops: lambda: ops.linear_ops().linear(xs[b](), weights[b]()), "linear",
    )  # fmt: skip
    found.is_goal = False  # a library's product
    return found


def paged_attention(make: Operands, sizes: Sizes) -> Work:
    """One query a sequence, keys and values in shuffled blocks."""
    batch, context, kv_heads, size = sizes.batch, sizes.context, sizes.kv_heads, sizes.head_dim
    blocks = batch * context // BLOCK_SIZE
    cache, caches = make.draw(blocks, BLOCK_SIZE, kv_heads, size, rotate=False)
    other, others = make.draw(blocks, BLOCK_SIZE, kv_heads, size, rotate=False)
    query, queries = make.draw(batch, sizes.heads, size, rotate=False)
    table = np.random.default_rng(1).permutation(blocks).reshape(batch, -1)
    lengths = [context] * batch
    params = AttentionParams(sizes.heads, kv_heads, size, size**-0.5, True)
    order = torch.from_numpy(table.reshape(-1)).to(make.device)
    run = tuple(each()[order].view(batch, context, kv_heads, size).transpose(1, 2) for each in (cache, other))

    def torch_attention() -> Any:
        """Contiguous keys and values: torch has no paged kernel, so it is spared the gathering."""
        return functional.scaled_dot_product_attention(query().unsqueeze(2), *run, enable_gqa=True)

    return make.work(
        f"paged_attention, {batch} x {context}", 2 * batch * context * kv_heads * size * make.element,
        4 * batch * context * sizes.heads * size, torch_attention,
        lambda b, ops: lambda: ops.attention_ops().paged_attention(
            queries[b](), caches[b](), others[b](), table, params, context_lens=lengths
        ),
        "scaled_dot_product_attention, contiguous",
    )  # fmt: skip
