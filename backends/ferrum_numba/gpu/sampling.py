"""Choosing a token from logits that lie on the device.   Clause: BK-NCUDA-15 (specs/backend_numba_cuda.md)."""

from __future__ import annotations

import math

import numpy as np

from ferrum_numba.gpu.integers import as_integers
from ferrum_numba.gpu.kernels.argmax import argmax as argmax_kernel
from ferrum_numba.gpu.kernels.sampling import MOST_THREADS, sample
from ferrum_numba.gpu.runtime import THREADS, whole_warps
from ferrum_numba.gpu.storage import storage_of
from ferrum_numba.gpu.tensor import NumbaTensor
from ferrum_ref.errors import BackendError, InvalidParameterError, ShapeError
from ferrum_ref.interfaces.kernel_ops import KernelSamplingParams

GREEDY_BELOW = 1e-5
PER_BLOCK = 4096  # logits that a block looks through
MOST_BLOCKS = 64


def argmax(logits: NumbaTensor) -> int:
    """The smallest i with logits[i] = max(logits) (D-03); logits (V,) or (1, V). Pure.

    Raises ShapeError for another shape or V = 0; BackendError for a NaN or -inf everywhere.
    """
    index, best = first_best("argmax", logits)
    return _checked("argmax", index, best)


def sample_token(logits: NumbaTensor, params: KernelSamplingParams) -> int:
    """Repetition penalty, temperature, top-k, top-p, then one draw, all in float64 on the device (D-18). Pure.

    Temperature below 1e-5 takes the first maximum of the penalised logits. Raises ShapeError; InvalidParameterError for
    a parameter outside its domain; BackendError for NaN, +inf or -inf everywhere.
    """
    operation = "sample_token"
    _check_parameters(params)
    index, best = first_best(operation, logits)
    _checked(operation, index, best)
    if best == math.inf:
        raise BackendError(f"{operation}: logits: got +inf at index {index}, expected finite logits or -inf")
    count, runtime = logits.numel(), logits.runtime
    penalised = _penalised(params, count)
    is_greedy = params.temperature < GREEDY_BELOW
    scores, chosen = (runtime.machine.empty(size, np.dtype(element)) for size, element in ((count, "f8"), (1, "i8")))
    runtime.launch(
        sample,
        (storage_of(logits.dtype(), operation),),
        1,
        whole_warps(count, MOST_THREADS),
        *(logits.flat(), scores, chosen, runtime.integers(penalised), count, penalised.size),
        *(params.repetition_penalty, 1.0 if is_greedy else params.temperature),
        *(params.top_k if 0 < params.top_k < count else 0, min(params.top_p, 1.0)),
        *(uniform_from_seed(params.rng_seed), int(is_greedy)),
    )
    return int(runtime.machine.download(chosen)[0])


def first_best(operation: str, logits: NumbaTensor) -> tuple[int, float]:
    """(index, value) of the first maximum, or of the first NaN if there is one. Raises ShapeError."""
    shape = logits.shape()
    if shape[-1:] != (logits.numel(),) or len(shape) not in (1, 2) or not logits.numel():
        raise ShapeError(f"{operation}: logits {shape}, expected (V,) or (1, V) with V > 0; pass one row at a time")
    runtime, count = logits.runtime, logits.numel()
    num_blocks = min(MOST_BLOCKS, -(-count // PER_BLOCK))
    values, indices = (runtime.machine.empty(num_blocks, np.dtype(element)) for element in ("f4", "i8"))
    kind = storage_of(logits.dtype(), operation)
    runtime.launch(
        argmax_kernel, (kind,), num_blocks, min(THREADS, whole_warps(count)), logits.flat(), values, indices, count
    )
    found = zip(runtime.machine.download(indices).tolist(), runtime.machine.download(values).tolist(), strict=True)
    return min(found, key=lambda pair: (not math.isnan(pair[1]), -pair[1] if pair[1] == pair[1] else 0.0, pair[0]))


def uniform_from_seed(seed: int) -> float:
    """u in [0, 1): the 32-bit seed, mixed by MurmurHash3's finaliser, over 2**32. Pure.

    Source: Appleby, MurmurHash3, fmix32.
    """
    mixed = seed ^ (seed >> 16)
    mixed = mixed * 0x85EBCA6B % 2**32
    mixed ^= mixed >> 13
    mixed = mixed * 0xC2B2AE35 % 2**32
    return (mixed ^ (mixed >> 16)) / 2.0**32


def _checked(operation: str, index: int, best: float) -> int:
    if math.isnan(best):
        raise BackendError(
            f"{operation}: NaN logits (index {index}), expected numbers; the model's forward pass has failed"
        )
    if best == -math.inf:
        raise BackendError(f"{operation}: No valid tokens: every logit is -inf; a mask excludes the whole vocabulary")
    return index


def _penalised(params: KernelSamplingParams, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The distinct listed ids of nonzero count, ascending."""
    listed = as_integers("sample_token", "repetition_token_ids", params.repetition_token_ids)
    counts = as_integers("sample_token", "repetition_token_freqs", params.repetition_token_freqs)
    if listed.size != counts.size:
        raise InvalidParameterError(
            f"sample_token: {listed.size} repetition_token_ids with {counts.size} repetition_token_freqs, "
            "expected equal counts"
        )
    if listed.size and not 0 <= int(listed.min()) <= int(listed.max()) < count:
        raise InvalidParameterError(
            f"sample_token: repetition_token_ids: got {int(listed.min())} to {int(listed.max())}, "
            f"expected ids in [0, {count})"
        )
    return np.unique(listed[counts != 0])


def _check_parameters(params: KernelSamplingParams) -> None:
    for name, good, expected in (
        ("temperature", 0 <= params.temperature < math.inf, "a number >= 0"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", params.top_p > 0, "a number above 0 (1 and more: off)"),
        ("repetition_penalty", 0 < params.repetition_penalty < math.inf, "a number above 0 (1: off)"),
        ("rng_seed", 0 <= params.rng_seed < 2**32, "an integer in [0, 2**32)"),
    ):
        if not good:
            raise InvalidParameterError(f"sample_token: {name}: got {getattr(params, name)}, expected {expected}")
