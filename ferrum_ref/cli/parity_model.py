"""Wires a model on this machine to the judge: its decoder on a backend, its weights for the float64 run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ferrum_ref.assembly import load_model
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_rope import rope_tables
from ferrum_ref.parity.model import Forward, GrowingKv, ModelVerdict, Observer, judge_model


def judge_model_at(
    path: Path,
    backend: ComputeBackend,
    question: str,
    num_generated: int,
    progress: Callable[[int, int], None] | None = None,
) -> ModelVerdict:
    """The verdict on the model at `path`, answering `question`, with `backend`.  [PA-MODEL-1]

    Raises what opening the model raises; UnsupportedError for a backend or architecture without the kernels.
    """
    loaded = load_model(path, backend)
    if beyond := loaded.config.beyond_llama():
        raise UnsupportedError(
            f"parity: {loaded.config.architecture!r} with {', '.join(beyond)}: the float64 run beside it is that of a "
            "Llama; compare such a model with `ferrum-ref verify`"
        )
    prompt = loaded.tokenizer.encode(loaded.tokenizer.apply_chat_template([ChatMessage.user(question)]), False)
    tables = rope_tables(loaded.config.head_dim, len(prompt) + num_generated, loaded.config.rope_theta)
    with open_checkpoint(loaded.path) as checkpoint:
        return judge_model(
            checkpoint,
            tables,
            forward_of(loaded.decoder),
            lambda: GrowingKv(backend),
            [int(token) for token in prompt],
            num_generated,
            progress,
        )


def forward_of(decoder: Decoder) -> Forward:
    """The decoder's forward over one sequence, logits of every row."""

    def forward(token_ids: Sequence[int], start: int, kv: GrowingKv, observe: Observer | None) -> TensorRef:
        batch = ForwardBatch.build([list(token_ids)], [start]).with_all_logits()
        return decoder.forward(batch, kv, observe)

    return forward
