"""All honest variants, at least four for every operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ferrum_ref.parity.honest import attention, decode, elementwise, exact, linear, norm, packed
from ferrum_ref.parity.honest.sums import DOTS, TOTALS, Kernel, dot_lanes, total_lanes, total_pairwise, total_sequential
from ferrum_ref.parity.ops.catalogue import OPERATIONS
from ferrum_ref.parity.schemes.catalogue import SCHEMES
from ferrum_ref.types.algorithm import Algorithm

PLAIN = Algorithm()


@dataclass(frozen=True)
class Honest:
    """One algorithm of an operation, with the arithmetic that it declares."""

    operation: str
    name: str
    run: Kernel
    algorithm: Algorithm = PLAIN


ATTENTION: Mapping[str, tuple[Kernel, Algorithm]] = MappingProxyType(
    {
        "plain": (attention.attention("plain"), PLAIN),
        "sequential": (attention.attention("sequential"), PLAIN),
        "scaled q": (attention.attention("scaled q"), PLAIN),
        "normalised first": (attention.attention("normalised first"), PLAIN),
        "rounded P": (attention.attention("rounded P"), Algorithm(rounds_probabilities=True)),
        "exp2": (attention.attention("exp2"), Algorithm(exponent_roundings=3)),
        "online 16": (attention.attention("online", 16), Algorithm(key_block=16)),
        "online 1": (attention.attention("online", 1), Algorithm(key_block=1)),
        "split 8": (attention.attention("split", 8), Algorithm(key_block=8)),
    }
)
MOVING = ("concat", "split", "transpose", "permute", "stack", "unstack", "pad_batch")
SAME_AS: Mapping[str, str] = MappingProxyType(
    {
        "tensor_rms_norm": "rms_norm",
        "tensor_gelu": "gelu",
        "matmul_async": "matmul",
        "softmax_async": "softmax",
    }
)


def _own() -> Iterator[Honest]:
    for name, dot in DOTS.items():
        yield Honest("linear", name, linear.linear(dot))
        yield Honest("matmul", name, linear.matmul(dot))
        yield Honest("batch_matmul", name, linear.batch_matmul(dot))
    lanes = Algorithm(partial_sums=16)
    yield Honest("linear", "16 partial sums", linear.linear(dot_lanes), lanes)
    for packed_format in ("Q4_0", "Q8_0"):
        run = linear.quantized_linear(packed_format, "16 partial sums")
        yield Honest(f"quantized_linear_{packed_format.lower()}", "16 partial sums", run, lanes)
        for form in ("unpacked", "sequential", "by blocks", "scale last"):
            run = linear.quantized_linear(packed_format, form)
            yield Honest(f"quantized_linear_{packed_format.lower()}", form, run)
    for scheme in SCHEMES:
        for form, algorithm in packed.FORMS.items():
            yield Honest(f"quantized_linear_{scheme.name}", form, packed.packed_linear(scheme, form), algorithm)
    for (name, total), order in zip(TOTALS.items(), norm.ORDERS, strict=True):
        yield Honest("rms_norm", f"{name}, {order}", norm.rms_norm(total, order))
        yield Honest("rms_norm_residual", f"{name}, {order}", norm.rms_norm_residual(total, order))
        yield Honest("layer_norm", name, norm.layer_norm(total))
    yield Honest("layer_norm", "welford", norm.layer_norm(total_sequential, welford=True))
    for form in ("plain", "complex", "rotate half", "fused"):
        yield Honest("rotary_embedding", form, elementwise.rope(form))
    yield Honest("softmax", "plain", elementwise.softmax("plain", total_pairwise))
    yield Honest("softmax", "sequential", elementwise.softmax("plain", total_sequential))
    yield Honest("softmax", "reciprocal", elementwise.softmax("reciprocal", total_lanes))
    yield Honest("softmax", "exp2", elementwise.softmax("exp2", total_pairwise), Algorithm(exponent_roundings=3))
    for name, (run, algorithm) in ATTENTION.items():
        yield Honest("attention", name, run, algorithm)
        yield Honest("paged_attention", name, run, algorithm)
    yield Honest("paged_attention", "page by page", attention.attention("online"), Algorithm(key_block=1))
    yield from _elementwise()
    yield from _exact()


def _elementwise() -> Iterator[Honest]:
    for form in ("plain", "divide", "two sides", "product first"):
        yield Honest("silu_mul", form, elementwise.silu_mul(form))
    for form in ("plain", "divide", "two sides", "float64 inside"):
        yield Honest("silu", form, elementwise.silu(form))
    for form in ("plain", "divide", "erfc", "half inside"):
        yield Honest("gelu", form, elementwise.gelu(form))
    for form in ("plain", "factored", "sigmoid", "half inside"):
        yield Honest("gelu_tanh", form, elementwise.gelu_tanh(form))
    for form in elementwise.FOUR_WAYS:
        yield Honest("add", form, elementwise.arithmetic(np.add, form))
        yield Honest("sub", form, elementwise.arithmetic(np.subtract, form))
        yield Honest("mul", form, elementwise.arithmetic(np.multiply, form))
        yield Honest("div", form, elementwise.arithmetic(np.divide, form))
        yield Honest("relu", form, elementwise.relu(form))


def _exact() -> Iterator[Honest]:
    for operation in OPERATIONS:
        if operation.name in MOVING:
            for form in exact.MOVING_FORMS:
                yield Honest(operation.name, form, exact.moving(operation, form))
    for form in decode.FORMS:
        yield Honest("decode_step", form, decode.decode_step(form))
    for form in exact.CHOICE_FORMS:
        yield Honest("embedding", form, exact.embedding(form))
        yield Honest("write_kv", form, exact.write_kv(form))
        yield Honest("argmax", form, exact.argmax(form))
        yield Honest("cast", form, exact.cast(form))
        yield Honest("sample_token", form, exact.sample_token(form))


def _all() -> Iterator[Honest]:
    own = list(_own())
    yield from own
    for name, other in SAME_AS.items():
        yield from (replace(one, operation=name) for one in own if one.operation == other)


HONEST: tuple[Honest, ...] = tuple(_all())
