"""A decode step as a fixed list of kernels: its logits, its caches, and that nothing between its kernels waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ferrum_numba.gpu.decode import NumbaCudaDecodeBackend
from ferrum_numba.gpu.machine import SimulatedMachine
from ferrum_numba.gpu.runtime import Runtime, Tuning
from ferrum_numba.simulator import Schedule

from ferrum_ref.errors import (
    BackendError,
    InvalidParameterError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.interfaces.transformer import TransformerConfig
from ferrum_ref.parity.ops.decode_weights import ArrayWeights
from ferrum_ref.plugins import load_backend

HEADS, KV_HEADS, SIZE, HIDDEN, INNER, VOCABULARY, CONTEXT = 2, 1, 4, 8, 8, 11, 24
EPS = 1e-5
TOKENS = [3, 10, 0, 7, 7, 1, 4, 9]
TIMES = 4.0  # the simulator rounds every product, where BLAS fuses it with the sum


def drawn(seed: int, layers: int = 1, extras: bool = False) -> dict[str, Any]:
    """float32 arrays by `ArrayWeights`' names; extras: q/k norms and a bias of qkv."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    arrays = {
        "embed": 3 * normal(VOCABULARY, HIDDEN),
        "head": normal(VOCABULARY, HIDDEN),
        "final_norm": 1 + normal(HIDDEN),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for layer in range(layers):
        parts = {
            "input_norm": 1 + normal(HIDDEN),
            "qkv": normal((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN),
            "o": normal(HIDDEN, HEADS * SIZE),
            "post_norm": 1 + normal(HIDDEN),
            "gate_up": normal(2 * INNER, HIDDEN),
            "down": normal(HIDDEN, INNER),
        }
        if extras:
            parts |= {"q_norm": 1 + normal(SIZE), "k_norm": 1 + normal(SIZE)}
            parts["qkv_bias"] = normal((HEADS + 2 * KV_HEADS) * SIZE)
        arrays |= {f"layers.{layer}.{name}": part for name, part in parts.items()}
    return arrays


def config_of(arrays: dict[str, Any]) -> TransformerConfig:
    num_layers = sum(name.endswith(".qkv") for name in arrays)
    sizes = (num_layers, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY, CONTEXT)
    return TransformerConfig(*sizes, EPS, "layers.0.q_norm" in arrays)


def weights_on(compute: Any, arrays: dict[str, Any], element: Any = np.float32) -> ArrayWeights:
    factory = compute.tensor_factory()
    tensors = {name: factory.from_numpy(array.astype(element)) for name, array in arrays.items()}
    return ArrayWeights(config_of(arrays), tensors)


def exact(arrays: dict[str, Any], tokens: Sequence[int]) -> Any:
    """Logits (tokens, V) in float64, every position computed anew from the whole text."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight

    def turned(x: Any) -> Any:
        a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        c, s = w["cos"][: len(x), None], w["sin"][: len(x), None]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    x = w["embed"][list(tokens)]
    for layer in range(config_of(arrays).num_layers):
        part = {name.split(".")[2]: array for name, array in w.items() if name.startswith(f"layers.{layer}.")}
        qkv = norm(x, part["input_norm"]) @ part["qkv"].T + part.get("qkv_bias", 0)
        qkv = qkv.reshape(len(x), -1, SIZE)
        q, k, v = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        if "q_norm" in part:
            q, k = norm(q, part["q_norm"]), norm(k, part["k_norm"])
        q, k = turned(q), turned(k)
        scores = np.einsum("thd,sd->hts", q, k[:, 0]) / np.sqrt(SIZE)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hts,sd->thd", p, v[:, 0]).reshape(len(x), -1) @ part["o"].T
        gate, up = np.split(norm(x, part["post_norm"]) @ part["gate_up"].T, 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part["down"].T
    return norm(x, w["final_norm"]) @ w["head"].T


def no_kv(compute: Any, arrays: dict[str, Any], element: Any = np.float32) -> list[Any]:
    empty = compute.tensor_factory().from_numpy(np.zeros((0, KV_HEADS, SIZE), element))
    return [(empty, empty)] * config_of(arrays).num_layers


def steps(decode: Any, tokens: Sequence[int], key: str = "text", start: int = 0) -> Any:
    rows = [decode.decode_step(token, start + i, key) for i, token in enumerate(tokens)]
    assert all(row.shape() == (1, 1, VOCABULARY) for row in rows)
    return np.concatenate([row.to_numpy()[0] for row in rows])


@pytest.fixture(autouse=True)
def short_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that must grow soon: every step costs a tenth of a second here."""
    monkeypatch.setattr("ferrum_numba.gpu.decode.FIRST_CAPACITY_TOKENS", 4)


@pytest.fixture
def started() -> Callable[..., NumbaCudaDecodeBackend]:
    """started(arrays, element, machine=, split_keys=, ...): a decode backend with the empty sequence "text"."""

    def make(
        arrays: dict[str, Any], element: Any = np.float32, machine: Any = None, split_keys: int = 512, **options: Any
    ) -> NumbaCudaDecodeBackend:
        from ferrum_numba.gpu.backend import NumbaCudaBackend

        compute = NumbaCudaBackend(machine or SimulatedMachine(), Tuning(split_keys=split_keys))
        decode = compute.make_decode_backend(weights_on(compute, arrays, element), **options)
        decode.init_kv_cache("text", no_kv(compute, arrays, element), 0)
        return decode

    return make


def noise(arrays: dict[str, Any], tokens: Sequence[int], element: Any = np.float32) -> float:
    """What the reference loses on the same stored weights, step by step."""
    compute = load_backend("numpy")
    decode = TransformerDecodeBackend(weights_on(compute, arrays, element), compute)
    decode.init_kv_cache("text", no_kv(compute, arrays, element), 0)
    stored = {name: array.astype(element) for name, array in arrays.items()}
    return float(np.abs(steps(decode, tokens).astype(np.float64) - exact(stored, tokens)).max())


@pytest.mark.clause("BK-NCUDA-21", "BK-NCUDA-22", "DB-STEP-1", "DB-STEP-2", "DB-STEP-6", "DB-CACHE-2")
@pytest.mark.parametrize(
    ("layers", "extras", "element", "split_keys"),
    [(2, False, np.float32, 512), (1, True, np.float32, 3), (1, False, ml_dtypes.bfloat16, 512)],
    ids=["two layers", "norms, bias, splits", "bf16"],
)
def test_every_position_of_a_text(started: Any, layers: int, extras: bool, element: Any, split_keys: int) -> None:
    arrays, tokens = drawn(1, layers, extras), TOKENS[:6]
    decode = started(arrays, element, split_keys=split_keys)
    stored = {name: array.astype(element) for name, array in arrays.items()}
    found = steps(decode, tokens)  # 6 tokens: beyond the first capacity of 4
    assert found.dtype == element
    assert np.abs(found.astype(np.float64) - exact(stored, tokens)).max() <= TIMES * noise(arrays, tokens, element)


@pytest.mark.clause("BK-NCUDA-21", "DB-INIT-1", "DB-CACHE-1", "DB-CACHE-3")
def test_two_sequences_in_turn_and_a_hand_over_give_the_bits_of_one_alone(started: Any) -> None:
    arrays = drawn(2)
    decode = started(arrays, split_keys=2)
    alone = steps(decode, TOKENS)
    cache, runtime = decode._sequences["text"], decode._runtime
    factory = load_backend_factory(runtime)
    rows = [
        tuple(factory(array.reshape(-1, KV_HEADS, SIZE)[:6]) for array in pair)
        for pair in zip(cache.keys, cache.values, strict=True)
    ]
    decode.init_kv_cache("other", rows, 5)  # six rows handed over, five count
    assert decode.cached_tokens("other") == 5
    mixed = []
    for i in range(5, 8):
        mixed.append(steps(decode, [TOKENS[i]], "other", i)[0])
        steps(decode, [TOKENS[-i]], "text", 3 + i)
    assert np.stack(mixed).tobytes() == alone[5:].tobytes()
    decode.release_kv_cache("other")
    assert not decode.has_kv_cache("other")
    assert cache.capacity == 16  # 4, 8, 16
    assert decode.size_bytes() == 2 * 16 * KV_HEADS * SIZE * 4


def load_backend_factory(runtime: Runtime) -> Callable[[Any], Any]:
    from ferrum_numba.gpu.factory import NumbaTensorFactory

    return NumbaTensorFactory(runtime).from_numpy


@pytest.mark.clause("DB-STEP-3", "DB-STEP-4", "DB-STEP-5", "DB-INIT-4", "BK-NCUDA-21")
def test_refusals_change_nothing(started: Any) -> None:
    arrays = drawn(3)
    expected = steps(started(arrays), TOKENS[:5])
    decode = started(arrays, max_tokens=5)
    assert steps(decode, TOKENS[:3]).tobytes() == expected[:3].tobytes()
    for token, position, key, kind in (
        (1, 2, "text", BackendError),
        (1, 4, "text", BackendError),
        (VOCABULARY, 3, "text", BackendError),
        (-1, 3, "text", BackendError),
        (1, 3, "nobody", NotFoundError),
    ):
        with pytest.raises(kind):
            decode.decode_step(token, position, key)
    good, foreign = decode._sequences["text"], load_backend("numpy")
    kv = no_kv(foreign, arrays)
    for bad, length in ((kv, 0), (kv[:-1], 0), (kv, 1), (kv, -1)):
        with pytest.raises(BackendError):
            decode.init_kv_cache("text", bad, length)
    with pytest.raises(BackendError, match="expected a tensor of the numba-cuda backend"):
        decode.init_kv_cache("never", kv, 0)
    assert decode._sequences == {"text": good}
    assert steps(decode, TOKENS[3:5], start=3).tobytes() == expected[3:].tobytes()
    with pytest.raises(ResourceExhaustedError, match="the whole context of 5"):
        decode.decode_step(1, 5, "text")


@pytest.mark.clause("BK-NCUDA-21", "BK-NCUDA-18", "DB-BASE-2")
def test_what_cannot_be_made(backend: Any) -> None:
    arrays = drawn(3)
    with pytest.raises(InvalidParameterError, match="max_tokens is 0"):
        backend.make_decode_backend(weights_on(backend, arrays), max_tokens=0)
    with pytest.raises(BackendError, match="got NumpyTensor, expected a tensor of the numba-cuda backend"):
        backend.make_decode_backend(weights_on(load_backend("numpy"), arrays))
    with pytest.raises(BackendError, match="element type int32, expected fp32, fp16 or bf16"):
        backend.make_decode_backend(weights_on(backend, arrays, np.int32))
    wide = weights_on(backend, arrays)
    wide._config = replace(wide._config, head_dim=1026)
    with pytest.raises(UnsupportedError, match="head_dim: got 1026, expected at most 1024"):
        backend.make_decode_backend(wide)
    decode = backend.make_decode_backend(weights_on(backend, arrays), max_tokens=7, use_graphs=True)
    assert (decode.max_tokens, decode.name()) == (7, "numba-cuda decode step by launches, on simulator")
    assert backend.capabilities().extra_capabilities["decode_backend"] == ["launches"]
    decode.init_kv_cache("text", no_kv(backend, arrays), 0)
    backend._runtime.is_open = False
    with pytest.raises(BackendError, match="decode_step: the numba-cuda backend was shut down"):
        decode.decode_step(1, 0, "text")
    assert decode.cached_tokens("text") == 0


class Watched(SimulatedMachine):
    """Notes what is asked of it."""

    def __init__(self, schedule: Schedule = Schedule.FORWARDS) -> None:
        super().__init__(schedule)
        self.calls: list[tuple[Any, ...]] = []

    def empty(self, count: int, element: Any) -> Any:
        self.calls.append(("empty", count))
        return super().empty(count, element)

    def upload(self, host: Any) -> Any:
        self.calls.append(("upload", host.size))
        return super().upload(host)

    def download(self, array: Any) -> Any:
        self.calls.append(("download", array.size))
        return super().download(array)

    def launch(self, kernel: Any, grid: Any, block: Any, *arguments: Any, shared_bytes: int = 0) -> None:
        shown = [one.ctypes.data if isinstance(one, np.ndarray) else one for one in arguments]
        self.calls.append((kernel.name, grid, block, shared_bytes, *shown))
        super().launch(kernel, grid, block, *arguments, shared_bytes=shared_bytes)


@pytest.mark.clause("BK-NCUDA-22")
def test_every_step_is_the_same_launches_over_the_same_memory(started: Any) -> None:
    machine = Watched()
    decode = started(drawn(4, extras=True), machine=machine, split_keys=2)
    seen = []
    for position, token in enumerate(TOKENS[:3]):
        machine.calls.clear()
        decode.decode_step(token, position, "text")
        seen.append(list(machine.calls))
        assert seen[-1][0][0] == "place_cursor"
        assert seen[-1][0][-2:] == (token, position)
        assert seen[-1][-2] == ("empty", VOCABULARY)  # the caller's own copy of the logits
        assert seen[-1][-1][0] == "copy_runs"
    names = [call[0] for call in seen[0]]
    assert names[1:-2] == [
        *("copy_rows", "rms_norm", "gemv", "binary", "rms_norm", "rms_norm", "turn_and_store", "attention", "merge"),
        *("gemv", "rms_norm_residual", "gemv", "binary", "gemv", "rms_norm_residual", "gemv"),
    ]
    assert seen[0][1:-2] == seen[1][1:-2] == seen[2][1:-2]


@pytest.mark.clause("BK-NCUDA-22")
def test_rows_after_the_token_are_unread_and_rows_before_it_unwritten(started: Any) -> None:
    """What replaying relies on: a step run twice is a step run once."""
    decode = started(drawn(5))
    steps(decode, TOKENS[:2])
    cache = decode._sequences["text"]
    before = [array.copy() for array in (*cache.keys, *cache.values)]
    first = decode._stepped(cache, 5, 2).to_numpy()
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        assert np.isnan(old.reshape(4, -1)[2:]).all()  # the simulator's mark of what was never written
        assert new.reshape(4, -1)[:2].tobytes() == old.reshape(4, -1)[:2].tobytes()
        assert not np.isnan(new.reshape(4, -1)[2]).any()
        assert np.isnan(new.reshape(4, -1)[3]).all()
    assert decode._stepped(cache, 5, 2).to_numpy().tobytes() == first.tobytes()


@pytest.mark.clause("BK-NCUDA-22", "BK-CUDASIM-2")
def test_both_schedules_give_the_same_bits(started: Any) -> None:
    found = [
        steps(started(drawn(6, extras=True), np.float16, SimulatedMachine(schedule), 1), TOKENS[:2]).tobytes()
        for schedule in Schedule
    ]
    assert found[0] == found[1]


class Recording(SimulatedMachine):
    """Records as a GPU does: while `record` runs the launches, nothing happens; its graph makes them happen."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Callable[[], None]] | None = None
        self.num_graphs = 0

    @property
    def records_graphs(self) -> bool:
        return True

    def launch(self, kernel: Any, grid: Any, block: Any, *arguments: Any, shared_bytes: int = 0) -> None:
        def now() -> None:
            super(Recording, self).launch(kernel, grid, block, *arguments, shared_bytes=shared_bytes)

        now() if self.held is None else self.held.append(now)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.held = []
        run()
        held, self.held = self.held, None
        self.num_graphs += 1

        def replay() -> None:
            for launch in held:
                launch()

        return replay


@pytest.mark.clause("BK-NCUDA-23")
def test_a_step_is_recorded_once_for_each_capacity_and_replayed(started: Any) -> None:
    arrays, machine = drawn(7), Recording()
    decode = started(arrays, machine=machine, use_graphs=True)
    assert decode.name() == "numba-cuda decode step by a graph, on simulator"
    assert steps(decode, TOKENS[:5]).tobytes() == steps(started(arrays), TOKENS[:5]).tobytes()
    assert machine.num_graphs == 2  # for 4 tokens and for 8
    started(arrays, machine=machine).decode_step(1, 0, "text")
    assert machine.num_graphs == 2  # unasked


@pytest.mark.clause("BK-NCUDA-23")
def test_where_nothing_is_recorded_kernels_are_launched_as_ever(started: Any) -> None:
    arrays = drawn(7)
    assert steps(started(arrays, use_graphs=True), TOKENS[:3]).tobytes() == steps(started(arrays), TOKENS[:3]).tobytes()
