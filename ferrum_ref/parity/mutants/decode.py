"""Bugs of a decode loop: the hand-over, the position, what a layer adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ferrum_ref.parity.honest.attention import with_arrays, with_settings
from ferrum_ref.parity.honest.decode import decode_step
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]
HONEST = decode_step("plain")


def _named(inputs: Inputs, part: str) -> list[str]:
    return [name for name in inputs.arrays if name.startswith("layers.") and name.endswith(f".{part}")]


def cache_one_short(inputs: Inputs) -> Outputs:
    """The last position of the prefill is not taken over; the steps keep their places."""
    start = inputs.settings["start"]
    if not start:
        return HONEST(inputs)
    changed = {
        name: np.concatenate(
            [inputs.arrays[name][: start - 1], inputs.arrays[name][start - 2 : start - 1], inputs.arrays[name][start:]]
        )
        for part in "kv"
        for name in _named(inputs, part)
    }
    return HONEST(with_arrays(inputs, **changed))


def layers_share_a_cache(inputs: Inputs) -> Outputs:
    """Every layer reads what was handed over for the first."""
    changed = {name: inputs.arrays[f"layers.0.{part}"] for part in "kv" for name in _named(inputs, part)}
    return HONEST(with_arrays(inputs, **changed))


def keys_and_values_swapped(inputs: Inputs) -> Outputs:
    changed = {name: inputs.arrays[name[:-1] + other] for part, other in ("kv", "vk") for name in _named(inputs, part)}
    return HONEST(with_arrays(inputs, **changed))


def position_not_advanced(inputs: Inputs) -> Outputs:
    """Every step is turned as if it were the first."""
    start = inputs.settings["start"]
    tables = {}
    for name in ("cos", "sin"):
        table = inputs.arrays[name].copy()
        table[start:] = table[start]
        tables[name] = table
    return HONEST(with_arrays(inputs, **tables))


def step_not_kept(inputs: Inputs) -> Outputs:
    """A step's own key and value are forgotten once it is over."""
    tokens, start = inputs.settings["tokens"], inputs.settings["start"]
    rows = []
    for index in range(len(tokens)):
        cos, sin = (np.roll(inputs.arrays[name], -index, axis=0) for name in ("cos", "sin"))
        one = with_settings(with_arrays(inputs, cos=cos, sin=sin), tokens=tokens[index : index + 1], start=start)
        rows.append(HONEST(one)[0])
    return (np.concatenate(rows),)


def first_gate_for_all(inputs: Inputs) -> Outputs:
    """Gate and up are taken from the same half."""
    changed = {}
    for name in _named(inputs, "gate_up"):
        half = inputs.arrays[name].shape[0] // 2
        changed[name] = np.concatenate([inputs.arrays[name][:half], inputs.arrays[name][:half]])
    return HONEST(with_arrays(inputs, **changed))


def head_norms_ignored(inputs: Inputs) -> Outputs:
    names = {*_named(inputs, "q_norm"), *_named(inputs, "k_norm")}
    return HONEST(replace(inputs, arrays={name: one for name, one in inputs.arrays.items() if name not in names}))


def bias_ignored(inputs: Inputs) -> Outputs:
    names = set(_named(inputs, "qkv_bias"))
    return HONEST(replace(inputs, arrays={name: one for name, one in inputs.arrays.items() if name not in names}))


def final_gain_ignored(inputs: Inputs) -> Outputs:
    return HONEST(with_arrays(inputs, final_norm=np.ones_like(inputs.arrays["final_norm"])))


def value_bias_ignored(inputs: Inputs) -> Outputs:
    """The bias is added to q and k only."""
    sizes, changed = inputs.case.sizes, {}
    for name in _named(inputs, "qkv_bias"):
        changed[name] = inputs.arrays[name].copy()
        changed[name][-sizes["G"] * sizes["D"] :] = 0
    return HONEST(with_arrays(inputs, **changed))


def logits_of_previous_step(inputs: Inputs) -> Outputs:
    (logits,) = HONEST(inputs)
    return (np.concatenate([logits[:1], logits[:-1]]),)


def _mutant(name: str, run: object) -> Mutant:
    return Mutant("decode", "decode_step", name, run)  # type: ignore[arg-type]


DECODE: tuple[Mutant, ...] = (
    _mutant("last position not handed over", cache_one_short),
    _mutant("layers share a cache", layers_share_a_cache),
    _mutant("keys and values swapped", keys_and_values_swapped),
    _mutant("position not advanced", position_not_advanced),
    _mutant("a step's key not kept", step_not_kept),
    _mutant("gate for up", first_gate_for_all),
    _mutant("q and k norms ignored", head_norms_ignored),
    _mutant("bias ignored", bias_ignored),
    _mutant("logits of the step before", logits_of_previous_step),
    _mutant("gain of the last norm ignored", final_gain_ignored),
    _mutant("bias of the values ignored", value_bias_ignored),
)
