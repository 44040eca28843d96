"""A decode backend: a prefill handed over, then one token after another, against the float64 decoder's logits.

The bounds are those of its operations, carried through it by the derivatives of the logits.  Clauses: PA-DECODE-1..3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.transformer import TransformerConfig, TransformerWeights
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.decode_bound import DecodeBound
from ferrum_ref.parity.ops.decode_weights import EPS, ArrayWeights, decoded
from ferrum_ref.parity.ops.operation import Case, Expected, Inputs, Operation, case
from ferrum_ref.parity.units import Array, Storage, confidence_factor
from ferrum_ref.types.algorithm import Algorithm

MakeDecode = Callable[[ComputeBackend, TransformerWeights, int], DecodeBackend]


class DecodeStep(Operation):
    """L layers, S positions handed over, `steps` tokens after them; V logits each."""

    name = "decode_step"
    cases = (
        case("handed over", L=2, H=4, G=2, D=16, E=48, F=80, V=97, S=13, steps=4),
        case("from nothing", L=2, H=4, G=4, D=16, E=40, F=64, V=65, S=0, steps=5),
        case("q and k norms", L=2, H=4, G=1, D=16, E=48, F=80, V=97, S=9, steps=3),
        case("bias", L=2, H=3, G=3, D=16, E=48, F=80, V=97, S=9, steps=3),
        case("more rows than tokens", L=1, H=4, G=2, D=32, E=64, F=96, V=80, S=20, steps=2),
        case("cache grows", L=1, H=2, G=1, D=16, E=32, F=48, V=50, S=62, steps=5),
        case("two sequences", L=2, H=4, G=2, D=16, E=48, F=80, V=97, S=7, steps=4),
        case("handed over", small=False, L=2, H=9, G=3, D=64, E=576, F=384, V=256, S=40, steps=3),
    )

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        sizes = case.sizes
        hidden, inner, size = sizes["E"], sizes["F"], sizes["D"]
        heads, kv_heads, length = sizes["H"], sizes["G"], sizes["S"] + sizes["steps"] + 1

        def matrix(rows: int, columns: int) -> Array:
            return draws.normal(rng, (rows, columns), storage, columns**-0.5)

        arrays = {"embed": draws.normal(rng, (sizes["V"], hidden), storage), "head": matrix(sizes["V"], hidden)}
        arrays["final_norm"] = draws.gain(rng, hidden, storage)
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(size // 2) / (size // 2))
        arrays["cos"], arrays["sin"] = storage.round(np.cos(angles)), storage.round(np.sin(angles))
        spare = 3 if case.probe == "more rows than tokens" else 0
        for layer in range(sizes["L"]):
            parts = {
                "input_norm": draws.gain(rng, hidden, storage),
                "qkv": matrix((heads + 2 * kv_heads) * size, hidden),
                "o": matrix(hidden, heads * size),
                "post_norm": draws.gain(rng, hidden, storage),
                "gate_up": matrix(2 * inner, hidden),
                "down": matrix(hidden, inner),
            }
            if case.probe == "q and k norms":
                parts["q_norm"], parts["k_norm"] = (draws.gain(rng, size, storage) for _ in range(2))
            if case.probe == "bias":
                parts["qkv_bias"] = draws.normal(rng, ((heads + 2 * kv_heads) * size,), storage)
            for name in "kv":
                parts[name] = draws.normal(rng, (sizes["S"] + spare, kv_heads, size), storage)
                parts[name][sizes["S"] :] = np.nan
            arrays.update({f"layers.{layer}.{name}": part for name, part in parts.items()})
        tokens = rng.integers(sizes["V"], size=sizes["steps"])
        return Inputs(case, storage, arrays, {"tokens": tokens, "start": sizes["S"]})

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        return self.stepped(backend, inputs, bridge.own_decode_backend)

    def stepped(self, backend: ComputeBackend, inputs: Inputs, make: MakeDecode) -> tuple[Array, ...]:
        """The logits of all steps, through the decode backend that `make` builds on `backend`."""
        tensors = {name: bridge.tensor(backend, inputs, name) for name in inputs.arrays}
        config, start = config_of(inputs), inputs.settings["start"]
        decode = make(backend, ArrayWeights(config, tensors), config.max_seq_len)
        handed = [(tensors[f"layers.{layer}.k"], tensors[f"layers.{layer}.v"]) for layer in range(config.num_layers)]
        decode.init_kv_cache("judged", handed, start)
        if inputs.case.probe == "two sequences":
            decode.init_kv_cache("other", handed, max(start - 2, 0))
        rows = []
        for step, token in enumerate(inputs.settings["tokens"].tolist()):
            rows.append(decode.decode_step(token, start + step, "judged").to_numpy().reshape(1, -1))
            if inputs.case.probe == "two sequences":  # what another sequence does leaves no trace
                decode.decode_step((token + 1) % config.vocab_size, max(start - 2, 0) + step, "other")
        decode.release_kv_cache("judged")
        return (np.concatenate(rows),)

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        config, start, tokens = config_of(inputs), inputs.settings["start"], inputs.settings["tokens"]
        wide = {name: inputs.exact(name) for name in inputs.arrays}
        value = decoded(config, wide, tokens, start)
        worst, spread, (factor, varies) = DecodeBound(config, wide, inputs.storage, algorithm).errors(tokens, start)
        probable = np.minimum(worst, confidence_factor(1, value.size) * spread)
        factor = min(factor, confidence_factor(1, 1) * varies)
        axes = ("step", "token")
        return [Expected("logits", value, axes, inputs.storage.numpy_dtype, worst, prob=probable, factor=factor)]


def config_of(inputs: Inputs) -> TransformerConfig:
    """The dimensions that a case's sizes name."""
    sizes = inputs.case.sizes
    return TransformerConfig(
        num_layers=sizes["L"],
        hidden_size=sizes["E"],
        num_attention_heads=sizes["H"],
        num_kv_heads=sizes["G"],
        head_dim=sizes["D"],
        intermediate_size=sizes["F"],
        vocab_size=sizes["V"],
        max_seq_len=sizes["S"] + sizes["steps"] + 1,
        rms_norm_eps=EPS,
        has_qk_norm="layers.0.q_norm" in inputs.arrays,
    )
