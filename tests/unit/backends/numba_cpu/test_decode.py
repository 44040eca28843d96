"""The decode step against a decoder written here in float64, in every weights format, and what must not change it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest

from ferrum_ref.errors import BackendError, InvalidParameterError, NotFoundError, ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights

LAYERS, HIDDEN, HEADS, GROUPS, SIZE, INNER, VOCAB, CONTEXT = 2, 64, 6, 2, 16, 96, 57, 1200
CONFIG = TransformerConfig(LAYERS, HIDDEN, HEADS, GROUPS, SIZE, INNER, VOCAB, CONTEXT, 1e-5, True)
PARTS = {
    "qkv": ((HEADS + 2 * GROUPS) * SIZE, HIDDEN),
    "o": (HIDDEN, HEADS * SIZE),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


class Weights(TransformerWeights):
    """Arrays by name as a backend's tensors."""

    def __init__(self, arrays: dict[str, np.ndarray], make: Callable[[np.ndarray], TensorRef]) -> None:
        self.arrays, self._tensors = arrays, {name: make(array) for name, array in arrays.items()}

    def config(self) -> TransformerConfig:
        return CONFIG

    def embed_weight(self) -> TensorRef:
        return self._tensors["embed"]

    def final_norm_weight(self) -> TensorRef:
        return self._tensors["final_norm"]

    def lm_head_weight(self) -> TensorRef:
        return self._tensors["head"]

    def rope_cos(self) -> TensorRef:
        return self._tensors["cos"]

    def rope_sin(self) -> TensorRef:
        return self._tensors["sin"]

    def layer_input_norm_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.input_norm"]

    def layer_post_norm_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.post_norm"]

    def layer_q_norm_weight(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.q_norm")

    def layer_k_norm_weight(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.k_norm")

    def layer_qkv_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.qkv"]

    def layer_o_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.o"]

    def layer_gate_up_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.gate_up"]

    def layer_down_weight(self, layer: int) -> TensorRef:
        return self._tensors[f"{layer}.down"]

    def layer_qkv_bias(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.qkv_bias")

    def layer_o_bias(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.o_bias")

    def layer_gate_up_bias(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.gate_up_bias")

    def layer_down_bias(self, layer: int) -> TensorRef | None:
        return self._tensors.get(f"{layer}.down_bias")


def drawn(seed: int, *, biases: bool = True, norms: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "embed": rng.normal(size=(VOCAB, HIDDEN)),
        "head": rng.normal(size=(VOCAB, HIDDEN)) / 8,
        "final_norm": 1 + 0.2 * rng.normal(size=HIDDEN),
    }
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    arrays["cos"], arrays["sin"] = np.cos(angles), np.sin(angles)
    for layer in range(LAYERS):
        for name, shape in PARTS.items():
            arrays[f"{layer}.{name}"] = rng.normal(size=shape) / shape[1] ** 0.5
            if biases:
                arrays[f"{layer}.{name}_bias"] = 0.3 * rng.normal(size=shape[0])
        for name, size in (("input_norm", HIDDEN), ("post_norm", HIDDEN), ("q_norm", SIZE), ("k_norm", SIZE)):
            if norms or size == HIDDEN:
                arrays[f"{layer}.{name}"] = 1 + 0.2 * rng.normal(size=size)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def decoded(arrays: dict[str, np.ndarray], keys: Any, values: Any, tokens: list[int], dtype: Any) -> np.ndarray:
    """Logits after each token; keys and values (L, S, G, D) of a prefill. In `dtype`: float64 is the answer."""
    w = {name: array.astype(dtype) for name, array in arrays.items()}
    keys, values = list(keys.astype(dtype)), list(values.astype(dtype))

    def norm(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + dtype(np.float32(1e-5))) * weight

    def turned(x: Any, name: str, layer: int, position: int) -> Any:
        x = norm(x, w[f"{layer}.{name}"]) if f"{layer}.{name}" in w else x
        a, b, c, s = x[:, : SIZE // 2], x[:, SIZE // 2 :], w["cos"][position], w["sin"][position]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def project(x: Any, name: str) -> Any:
        return w[name] @ x + w.get(name + "_bias", dtype(0))

    logits = []
    for token in tokens:
        h, position = w["embed"][token], len(keys[0])
        for layer in range(LAYERS):
            qkv = project(norm(h, w[f"{layer}.input_norm"]), f"{layer}.qkv").reshape(-1, SIZE)
            q, k = turned(qkv[:HEADS], "q_norm", layer, position), qkv[HEADS : HEADS + GROUPS]
            keys[layer] = np.concatenate([keys[layer], turned(k, "k_norm", layer, position)[None]])
            values[layer] = np.concatenate([values[layer], qkv[HEADS + GROUPS :][None]])
            k, v = (np.repeat(array, HEADS // GROUPS, axis=1) for array in (keys[layer], values[layer]))
            scores = np.einsum("hd,shd->hs", q, k) * dtype(SIZE**-0.5)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            h = h + project(np.einsum("hs,shd->hd", p, v).reshape(-1), f"{layer}.o")
            both = project(norm(h, w[f"{layer}.post_norm"]), f"{layer}.gate_up")
            h = h + project(both[:INNER] / (1 + np.exp(-both[:INNER])) * both[INNER:], f"{layer}.down")
        logits.append(w["head"] @ norm(h, w["final_norm"]))
    return np.array(logits)


TOKENS = [3, 56, 0, 17, 3]


@pytest.fixture
def prefill() -> tuple[np.ndarray, np.ndarray]:
    """K and V (L, S, G, D) of 509 tokens: the steps after it cross a part's end at 512."""
    keys, values = np.random.default_rng(8).normal(size=(2, LAYERS, 509, GROUPS, SIZE)).astype(np.float32)
    return keys, values


def stepped(decode: Any, tensor: Any, prefill: Any, tokens: list[int], key: str = "a") -> np.ndarray:
    keys, values = prefill
    kv = [(tensor(k), tensor(v)) for k, v in zip(keys, values, strict=True)]
    decode.init_kv_cache(key, kv, keys.shape[1])
    found = [decode.decode_step(token, keys.shape[1] + index, key).to_numpy() for index, token in enumerate(tokens)]
    assert all(row.shape == (1, 1, VOCAB) for row in found)
    return np.concatenate(found)[:, 0].astype(np.float64)


def check(found: np.ndarray, arrays: dict[str, np.ndarray], prefill: Any, tokens: list[int] = TOKENS) -> None:
    """As close to float64 as float32 numpy is, within a factor of three."""
    want = decoded(arrays, *prefill, tokens, np.float64)
    floor = np.abs(decoded(arrays, *prefill, tokens, np.float32) - want).max()
    assert np.abs(found - want).max() <= 3 * floor


@pytest.mark.clause("BK-NCPU-18", "BK-NCPU-19")
@pytest.mark.parametrize(("biases", "norms"), [(True, True), (False, False)])
def test_float32_step(backend: Any, tensor: Any, prefill: Any, biases: bool, norms: bool) -> None:
    arrays = drawn(1, biases=biases, norms=norms)
    decode = backend.make_decode_backend(Weights(arrays, tensor))
    check(stepped(decode, tensor, prefill, TOKENS), arrays, prefill)
    assert "float32" in decode.name()
    assert decode.cached_tokens("a") == 509 + len(TOKENS)


def unpacked(array: np.ndarray, weights_format: str) -> np.ndarray:
    """The numbers that a matrix has once it was quantised, by gguf's own code for its formats."""
    if weights_format == "int8":
        scale = np.abs(array).max(1, keepdims=True) / np.float32(127)
        return np.rint(array * (np.float32(1) / scale)) * scale
    kind = gguf.GGMLQuantizationType[weights_format.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)


@pytest.mark.clause("BK-NCPU-19")
@pytest.mark.parametrize("weights_format", ["int8", "q8_0", "q4_0"])
def test_quantised_weights_are_exact_for_what_they_became(
    backend: Any, tensor: Any, prefill: Any, weights_format: str
) -> None:
    arrays = drawn(2)
    decode = backend.make_decode_backend(Weights(arrays, tensor), weights_format=weights_format)
    matrices = {"head", *(f"{layer}.{name}" for layer in range(LAYERS) for name in PARTS)}
    rounded = {name: unpacked(array, weights_format) if name in matrices else array for name, array in arrays.items()}
    check(stepped(decode, tensor, prefill, TOKENS), rounded, prefill)
    assert weights_format in decode.name()
    bytes_a_weight = {"int8": 1.1, "q8_0": 34 / 32, "q4_0": 18 / 32}[weights_format]
    assert decode.weights_bytes <= bytes_a_weight * sum(arrays[name].size for name in matrices)


@pytest.mark.clause("BK-NCPU-19")
def test_formats_that_do_not_fit(backend: Any, tensor: Any) -> None:
    arrays = drawn(3)
    with pytest.raises(InvalidParameterError, match="expected one of stored, float32, int8, q8_0, q4_0"):
        backend.make_decode_backend(Weights(arrays, tensor), weights_format="q5_0")
    arrays["head"] = arrays["head"][:, :40].copy()
    with pytest.raises(ShapeError, match="whole blocks of 32"):
        backend.make_decode_backend(Weights(arrays, tensor), weights_format="q4_0")
    arrays["head"][0, 0] = np.inf
    with pytest.raises((InvalidParameterError, ShapeError)):
        backend.make_decode_backend(Weights(arrays, tensor), weights_format="q8_0")


@pytest.mark.clause("BK-NCPU-19")
def test_float32_weights_are_not_copied(backend: Any, tensor: Any, prefill: Any) -> None:
    weights = Weights(drawn(4), tensor)
    decode = backend.make_decode_backend(weights)
    before = stepped(decode, tensor, prefill, [5])
    weights.lm_head_weight().to_numpy()[:] *= 2.0
    assert np.array_equal(stepped(decode, tensor, prefill, [5]), 2.0 * before)


@pytest.mark.clause("BK-NCPU-20")
def test_16_bit_weights_with_float32_activations(backend: Any, tensor: Any, prefill: Any) -> None:
    arrays = {name: array.astype(np.float16) for name, array in drawn(5).items()}

    def half(values: Any) -> Any:
        return tensor(values, np.float16)

    prefill = tuple(part.astype(np.float16) for part in prefill)
    found = stepped(backend.make_decode_backend(Weights(arrays, half)), half, prefill, TOKENS)
    want = decoded(arrays, *prefill, TOKENS, np.float64)
    floor = np.abs(decoded(arrays, *prefill, TOKENS, np.float32) - want).max()
    assert np.all(np.abs(found - want) <= 2.0**-11 * np.abs(want) + 3 * floor)


@pytest.mark.clause("BK-NCPU-18", "BK-NCPU-4")
def test_the_number_of_threads_changes_no_bit(backend: Any, tensor: Any, prefill: Any, threads: Any) -> None:
    decode = backend.make_decode_backend(Weights(drawn(6), tensor), weights_format="int8")
    threads(1)
    alone = stepped(decode, tensor, prefill, TOKENS)
    threads(2)
    for _ in range(20):
        assert np.array_equal(stepped(decode, tensor, prefill, TOKENS), alone)


@pytest.mark.clause("BK-NCPU-18")
def test_workers_may_come_one_after_another(
    backend: Any, tensor: Any, prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first does all there is; the others find no task left, and wait for nobody."""
    from ferrum_numba.cpu import decode as module
    from ferrum_numba.cpu.compiled import serial_kernel

    decode = backend.make_decode_backend(Weights(drawn(7), tensor))
    want = stepped(decode, tensor, prefill, TOKENS)
    in_turn = serial_kernel(module.decode_step.__wrapped__)  # not parallel: a plain loop over the workers
    monkeypatch.setattr(module, "decode_step", lambda *arguments: in_turn(3, *arguments))
    assert np.array_equal(stepped(decode, tensor, prefill, TOKENS), want)


@pytest.mark.clause("BK-NCPU-18")
def test_a_worker_waits_for_tasks_that_others_have_taken() -> None:
    """A phase of two tasks: another worker has taken the first and not finished it."""
    from ferrum_numba.cpu.packing import stored
    from ferrum_numba.cpu.stepping import COUNTER_BYTES, project

    weight, x, out = np.eye(32, dtype=np.float32), np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    part = np.array([*stored(weight, "stored").fields(), 0, 32])
    matrix = np.array([part.ctypes.data, 1, 32, 32, 0, 16])
    counters = np.zeros(COUNTER_BYTES // 8, np.int64)
    counters[0] = 1  # taken
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(project.address)
    arguments = (counters.ctypes.data, 0, matrix.ctypes.data, x.ctypes.data, out.ctypes.data)
    worker = threading.Thread(target=call, args=arguments)
    worker.start()
    done = COUNTER_BYTES // 16
    worker.join(0.1)
    assert worker.is_alive()
    assert counters[done] == 1
    assert out[16:].tolist() == x[16:].tolist()
    assert not out[:16].any()
    counters[done] = 2
    worker.join(20.0)
    assert not worker.is_alive()


@pytest.mark.clause("BK-NCPU-18", "BK-NCPU-20")
def test_sequences_are_independent_and_errors_change_nothing(backend: Any, tensor: Any, prefill: Any) -> None:
    decode = backend.make_decode_backend(Weights(drawn(8), tensor), max_tokens=512)
    keys, values = prefill
    kv = [(tensor(k), tensor(v)) for k, v in zip(keys, values, strict=True)]
    alone = stepped(decode, tensor, prefill, TOKENS[:3])
    with pytest.raises(ResourceExhaustedError, match="whole context of 512"):
        decode.decode_step(1, 512, "a")
    decode.release_kv_cache("a")
    decode.release_kv_cache("a")
    assert not decode.has_kv_cache("a")
    decode.init_kv_cache("b", kv, 0)
    decode.init_kv_cache("a", kv, 509)
    for key_data in kv:
        key_data[0].to_numpy()[:] = 9.0  # what the caller does with it afterwards changes nothing
    for index, token in enumerate(TOKENS[:3]):
        for call, error in (
            (lambda: decode.decode_step(1, 5, "c"), NotFoundError),
            (lambda index=index: decode.decode_step(1, 508 + index, "a"), BackendError),
            (lambda index=index: decode.decode_step(VOCAB, 509 + index, "a"), BackendError),
            (lambda: decode.init_kv_cache("a", kv[:1], 4), BackendError),
            (lambda: decode.init_kv_cache("a", kv, 513), ResourceExhaustedError),
            (lambda: decode.init_kv_cache("a", [(k, tensor([1.0], np.float16)) for k, _ in kv], 0), BackendError),
        ):
            with pytest.raises(error):
                call()
        decode.decode_step(7, index, "b")
        found = decode.decode_step(token, 509 + index, "a").to_numpy()[0]
        assert np.array_equal(found[0].astype(np.float64), alone[index])
    assert decode.cached_tokens("b") == 3
    assert decode.size_bytes() == 4 * 2 * LAYERS * GROUPS * SIZE * (512 + 64)


@pytest.mark.clause("DB-BASE-1", "DB-BASE-2")
def test_room_doubles_and_keeps_what_is_cached(backend: Any, tensor: Any, prefill: Any) -> None:
    """From 64 rows to 128 between two steps; the logits are those of a sequence that had the room at once."""
    keys, values = (part[:, :63] for part in prefill)
    tokens = TOKENS * 2
    grown = backend.make_decode_backend(Weights(drawn(9), tensor), max_tokens=100)
    check(stepped(grown, tensor, (keys, values), tokens), drawn(9), (keys, values), tokens)
    row_bytes = 4 * 2 * LAYERS * GROUPS * SIZE
    assert (grown.size_bytes(), grown.max_tokens) == (row_bytes * 100, 100)
    grown.init_kv_cache("a", [(tensor(k), tensor(v)) for k, v in zip(keys, values, strict=True)], 63)
    assert grown.size_bytes() == row_bytes * 64
    with pytest.raises(InvalidParameterError, match="max_tokens is 0, expected at least 1"):
        backend.make_decode_backend(Weights(drawn(9), tensor), max_tokens=0)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.clause("BK-NCPU-18", "BK-NCPU-19")
def test_smollm2_says_the_same(backend: Any, smollm2_path: Any) -> None:
    """Greedy text of the real model: float32 steps against the numpy decoder, and 8-bit ones close to it."""
    from ferrum_ref.assembly import load_model
    from ferrum_ref.models.transformer_weights import DecoderTransformerWeights

    reference, ours = load_model(smollm2_path), load_model(smollm2_path, backend)
    prompt = reference.tokenizer.encode("The three laws of thermodynamics are", add_special=False)
    llm = reference.new_llm()
    logits, tokens = llm.prefill("a", prompt), []
    weights = DecoderTransformerWeights.of_decoder(ours.decoder)
    config = weights.config()
    empty = np.zeros((0, config.num_kv_heads, config.head_dim), np.float32)
    nothing = [(backend.tensor_factory().from_numpy(empty),) * 2] * config.num_layers
    decodes = [backend.make_decode_backend(weights, weights_format=name) for name in ("float32", "int8")]
    found: list[Any] = []
    for decode in decodes:
        decode.init_kv_cache("a", nothing, 0)
        for position, token in enumerate(prompt):
            found.append(decode.decode_step(token, position, "a").to_vec_f32())
    assert np.abs(found[len(prompt) - 1] - logits).max() < np.abs(found[-1] - logits).max() < 2.0
    exact = decodes[0]
    for _ in range(24):
        tokens.append(int(logits.argmax()))
        position = len(prompt) + len(tokens) - 1
        logits = llm.decode("a", tokens[-1], position)
        assert int(exact.decode_step(tokens[-1], position, "a").to_vec_f32().argmax()) == int(logits.argmax())
