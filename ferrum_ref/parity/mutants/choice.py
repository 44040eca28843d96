"""Bugs of sampling, look-ups, conversions and rearrangements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np

from ferrum_ref.interfaces.kernel_ops import SamplingParams
from ferrum_ref.kernels.rounding import cast as kernel_cast
from ferrum_ref.parity import oracle
from ferrum_ref.parity.honest.exact import drawn, embedding, moving
from ferrum_ref.parity.honest.sums import F32
from ferrum_ref.parity.mutants.mutant import Mutant
from ferrum_ref.parity.mutants.partial import columns_kept, elements_kept
from ferrum_ref.parity.ops.cast import TARGETS
from ferrum_ref.parity.ops.operation import Inputs
from ferrum_ref.parity.ops.shaping import Concat, Permute
from ferrum_ref.parity.units import Array

Outputs = tuple[Array, ...]
Law = Callable[[Array, SamplingParams], Array]


def sampler(law: Law, pick: Callable[[Array, Array], Array] = drawn) -> Callable[[Inputs], Outputs]:
    """A sampler of the distribution `law(logits, params)`, drawn by `pick(p, u)`."""

    def run(inputs: Inputs) -> Outputs:
        p = law(inputs.exact("logits").reshape(-1), inputs.settings["params"])
        return (pick(p, oracle.uniforms(inputs.settings["seeds"])),)

    return run


def honest_law(logits: Array, params: SamplingParams) -> Array:
    return oracle.sampling_law(logits, params)[1]


def with_params(change: Callable[[SamplingParams], SamplingParams]) -> Law:
    return lambda logits, params: honest_law(logits, change(params))


def temperature_off(factor: float) -> Law:
    return with_params(lambda one: replace(one, temperature=one.temperature * factor))


def top_k_off(difference: int) -> Law:
    return with_params(lambda one: replace(one, top_k=max(one.top_k + difference, 1) if one.top_k else 0))


def greedy_always(logits: Array, params: SamplingParams) -> Array:
    return honest_law(logits, replace(params, temperature=0.0))


def crossing_token_dropped(logits: Array, params: SamplingParams) -> Array:
    """Top-p keeps an id while the mass up to and including it is below p."""
    p = honest_law(logits, replace(params, top_p=1.0))
    if params.top_p >= 1.0:
        return p
    order = np.argsort(-p, kind="stable")
    kept = np.cumsum(p[order]) < params.top_p
    kept[0] = True
    p[order[~kept]] = 0.0
    return np.asarray(p / p.sum())


def temperature_after_filters(logits: Array, params: SamplingParams) -> Array:
    """Top-p looks at the untempered distribution."""
    p = honest_law(logits, replace(params, temperature=1.0))
    scores = oracle.sampling_law(logits, replace(params, top_k=0, top_p=1.0))[0]
    weights = np.where(p > 0.0, np.exp(scores - scores[p > 0.0].max()), 0.0)
    return np.asarray(weights / weights.sum())


def top_k_ties_cut(logits: Array, params: SamplingParams) -> Array:
    """Exactly k ids stay, the lowest ids of equals."""
    scores, p = oracle.sampling_law(logits, replace(params, top_k=0, top_p=1.0))
    if params.top_k:
        order = np.argsort(-scores, kind="stable")
        p[order[params.top_k :]] = 0.0
        p = p / p.sum()
    if params.top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[1:][before[1:] >= params.top_p]] = 0.0
    return np.asarray(p / p.sum())


def penalty_per_listing(logits: Array, params: SamplingParams) -> Array:
    """An id listed twice is penalised twice."""
    x = logits.copy()
    for token, count in zip(params.repetition_token_ids, params.repetition_token_freqs, strict=True):
        if count:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    return honest_law(x, replace(params, repetition_token_ids=[], repetition_token_freqs=[]))


def penalty_divides_negatives(logits: Array, params: SamplingParams) -> Array:
    x = logits.copy()
    active = [t for t, n in zip(params.repetition_token_ids, params.repetition_token_freqs, strict=True) if n]
    x[active] /= params.repetition_penalty
    return honest_law(x, replace(params, repetition_token_ids=[], repetition_token_freqs=[]))


def counts_ignored(logits: Array, params: SamplingParams) -> Array:
    ones = [1] * len(params.repetition_token_ids)
    return honest_law(logits, replace(params, repetition_token_freqs=ones))


def first_256_ids(logits: Array, params: SamplingParams) -> Array:
    p = honest_law(logits, params)
    p[256:] = 0.0
    return np.asarray(p / p.sum()) if p.sum() > 0 else honest_law(logits, params)


def masked_drawn_at_zero(p: Array, uniform: Array) -> Array:
    """The first id whose running sum reaches u: at u = 0 that is id 0, masked or not."""
    running = np.cumsum(p)
    index = np.searchsorted(running, uniform * running[-1], side="left")
    return np.asarray(np.minimum(index, p.size - 1), dtype=np.int64)


def quarter_of_uniforms(p: Array, uniform: Array) -> Array:
    """A generator of only 64 different numbers."""
    return drawn(p, np.floor(uniform * 64.0) / 64.0)


def never_last(p: Array, uniform: Array) -> Array:
    """The search ends before the last id."""
    return np.minimum(drawn(p, uniform), p.size - 2)


def one_token_never(p: Array, uniform: Array) -> Array:
    """One id is lost: its neighbour is drawn instead."""
    index, lost = drawn(p, uniform), p.size // 3
    return np.where((index == lost) & (p[lost] < 1.0), (lost + 1) % p.size, index)


def descending_order(p: Array, uniform: Array) -> Array:
    """Ids are gone through from the most to the least likely, not in their order."""
    order = np.argsort(-p, kind="stable")
    return np.asarray(order[drawn(p[order], uniform)], dtype=np.int64)


def last_of_ties(inputs: Inputs) -> Outputs:
    logits = inputs.arrays["logits"].reshape(-1).astype(np.float64)
    return (np.array(logits.size - 1 - np.argmax(logits[::-1]), dtype=np.int64),)


def padded_vocabulary(inputs: Inputs) -> Outputs:
    """A last block filled up with zeros: wrong as soon as every logit is negative."""
    logits = inputs.arrays["logits"].reshape(-1).astype(np.float64)
    padded = np.concatenate([logits, np.zeros(-logits.size % 64)])
    return (np.array(np.argmax(padded), dtype=np.int64),)


def compared_in_bf16(inputs: Inputs) -> Outputs:
    narrow = ml_dtypes.bfloat16 if inputs.storage.name != "bf16" else ml_dtypes.float8_e4m3fn
    logits = inputs.arrays["logits"].reshape(-1).astype(F32).astype(narrow).astype(F32)
    return (np.array(np.argmax(np.nan_to_num(logits)), dtype=np.int64),)


def ordered_by_code(inputs: Inputs) -> Outputs:
    """Numbers compared as sortable integers, for an atomic maximum: -0 is less than 0 there."""
    codes = inputs.arrays["logits"].reshape(-1).astype(F32).view(np.uint32)
    keys = np.where(codes >> np.uint32(31), ~codes, codes | np.uint32(0x80000000))
    return (np.array(np.argmax(keys), dtype=np.int64),)


def best_from_a_constant(inputs: Inputs) -> Outputs:
    """The best so far starts at -10,000, id 0."""
    logits = inputs.arrays["logits"].reshape(-1).astype(np.float64)
    return (np.array(np.argmax(logits) if logits.max() > -1e4 else 0, dtype=np.int64),)


def greedy_takes_the_last(inputs: Inputs) -> Outputs:
    if inputs.settings["params"].temperature >= oracle.GREEDY_BELOW:
        return sampler(honest_law)(inputs)
    return (np.full(len(inputs.settings["seeds"]), last_of_ties(inputs)[0], dtype=np.int64),)


def greedy_at_zero_only(inputs: Inputs) -> Outputs:
    """A temperature that is small but not zero divides the logits."""
    params = inputs.settings["params"]
    if not 0.0 < params.temperature < oracle.GREEDY_BELOW:
        return sampler(honest_law)(inputs)
    p = np.exp((inputs.exact("logits") - inputs.exact("logits").max()) / params.temperature)
    return (drawn(p / p.sum(), oracle.uniforms(inputs.settings["seeds"])),)


def penalty_after_filters(logits: Array, params: SamplingParams) -> Array:
    """The filters look at logits that are not penalised yet."""
    if not params.repetition_token_ids:
        return honest_law(logits, params)
    kept = honest_law(logits, replace(params, repetition_token_ids=[], repetition_token_freqs=[])) > 0.0
    scores = oracle.sampling_law(logits, replace(params, top_k=0, top_p=1.0))[0]
    weights = np.where(kept, np.exp(scores - scores[kept].max()), 0.0)
    return np.asarray(weights / weights.sum())


def id_off_by_one(inputs: Inputs) -> Outputs:
    table = inputs.arrays["table"]
    return (table[np.minimum(inputs.settings["ids"] + 1, len(table) - 1)],)


def ids_in_16_bits(inputs: Inputs) -> Outputs:
    return (inputs.arrays["table"][inputs.settings["ids"] % 64],)


def _cast(convert: Callable[[Array, str], Array]) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        name = inputs.storage.name if inputs.case.probe == "from fp8" else str(inputs.case.sizes["to"])
        with np.errstate(all="ignore"):
            return (convert(np.asarray(inputs.arrays["x"]), name),)

    return run


def cut(x: Array, name: str) -> Array:
    """Towards zero instead of to nearest."""
    y = np.array(kernel_cast(x, TARGETS[name][1]))
    beyond = np.abs(y.astype(np.float64)) > np.abs(x.astype(np.float64))
    codes = y.view(f"u{y.dtype.itemsize}")
    codes -= beyond.astype(codes.dtype)
    return codes.view(y.dtype)


def ties_away(x: Array, name: str) -> Array:
    """A middle between two numbers goes away from zero."""
    wide = x.astype(np.float64)
    nudged = wide * (1.0 + 2.0**-40)
    return np.array(kernel_cast(nudged, TARGETS[name][1]))


def saturated(x: Array, name: str) -> Array:
    """Overflow gives the largest number, infinities too."""
    dtype = TARGETS[name][1]
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return np.array(kernel_cast(np.clip(x.astype(np.float64), -largest, largest), dtype))


def overflow_is_nan(x: Array, name: str) -> Array:
    """What lies beyond the largest FP8 number becomes NaN."""
    dtype = TARGETS[name][1]
    return np.array(x.astype(F32).astype(dtype) if name == "fp8" else kernel_cast(x, dtype))


def rounded_twice(x: Array, name: str) -> Array:
    """Through the other 16-bit type."""
    between = np.float16 if name == "bf16" else ml_dtypes.bfloat16
    return np.array(kernel_cast(np.array(kernel_cast(x, np.dtype(between))), TARGETS[name][1]))


def flushed(x: Array, name: str) -> Array:
    dtype = TARGETS[name][1]
    y = np.array(kernel_cast(x, dtype))
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
    return np.asarray(np.where(np.abs(y.astype(np.float64)) < smallest, np.zeros_like(y), y))


def _sampling(name: str, law: Law, pick: Callable[[Array, Array], Array] = drawn) -> Mutant:
    return Mutant("sampling", "sample_token", name, sampler(law, pick))


SAMPLING: tuple[Mutant, ...] = (
    Mutant("sampling", "argmax", "last of the ties", last_of_ties),
    Mutant("sampling", "argmax", "padding of zeros wins", padded_vocabulary),
    Mutant("sampling", "argmax", "compared in fewer bits", compared_in_bf16, ("fp32", "bf16")),
    _sampling("temperature 2 % too high", temperature_off(1.02)),
    _sampling("temperature inverted", with_params(lambda p: replace(p, temperature=1.0 / max(p.temperature, 0.01)))),
    _sampling("greedy whatever is asked", greedy_always),
    _sampling("top-k one more", top_k_off(1)),
    _sampling("top-k one less", top_k_off(-1)),
    _sampling("top-k cuts ties", top_k_ties_cut),
    _sampling("top-p drops the crossing id", crossing_token_dropped),
    _sampling("temperature after the filters", temperature_after_filters),
    _sampling("penalty once for each listing", penalty_per_listing),
    _sampling("penalty divides negative logits", penalty_divides_negatives),
    _sampling("penalty ignores the counts", counts_ignored),
    _sampling("only the first 256 ids", first_256_ids),
    _sampling("masked id drawn at u = 0", honest_law, masked_drawn_at_zero),
    _sampling("only 64 different draws", honest_law, quarter_of_uniforms),
    _sampling("last id never drawn", honest_law, never_last),
    _sampling("one id never drawn", honest_law, one_token_never),
    _sampling("running sum in another order", honest_law, descending_order),
    Mutant("sampling", "argmax", "signed zeros apart", ordered_by_code),
    Mutant("sampling", "argmax", "best starts at -10,000", best_from_a_constant),
    Mutant("sampling", "sample_token", "greedy takes the last of ties", greedy_takes_the_last),
    Mutant("sampling", "sample_token", "greedy at 0 only", greedy_at_zero_only),
    _sampling("penalty after the filters", penalty_after_filters),
)
_MOVED = {operation.name: moving(operation, "plain") for operation in (Concat(), Permute())}
EXACT: tuple[Mutant, ...] = (
    Mutant("primitive", "embedding", "id off by one", id_off_by_one),
    Mutant("primitive", "embedding", "id in too few bits", ids_in_16_bits),
    Mutant("primitive", "cast", "cut instead of rounded", _cast(cut)),
    Mutant("primitive", "cast", "ties away from zero", _cast(ties_away)),
    Mutant("primitive", "cast", "overflow saturates everywhere", _cast(saturated)),
    Mutant("primitive", "cast", "FP8 overflow is NaN", _cast(overflow_is_nan)),
    Mutant("primitive", "cast", "through the other 16-bit type", _cast(rounded_twice)),
    Mutant("primitive", "cast", "subnormals flushed", _cast(flushed)),
    Mutant("primitive", "embedding", "only 128 features", columns_kept(embedding("plain"), 128)),
    Mutant("primitive", "concat", "only 256 elements", elements_kept(_MOVED["concat"], 256)),
    Mutant("primitive", "permute", "only 256 elements", elements_kept(_MOVED["permute"], 256)),
)
