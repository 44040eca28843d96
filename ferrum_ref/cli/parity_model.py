"""Wires a model on this machine to the judge: its decoder on a backend, and the same decoder in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ferrum_ref.assembly import load_model
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_ops import rope_by_type
from ferrum_ref.models.decoder_weights import DecoderWeights, WeightSource, read_decoder_weights
from ferrum_ref.models.moe import MoeWeights
from ferrum_ref.models.moe_routing import route
from ferrum_ref.parity.model import ModelVerdict, judge_model
from ferrum_ref.parity.model_trace import Chosen, Forward, GrowingKv, Observer, Run
from ferrum_ref.parity.units import Array
from ferrum_ref.parity.wide.arithmetic import FLOOR, WIDE
from ferrum_ref.parity.wide.backend import WideBackend


def judge_model_at(
    path: Path,
    backend: ComputeBackend,
    question: str,
    num_generated: int,
    progress: Callable[[int, int], None] | None = None,
) -> ModelVerdict:
    """The verdict on the model at `path`, answering `question`, with `backend`.  [PA-MODEL-1]

    Raises what opening the model raises; UnsupportedError for a backend without the kernels of its family.
    """
    loaded = load_model(path, backend)
    prompt = loaded.tokenizer.encode(loaded.tokenizer.apply_chat_template([ChatMessage.user(question)]), False)
    ids = [int(token) for token in prompt]
    with open_checkpoint(loaded.path) as checkpoint:
        return judge_decoder(loaded.decoder, checkpoint, ids, num_generated, progress)


def judge_decoder(
    decoder: Decoder,
    source: WeightSource,
    prompt: Sequence[int],
    num_generated: int,
    progress: Callable[[int, int], None] | None = None,
) -> ModelVerdict:
    """The verdict on a decoder, whatever its family, beside the weights and the configuration of `source`.

    Raises UnsupportedError where rotary tables would depend on the length of the text so far.  [PA-MODEL-7]
    """
    check_length(source.config, len(prompt) + num_generated)
    runs = reference_runs(source, len(prompt) + num_generated)
    judged = Run(forward_of(decoder), decoder.backend)
    return judge_model(judged, runs.wide, runs.floors, prompt, num_generated, runs.chosen, progress)


@dataclass(frozen=True, slots=True)
class ReferenceRuns:
    """One decoder on the judge's own backends; `chosen` gives the experts of each row, of a router's logits."""

    wide: Run
    floors: tuple[Run, ...]
    chosen: Chosen


def reference_runs(source: WeightSource, max_tokens: int) -> ReferenceRuns:
    """The decoder of `source` in float64 and twice in float32, over one copy of its weights.  [PA-WIDE-3]

    Matrices stay as the file packs them, in its memory: the source must stay open.
    """
    weights = read_decoder_weights(source, WideBackend(), packed=True)
    runs = []
    for arithmetic in (WIDE, *FLOOR):
        backend = WideBackend(arithmetic)
        runs.append(Run(forward_of(Decoder(source.config, weights, backend, max_tokens)), backend))
    return ReferenceRuns(runs[0], tuple(runs[1:]), _routing(source.config, weights))


def check_length(config: DecoderConfig, num_tokens: int) -> None:
    """Raises UnsupportedError for more tokens than rotary tables that grow with a text leave alone.  [PA-MODEL-7]"""
    for rope in rope_by_type(config).values():
        if rope.grows and num_tokens > rope.original_positions:
            raise UnsupportedError(
                f"parity: {num_tokens} tokens with rope_type {rope.kind!r}: beyond {rope.original_positions} its "
                "tables depend on the length so far, and a token's logits are not the whole text's; shorten the prompt"
            )


def forward_of(decoder: Decoder) -> Forward:
    """The decoder's forward over one sequence, logits of every row."""

    def forward(token_ids: Sequence[int], start: int, kv: GrowingKv, observe: Observer | None) -> TensorRef:
        batch = ForwardBatch.build([list(token_ids)], [start]).with_all_logits()
        return decoder.forward(batch, kv, observe)

    return forward


def _routing(config: DecoderConfig, weights: DecoderWeights) -> Chosen:
    """The decoder's own choice of experts, from the logits of its routers."""

    def chosen(name: str, logits: Array) -> Array:
        part = weights.layers[int(name.split(".")[1])].feed_forward_part
        if config.moe is None or not isinstance(part, MoeWeights):
            raise UnsupportedError(f"parity: {name}: a router in a layer without experts of this project's kind")
        biased = logits if part.router_bias is None else logits + part.router_bias
        return route(biased, config.moe, part.correction).experts

    return chosen
