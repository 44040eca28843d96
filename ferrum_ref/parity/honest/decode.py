"""A decoder's steps in four arithmetics that all round to the storage type after every operation, or less often."""

from __future__ import annotations

import numpy as np

from ferrum_ref.kernels.rounding import round_to
from ferrum_ref.parity.honest.sums import F32, Kernel
from ferrum_ref.parity.ops.decode import config_of
from ferrum_ref.parity.ops.decode_weights import decoded, linear_reversed
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.units import Array

FORMS = ("plain", "reversed", "wide residual", "float32 throughout")


def linear_split(x: Array, weight: Array) -> Array:
    """x @ weight.T, the sum in two halves, rounded once."""
    half = x.shape[-1] // 2
    left = x[..., :half].astype(F32) @ weight[:, :half].astype(F32).T
    right = x[..., half:].astype(F32) @ weight[:, half:].astype(F32).T
    return np.asarray(round_to(left + right, x.dtype))


def decode_step(form: str) -> Kernel:
    def run(inputs: Inputs) -> tuple[Array, ...]:
        config, start, tokens = config_of(inputs), inputs.settings["start"], inputs.settings["tokens"]
        arrays = dict(inputs.arrays)
        if form == "float32 throughout":
            arrays = {name: array.astype(F32) for name, array in arrays.items()}
            logits = decoded(config, arrays, tokens, start)
        elif form == "wide residual":
            logits = decoded(config, arrays, tokens, start, linear_split, np.dtype(np.float32))
        else:
            logits = decoded(config, arrays, tokens, start, linear_split if form == "plain" else linear_reversed)
        return (np.array(round_to(logits, inputs.storage.numpy_dtype)),)

    return run
