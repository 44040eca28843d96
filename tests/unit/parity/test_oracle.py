"""Every oracle agrees with an independent float64 formula, judged by the float64 bounds of the same operation."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import scipy.special

from ferrum_ref.parity.ops.cast import TARGETS, nearest_even
from ferrum_ref.parity.ops.catalogue import OPERATIONS, operation_named
from ferrum_ref.parity.ops.operation import Inputs
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
    return [torch.from_numpy(np.array(inputs.arrays[name], order="C")) for name in names]


def sdpa(q: Any, k: Any, v: Any, params: Any, sinks: Any = None) -> Any:
    """(T, H, D), (S, G, D), (S, G, D) -> (T, H, D), through torch's own attention where it knows the variant."""
    num_tokens, num_keys = q.shape[0], k.shape[0]
    visible = torch.ones(num_tokens, num_keys, dtype=torch.bool)
    if params.causal:
        visible = visible.tril(num_keys - num_tokens)
        if params.sliding_window:
            visible &= ~visible.tril(num_keys - num_tokens - params.sliding_window)
    if not num_keys or not num_tokens:
        return torch.zeros_like(q)
    heads = [part.swapaxes(0, 1)[None] for part in (q, k, v)]
    if params.logit_softcap or sinks is not None:
        mixed = softmax_attention(*heads, visible, params, sinks)
    else:
        mixed = functional.scaled_dot_product_attention(
            *heads, attn_mask=visible, scale=params.softmax_scale, enable_gqa=True
        )
    mixed = mixed[0].swapaxes(0, 1).clone()
    mixed[~visible.any(dim=-1)] = 0.0
    return mixed


def softmax_attention(q: Any, k: Any, v: Any, visible: Any, params: Any, sinks: Any) -> Any:
    """The same by torch.softmax over scores with a cap, and one more column for the sinks."""
    group = params.num_heads // params.num_kv_heads
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    scores = params.softmax_scale * (q @ k.mT)
    if params.logit_softcap:
        scores = params.logit_softcap * torch.tanh(scores / params.logit_softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1] @ v
    return torch.softmax(scores, dim=-1) @ v


def sinks_of(inputs: Inputs) -> Any:
    return tensors(inputs, "sinks")[0] if "sinks" in inputs.arrays else None


def attention(inputs: Inputs) -> tuple[Array, ...]:
    q, k, v = tensors(inputs, "q", "k", "v")
    rows = [sdpa(*row, inputs.settings["params"], sinks_of(inputs)) for row in zip(q, k, v, strict=True)]
    return (torch.stack(rows).numpy() if rows else q.numpy(),)


def paged_attention(inputs: Inputs) -> tuple[Array, ...]:
    q, k_cache, v_cache = tensors(inputs, "q", "k_cache", "v_cache")
    queries = q if q.ndim == 4 else q[:, None]
    rows = []
    for batch, length in enumerate(inputs.settings["lens"]):
        slots = slots_of(inputs.settings["table"][batch], int(length), k_cache.shape[1])
        keys, values = (cache.reshape(-1, *cache.shape[2:])[slots] for cache in (k_cache, v_cache))
        rows.append(sdpa(queries[batch], keys, values, inputs.settings["params"], sinks_of(inputs)))
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


def quantized_linear(kind: Any) -> Callable[[Inputs], tuple[Array, ...]]:
    """Unpacked by the gguf package, exactly rounded sums."""

    def run(inputs: Inputs) -> tuple[Array, ...]:
        x, packed = inputs.exact("x"), inputs.arrays["packed"]
        weight = gguf.dequantize(packed, kind).astype(np.float64) if packed.size else np.zeros((0, x.shape[-1]))
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        exact = [[math.fsum(row * column) for column in weight] for row in rows]
        return (np.array(exact, dtype=np.float64).reshape(*x.shape[:-1], packed.shape[0]),)

    return run


def sample_token(inputs: Inputs) -> tuple[Array, ...]:
    """Plain loops over lists: penalty, temperature, top-k, top-p, and the running sum."""
    params, logits = inputs.settings["params"], inputs.exact("logits").reshape(-1).tolist()
    listed = {
        token for token, count in zip(params.repetition_token_ids, params.repetition_token_freqs, strict=True) if count
    }
    for token in listed:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    ids = range(len(logits))
    if params.temperature < 1e-5:
        best = max(ids, key=lambda one: (logits[one], -one))
        return (np.full(len(inputs.settings["seeds"]), best, dtype=np.int64),)
    scaled = [one / params.temperature for one in logits]
    if params.top_k and params.top_k < len(scaled):
        limit = sorted(scaled, reverse=True)[params.top_k - 1]
        scaled = [one if one >= limit else -math.inf for one in scaled]
    weights = [math.exp(one - max(scaled)) for one in scaled]
    shares = [one / math.fsum(weights) for one in weights]
    if params.top_p < 1.0:
        before = 0.0
        for place, one in enumerate(sorted(ids, key=lambda one: (-shares[one], one))):
            share = shares[one]
            if place and before >= params.top_p:
                shares[one] = 0.0
            before += share
    running, total = list(itertools.accumulate(shares)), math.fsum(shares)
    return (np.array([bisect.bisect_right(running, mixed(int(seed)) * total) for seed in inputs.settings["seeds"]]),)


def mixed(seed: int) -> float:
    """MurmurHash3's finaliser (Appleby), over 2^32."""
    seed ^= seed >> 16
    seed = seed * 0x85EBCA6B % 2**32
    seed ^= seed >> 13
    seed = seed * 0xC2B2AE35 % 2**32
    return (seed ^ (seed >> 16)) / 2**32


def decode_step(inputs: Inputs) -> tuple[Array, ...]:
    """A decoder in torch's float64 operations, whole sequence so far at every step."""
    named = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.arrays.items()}
    sizes, start = inputs.case.sizes, inputs.settings["start"]
    heads, groups, size = sizes["H"], sizes["G"], sizes["D"]
    cached = {(layer, one): named[f"layers.{layer}.{one}"][:start] for layer in range(sizes["L"]) for one in "kv"}

    def norm(x: Any, weight: Any) -> Any:
        return functional.rms_norm(x, weight.shape, weight, 1e-5)

    def turned(x: Any, position: int) -> Any:
        c, s = named["cos"][position], named["sin"][position]
        both = torch.view_as_complex(torch.stack(x.split(size // 2, dim=-1), dim=-1)) * torch.complex(c, s)
        return torch.cat([both.real, both.imag], dim=-1)

    rows = []
    for step, token in enumerate(inputs.settings["tokens"].tolist()):
        x = named["embed"][token]
        for layer in range(sizes["L"]):
            part = {name.rpartition(".")[2]: one for name, one in named.items() if name.startswith(f"layers.{layer}.")}
            qkv = functional.linear(norm(x, part["input_norm"]), part["qkv"], part.get("qkv_bias"))
            q, k, v = qkv.reshape(-1, size).split([heads, groups, groups])
            if "q_norm" in part:
                q, k = norm(q, part["q_norm"]), norm(k, part["k_norm"])
            cached[layer, "k"] = torch.cat([cached[layer, "k"], turned(k, start + step)[None]])
            cached[layer, "v"] = torch.cat([cached[layer, "v"], v[None]])
            keys, values = (cached[layer, one].swapaxes(0, 1) for one in "kv")
            mixed_values = functional.scaled_dot_product_attention(
                turned(q, start + step)[:, None], keys, values, enable_gqa=True
            )
            x = x + part["o"] @ mixed_values.reshape(-1)
            gate, up = (part["gate_up"] @ norm(x, part["post_norm"])).chunk(2)
            x = x + part["down"] @ (functional.silu(gate) * up)
        rows.append(named["head"] @ norm(x, named["final_norm"]))
    return (torch.stack(rows).numpy(),)


def binary(function: Any) -> Callable[[Inputs], tuple[Array, ...]]:
    return lambda inputs: (function(*tensors(inputs, "a", "b")).numpy(),)


def moved(function: Callable[[list[Any], Any], Any]) -> Callable[[Inputs], tuple[Array, ...]]:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        pieces = function(tensors(inputs, *inputs.arrays), inputs.case.sizes)
        return tuple(piece.numpy() for piece in (pieces if isinstance(pieces, tuple | list) else [pieces]))

    return run


def padded(arrays: list[Any], sizes: Any) -> list[Any]:
    return [
        functional.pad(
            one, [side for axis in reversed(range(one.ndim)) for side in (0, sizes["target"][axis] - one.shape[axis])]
        )
        for one in arrays
    ]


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
    "add": binary(torch.add),
    "sub": binary(torch.sub),
    "mul": binary(torch.mul),
    "div": binary(torch.div),
    "relu": lambda inputs: (functional.relu(tensors(inputs, "x")[0]).numpy(),),
    "tensor_rms_norm": rms_norm,
    "tensor_gelu": gelu,
    "quantized_linear_q4_0": quantized_linear(gguf.GGMLQuantizationType.Q4_0),
    "quantized_linear_q8_0": quantized_linear(gguf.GGMLQuantizationType.Q8_0),
    "sample_token": sample_token,
    "decode_step": decode_step,
    "concat": moved(lambda arrays, sizes: torch.cat(arrays, dim=sizes["dim"])),
    "split": moved(lambda arrays, sizes: arrays[0].split(list(sizes["pieces"]), dim=sizes["dim"])),
    "transpose": moved(lambda arrays, sizes: arrays[0].transpose(*sizes["dims"])),
    "permute": moved(lambda arrays, sizes: arrays[0].permute(*sizes["dims"])),
    "stack": moved(lambda arrays, sizes: torch.stack(arrays, dim=sizes["dim"])),
    "unstack": moved(lambda arrays, sizes: arrays[0].unbind(dim=sizes["dim"])),
    "pad_batch": moved(padded),
    "batch_matmul": lambda inputs: tuple(
        torch.matmul(*tensors(inputs, f"a{index}", f"b{index}")).numpy() for index in range(len(inputs.arrays) // 2)
    ),
    "matmul_async": lambda inputs: (torch.matmul(*tensors(inputs, "a", "b")).numpy(),),
    "softmax_async": softmax,
    "softmax": softmax,
    "embedding": lambda inputs: (inputs.arrays["table"].take(inputs.settings["ids"], axis=0),),
    "argmax": argmax,
}


@pytest.mark.clause("PA-ORACLE-2", "PA-SAMPLE-1", "PA-DECODE-1")
@pytest.mark.parametrize("name", sorted(INDEPENDENT))
def test_the_oracle_agrees_with_an_independent_formula(name: str) -> None:
    """Both err by at most the float64 bound, so they differ by at most twice that."""
    operation = operation_named(name)
    for index, case in enumerate(operation.cases):
        if not case.small and max(case.sizes.get("S", 0), *case.sizes.get("lens", (0,)), case.sizes.get("n", 0)) > 9000:
            continue
        for seed in range(2):
            inputs = draw_case(operation, FP64, index, seed)
            with np.errstate(all="ignore"):
                outputs = INDEPENDENT[name](inputs)
                expected = operation.expect(inputs, WIDE)
            for wanted, got in zip(expected, outputs, strict=True):
                verdict = judge(wanted, got)
                assert verdict.ratio_det <= 2.0, (inputs.case.label, seed, verdict)


@pytest.mark.clause("PA-ORACLE-2")
def test_every_operation_has_an_independent_formula() -> None:
    assert {operation.name for operation in OPERATIONS} == {*INDEPENDENT, "cast"}


@pytest.mark.clause("PA-CAST-1")
@pytest.mark.parametrize("target", ["fp16", "bf16", "fp8", "fp32"])
def test_rounding_by_looking_up_agrees_with_other_libraries(target: str) -> None:
    """torch for 16 bits, ml_dtypes for FP8 (which saturates nothing itself); beyond the largest FP8 number: itself."""
    operation, dtype = operation_named("cast"), TARGETS[target][1]
    for storage in STORAGES.values():
        for index, case in enumerate(operation.cases):
            if case.sizes["to"] != target or case.probe == "from fp8":
                continue
            x = np.ascontiguousarray(draw_case(operation, storage, index, 0).arrays["x"]).astype(np.float32)
            with np.errstate(all="ignore"):
                if target == "fp8":
                    other = np.clip(x, -448, 448).astype(dtype)
                else:
                    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[target]
                    other = torch.from_numpy(x).to(kind).to(torch.float32).numpy()
                np.testing.assert_array_equal(
                    nearest_even(x.astype(np.float64), target).astype(np.float32), other.astype(np.float32)
                )


@pytest.mark.clause("PA-ORACLE-1")
def test_the_oracle_sees_the_stored_values_and_not_the_ones_before_storing() -> None:
    operation = next(one for one in OPERATIONS if one.name == "mul")
    inputs = draw_case(operation, STORAGES["bf16"], 0, 0)
    (expected,) = operation.expect(inputs, Algorithm())
    a, b = (inputs.arrays[name] for name in "ab")
    assert a.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(expected.value, a.astype(np.float64) * b.astype(np.float64))
