"""Every oracle agrees with an independent float64 formula, judged by the float64 bounds of the same operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.special

from ferrum_ref.parity.ops.catalogue import OPERATIONS
from ferrum_ref.parity.ops.operation import Inputs, Operation
from ferrum_ref.parity.ops.paged import slots_of
from ferrum_ref.parity.runner import draw_case
from ferrum_ref.parity.units import STORAGES, Storage
from ferrum_ref.parity.verdict import judge
from ferrum_ref.types.algorithm import Algorithm
from ferrum_ref.types.devices import DataType

torch = pytest.importorskip("torch")
functional = torch.nn.functional
Array = np.ndarray[Any, Any]

INFO = ml_dtypes.finfo(np.float64)
FP64 = Storage(
    "fp64",
    DataType.FP32,  # never looked at: nothing is stored on a backend here
    np.dtype(np.float64),
    53,
    float(INFO.smallest_subnormal),
    float(INFO.smallest_normal),
    float(INFO.max),
)
WIDE = Algorithm(accumulate="fp64")


def tensors(inputs: Inputs, *names: str) -> list[Any]:
    return [torch.from_numpy(np.ascontiguousarray(inputs.arrays[name])) for name in names]


def sdpa(q: Any, k: Any, v: Any, params: Any) -> Any:
    """(T, H, D), (S, G, D), (S, G, D) -> (T, H, D), through torch's own attention."""
    num_tokens, num_keys = q.shape[0], k.shape[0]
    visible = torch.ones(num_tokens, num_keys, dtype=torch.bool)
    if params.causal:
        visible = visible.tril(num_keys - num_tokens)
        if params.sliding_window:
            visible &= ~visible.tril(num_keys - num_tokens - params.sliding_window)
    if not num_keys or not num_tokens:
        return torch.zeros_like(q)
    heads = [part.swapaxes(0, 1)[None] for part in (q, k, v)]
    mixed = functional.scaled_dot_product_attention(
        *heads, attn_mask=visible, scale=params.softmax_scale, enable_gqa=True
    )
    mixed = mixed[0].swapaxes(0, 1).clone()
    mixed[~visible.any(dim=-1)] = 0.0
    return mixed


def attention(inputs: Inputs) -> tuple[Array, ...]:
    q, k, v = tensors(inputs, "q", "k", "v")
    rows = [sdpa(*row, inputs.settings["params"]) for row in zip(q, k, v, strict=True)]
    return (torch.stack(rows).numpy() if rows else q.numpy(),)


def paged_attention(inputs: Inputs) -> tuple[Array, ...]:
    q, k_cache, v_cache = tensors(inputs, "q", "k_cache", "v_cache")
    queries = q if q.ndim == 4 else q[:, None]
    rows = []
    for batch, length in enumerate(inputs.settings["lens"]):
        slots = slots_of(inputs.settings["table"][batch], int(length), k_cache.shape[1])
        keys, values = (cache.reshape(-1, *cache.shape[2:])[slots] for cache in (k_cache, v_cache))
        rows.append(sdpa(queries[batch], keys, values, inputs.settings["params"]))
    return (torch.stack(rows).reshape(q.shape).numpy() if rows else q.numpy(),)


def rms_norm_residual(inputs: Inputs) -> tuple[Array, ...]:
    x, residual, weight = tensors(inputs, "x", "residual", "weight")
    total = x + residual
    return functional.rms_norm(total, weight.shape, weight, inputs.settings["eps"]).numpy(), total.numpy()


def rms_norm(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = tensors(inputs, "x", "weight")
    return (functional.rms_norm(x, weight.shape, weight, inputs.settings["eps"]).numpy(),)


def layer_norm(inputs: Inputs) -> tuple[Array, ...]:
    x, weight = tensors(inputs, "x", "weight")
    bias = tensors(inputs, "bias")[0] if "bias" in inputs.arrays else None
    return (functional.layer_norm(x, weight.shape, weight, bias, inputs.settings["eps"]).numpy(),)


def rotary_embedding(inputs: Inputs) -> tuple[Array, ...]:
    """Multiplication by a unit complex number."""
    x, cos, sin = (inputs.exact(name) for name in ("x", "cos", "sin"))
    half = x.shape[-1] // 2
    turn = (cos + 1j * sin)[inputs.settings["positions"]][:, None, :]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return (np.concatenate([turned.real, turned.imag], axis=-1),)


def silu_mul(inputs: Inputs) -> tuple[Array, ...]:
    gate, up = tensors(inputs, "gate", "up")
    return ((functional.silu(gate) * up).numpy(),)


def gelu(inputs: Inputs) -> tuple[Array, ...]:
    """x Phi(x), Phi the normal distribution of scipy."""
    x = inputs.exact("x")
    return (x * scipy.special.ndtr(x),)


def gelu_tanh(inputs: Inputs) -> tuple[Array, ...]:
    return (functional.gelu(tensors(inputs, "x")[0], approximate="tanh").numpy(),)


def linear(inputs: Inputs) -> tuple[Array, ...]:
    """Exactly rounded sums."""
    x, weight = inputs.exact("x"), inputs.exact("weight")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    exact = [[math.fsum(row * column) for column in weight] for row in rows]
    return (np.array(exact, dtype=np.float64).reshape(*x.shape[:-1], len(weight)),)


def softmax(inputs: Inputs) -> tuple[Array, ...]:
    return (scipy.special.softmax(inputs.exact("x"), axis=inputs.case.sizes["axis"]),)


def argmax(inputs: Inputs) -> tuple[Array, ...]:
    """A plain loop that keeps the first of equals."""
    values = inputs.exact("logits").reshape(-1).tolist()
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return (np.array(best, dtype=np.int64),)


def write_kv(inputs: Inputs) -> tuple[Array, ...]:
    (cache,) = (inputs.arrays["cache"].copy(),)
    block = cache.shape[1]
    for row, slot in enumerate(inputs.settings["slots"]):
        if slot >= 0:
            cache[slot // block, slot % block] = inputs.arrays["rows"][row]
    return (cache,)


INDEPENDENT: dict[str, Callable[[Inputs], tuple[Array, ...]]] = {
    "rms_norm": rms_norm,
    "rms_norm_residual": rms_norm_residual,
    "layer_norm": layer_norm,
    "rotary_embedding": rotary_embedding,
    "attention": attention,
    "paged_attention": paged_attention,
    "write_kv": write_kv,
    "silu_mul": silu_mul,
    "silu": lambda inputs: (functional.silu(tensors(inputs, "x")[0]).numpy(),),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "linear": linear,
    "matmul": lambda inputs: (torch.matmul(*tensors(inputs, "a", "b")).numpy(),),
    "add": lambda inputs: (torch.add(*tensors(inputs, "a", "b")).numpy(),),
    "mul": lambda inputs: (torch.mul(*tensors(inputs, "a", "b")).numpy(),),
    "softmax": softmax,
    "embedding": lambda inputs: (inputs.arrays["table"].take(inputs.settings["ids"], axis=0),),
    "argmax": argmax,
}


@pytest.mark.clause("PA-ORACLE-2")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_the_oracle_agrees_with_an_independent_formula(operation: Operation) -> None:
    """Both err by at most the float64 bound, so they differ by at most twice that."""
    for index, case in enumerate(operation.cases):
        if not case.small and case.sizes.get("S", 0) > 20000:
            continue
        for seed in range(2):
            inputs = draw_case(operation, FP64, index, seed)
            with np.errstate(all="ignore"):
                outputs = INDEPENDENT[operation.name](inputs)
                expected = operation.expect(inputs, WIDE)
            for wanted, got in zip(expected, outputs, strict=True):
                verdict = judge(wanted, got)
                assert verdict.ratio_det <= 2.0, (case.label, seed, verdict)


@pytest.mark.clause("PA-ORACLE-1")
def test_the_oracle_sees_the_stored_values_and_not_the_ones_before_storing() -> None:
    operation = next(one for one in OPERATIONS if one.name == "mul")
    inputs = draw_case(operation, STORAGES["bf16"], 0, 0)
    (expected,) = operation.expect(inputs, Algorithm())
    a, b = (inputs.arrays[name] for name in "ab")
    assert a.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(expected.value, a.astype(np.float64) * b.astype(np.float64))
