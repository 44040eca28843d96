"""Reading executor inputs: one sequence's ids, mask and positions out of tensors.

Clauses: MX-PREFILL-2..3, MX-DECODE-2 (specs/model_executor.md).
"""

from __future__ import annotations

from ferrum_ref.errors import ModelError, UnsupportedError
from ferrum_ref.interfaces.model_executor import DecodeInput, PrefillInput
from ferrum_ref.interfaces.tensor import TensorRef


def prompt_ids(input: PrefillInput) -> list[int]:
    """The real tokens of a one-sequence prompt; padding, which the mask puts on the right, is dropped. Pure.

    Raises UnsupportedError for several sequences (a handle is one sequence's cache), ModelError for an empty prompt or
    a mask that is not ones followed by zeros, InvalidParameterError for ids that are no integers.
    """
    _require_one_sequence("prefill", input.batch_size())
    ids = input.input_ids.to_vec_u32()
    if input.attention_mask is not None:
        mask = input.attention_mask.to_vec_u32()
        num_real = sum(mask)
        if mask != [1] * num_real + [0] * (len(ids) - num_real):
            raise ModelError(
                "prefill: attention_mask must be ones for the prompt, then zeros for padding, one per id;"
                f" got {mask[:8]}... for {len(ids)} ids"
            )
        ids = ids[:num_real]
    if not ids:
        raise ModelError("prefill: the prompt is empty; give at least one token")
    return ids


def decode_id(input: DecodeInput) -> int:
    """The one new token. Pure.  Raises UnsupportedError for several sequences, ModelError for several tokens."""
    _require_one_sequence("decode", input.batch_size())
    ids = input.input_ids.to_vec_u32()
    if len(ids) != 1:
        raise ModelError(f"decode: expected one token id, got {len(ids)}; run several through prefill")
    return ids[0]


def first_position(operation: str, positions: TensorRef | None, num_tokens: int, num_cached: int) -> int:
    """Where the new tokens start: `num_cached`, which explicit positions must agree with. Pure.  [D-66]

    Raises ModelError unless positions are num_cached, num_cached + 1, ... for the real tokens.
    """
    if positions is None:
        return num_cached
    given = positions.to_vec_u32()[:num_tokens]
    if given != list(range(num_cached, num_cached + num_tokens)):
        raise ModelError(
            f"{operation}: position_ids must be {num_cached}, {num_cached + 1}, ... for {num_tokens} tokens"
            f" (the cache holds {num_cached}), got {given[:4]}..."
        )
    return num_cached


def _require_one_sequence(operation: str, batch_size: int) -> None:
    if batch_size != 1:
        raise UnsupportedError(
            f"{operation}: batch of {batch_size} with one cache handle; a handle is one sequence's cache:"
            f" use batch_{operation} or unified_decode"
        )
