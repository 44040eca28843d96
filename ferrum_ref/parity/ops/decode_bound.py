"""The bound of a decoded token's logits: the bounds of the decoder's operations, carried through it.

Every operation may round its result to the storage type once: a decoder that rounds less often errs by less.
Clause: PA-DECODE-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ferrum_ref.interfaces.transformer import TransformerConfig
from ferrum_ref.kernels.activation import silu_mul
from ferrum_ref.kernels.norm import rms_norm
from ferrum_ref.kernels.softmax import softmax
from ferrum_ref.parity.bounds.activation import silu_error
from ferrum_ref.parity.bounds.attention import attention_errors
from ferrum_ref.parity.bounds.dot import dot_error
from ferrum_ref.parity.bounds.norm import rms_norm_error
from ferrum_ref.parity.bounds.propagated import Node, Pull, Tape
from ferrum_ref.parity.bounds.rope import rope_error
from ferrum_ref.parity.error_model import DET, SPREAD, ErrorModel
from ferrum_ref.parity.ops.decode_weights import EPS
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm


class DecodeBound:
    """One run of the decoder in float64 that keeps what its operations may err by."""

    def __init__(
        self, config: TransformerConfig, arrays: Mapping[str, Array], storage: Storage, algorithm: Algorithm
    ) -> None:
        """arrays: the stored weights and cache, float64, as `decode_weights.decoded` takes them."""
        self._config, self._arrays, self._storage = config, arrays, storage
        self._worst, self._spread = ErrorModel(algorithm, storage, DET), ErrorModel(algorithm, storage, SPREAD)
        self._tape = Tape()
        self._keys: dict[int, list[Node]] = {layer: [] for layer in range(config.num_layers)}
        self._values: dict[int, list[Node]] = {layer: [] for layer in range(config.num_layers)}

    def errors(self, tokens: Array, start: int) -> tuple[Array, Array, tuple[float, float]]:
        """(det, prob without its lambda) of the logits (steps, V), and the same two of their common factor.

        The common factor's error is that of least squares, sum y dy / sum y^2 over all logits.
        """
        logits = [self._step(token, start, step) for step, token in enumerate(tokens.tolist())]
        value = np.concatenate([node.value for node in logits])
        worst, spread = self._tape.errors(logits, value / (value @ value))
        shape = (len(logits), self._config.vocab_size)
        return worst[:-1].reshape(shape), spread[:-1].reshape(shape), (float(worst[-1]), float(spread[-1]))

    def _step(self, token: int, start: int, step: int) -> Node:
        x = self._tape.add(self._arrays["embed"][token], ())
        for layer in range(self._config.num_layers):
            part = {name.rpartition(".")[2]: array for name, array in self._arrays.items() if self._is_of(name, layer)}
            normed = self._norm(x, part["input_norm"])
            mixed = self._attended(layer, part, self._linear(normed, part["qkv"]), start, step)
            x = self._sum(x, self._linear(mixed, part["o"]))
            normed = self._norm(x, part["post_norm"])
            x = self._sum(x, self._linear(self._gated(self._linear(normed, part["gate_up"])), part["down"]))
        return self._linear(self._norm(x, self._arrays["final_norm"]), self._arrays["head"])

    @staticmethod
    def _is_of(name: str, layer: int) -> bool:
        return name.startswith(f"layers.{layer}.")

    def _own(self, error: Callable[[ErrorModel], Array], value: Array) -> tuple[Array, Array]:
        """Bound and spread of an operation's error, with one rounding to the storage type."""
        unit, eta = self._worst.store
        return self._worst.stored(error(self._worst), value), np.hypot(error(self._spread), unit * np.abs(value) + eta)

    def _linear(self, x: Node, weight: Array) -> Node:
        value = x.value @ weight.T

        def error(model: ErrorModel) -> Array:
            return np.asarray(dot_error(model, x.value[None], weight.T, value[None])[0])

        return self._tape.add(value, [(x, lambda slope: slope @ weight)], *self._own(error, value))

    def _norm(self, x: Node, gain: Array) -> Node:
        value = rms_norm(x.value, gain, EPS)
        root = 1.0 / np.sqrt(np.mean(np.square(x.value), axis=-1, keepdims=True) + EPS)

        def pull(slope: Array) -> Array:
            scaled = slope * gain
            along = np.mean(scaled * x.value, axis=-1, keepdims=True)
            return np.asarray(root * (scaled - x.value * np.square(root) * along))

        own = self._own(lambda model: rms_norm_error(model, x.value, EPS, value), value)
        return self._tape.add(value, [(x, pull)], *own)

    def _sum(self, one: Node, other: Node) -> Node:
        value = one.value + other.value
        sources = [(one, lambda slope: slope), (other, lambda slope: slope)]
        return self._tape.add(value, sources, *self._own(lambda model: model.unit * np.abs(value), value))

    def _gated(self, both: Node) -> Node:
        gate, up = np.split(both.value, 2)
        value = silu_mul(gate, up)
        sigmoid = 1.0 / (1.0 + np.exp(-gate))
        by_gate = up * sigmoid * (1.0 + gate * (1.0 - sigmoid))

        def pull(slope: Array) -> Array:
            return np.concatenate([slope * by_gate, slope * gate * sigmoid], axis=-1)

        own = self._own(lambda model: silu_error(model, gate, up, value), value)
        return self._tape.add(value, [(both, pull)], *own)

    def _taken(self, whole: Node, first: int, count: int) -> Node:
        """Heads [first, first + count) of (heads, D)."""
        num_heads = whole.value.shape[0]

        def pull(slope: Array) -> Array:
            return np.pad(slope, ((0, 0), (first, num_heads - first - count), (0, 0)))

        return self._tape.add(whole.value[first : first + count], [(whole, pull)])

    def _turned(self, x: Node, position: int) -> Node:
        cos, sin = self._arrays["cos"][position], self._arrays["sin"][position]
        first, second = np.split(x.value, 2, axis=-1)
        value = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        def pull(slope: Array) -> Array:
            one, two = np.split(slope, 2, axis=-1)
            return np.concatenate([one * cos + two * sin, two * cos - one * sin], axis=-1)

        own = self._own(lambda model: rope_error(model, first, second, cos, sin), value)
        return self._tape.add(value, [(x, pull)], *own)

    def _attended(self, layer: int, part: Mapping[str, Array], qkv: Node, start: int, step: int) -> Node:
        config = self._config
        heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
        if "qkv_bias" in part:
            biased = qkv.value + part["qkv_bias"]
            own = self._own(lambda model: model.unit * np.abs(biased), biased)
            qkv = self._tape.add(biased, [(qkv, lambda slope: slope)], *own)
        shape = (heads + 2 * kv_heads, size)
        by_head = self._tape.add(qkv.value.reshape(shape), [(qkv, lambda slope: slope.reshape(len(slope), -1))])
        q, k = self._taken(by_head, 0, heads), self._taken(by_head, heads, kv_heads)
        if "q_norm" in part:
            q, k = self._norm(q, part["q_norm"]), self._norm(k, part["k_norm"])
        q, k = self._turned(q, start + step), self._turned(k, start + step)
        self._keys[layer].append(k)
        self._values[layer].append(self._taken(by_head, heads + kv_heads, kv_heads))
        return self._mixed(layer, part, q, start)

    def _mixed(self, layer: int, part: Mapping[str, Array], q: Node, start: int) -> Node:
        """One query over its layer's cache: the keys handed over are exact, those since are nodes."""
        config, scale = self._config, self._config.head_dim**-0.5
        group = config.num_attention_heads // config.num_kv_heads
        new_keys, new_values = self._keys[layer], self._values[layer]
        keys = np.concatenate([part["k"][:start], *(node.value[None] for node in new_keys)])
        values = np.concatenate([part["v"][:start], *(node.value[None] for node in new_values)])
        wide_k, wide_v = keys.repeat(group, axis=1), values.repeat(group, axis=1)
        p = softmax(scale * np.einsum("hd,shd->hs", q.value, wide_k), -1)
        value = np.einsum("hs,shd->hd", p, wide_v)

        def of_scores(slope: Array) -> Array:
            by_p = np.einsum("rhd,shd->rhs", slope, wide_v)
            return np.asarray(scale * p * (by_p - (p * by_p).sum(axis=-1, keepdims=True)))

        def of_query(slope: Array) -> Array:
            return np.asarray(np.einsum("rhs,shd->rhd", of_scores(slope), wide_k))

        def by_group(slope: Array) -> Array:
            return np.asarray(slope.reshape(len(slope), config.num_kv_heads, group, -1).sum(axis=2))

        def of_key(place: int) -> Pull:
            return lambda slope: by_group(of_scores(slope)[..., place, None] * q.value)

        def of_value(place: int) -> Pull:
            return lambda slope: by_group(p[:, place, None] * slope)

        seen = np.ones((1, len(keys)), dtype=bool)

        def error(model: ErrorModel) -> Array:
            parts = (
                attention_errors([model], q.value[h : h + 1], wide_k[:, h], wide_v[:, h], scale, seen)[1][0]
                for h in range(config.num_attention_heads)
            )
            return np.concatenate(list(parts))

        sources: list[tuple[Node, Pull]] = [(q, of_query)]
        sources += [(node, of_key(start + place)) for place, node in enumerate(new_keys)]
        sources += [(node, of_value(start + place)) for place, node in enumerate(new_values)]
        mixed = self._tape.add(value, sources, *self._own(error, value))
        return self._tape.add(mixed.value.reshape(-1), [(mixed, lambda slope: slope.reshape(len(slope), *value.shape))])
