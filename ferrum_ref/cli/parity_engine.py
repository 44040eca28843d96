"""Wires the reference's engine parts to the judge's laws."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.decode_backend import DecodeBackend
from ferrum_ref.interfaces.transformer import TransformerWeights
from ferrum_ref.judging.subject import open_subject
from ferrum_ref.kv_cache.block_pool import BlockPool
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.parity.engine.parts import EngineParts
from ferrum_ref.parity.subject import Subject
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.tokenizer import HuggingFaceTokenizer
from ferrum_ref.types.config import SchedulerConfig, SchedulingPolicy
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens

WORDS = ("he", "ll", "hell", "hello")
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]


def reference_parts() -> EngineParts:
    """The parts that the engine here is built from."""
    return EngineParts(
        make_pool=BlockPool,
        make_manager=lambda num_blocks, size: PagedKvCacheManager(num_blocks, size),
        make_cache=lambda num_blocks, size, caching: PagedKvCacheManager(
            num_blocks, size, enable_prefix_caching=caching
        ),
        make_scheduler=_scheduler,
        make_loop=lambda scheduler, cache, hint: StepLoop(scheduler, cache, hint),
        make_tokenizer=byte_tokenizer,
    )


def decode_backend(backend: ComputeBackend, weights: TransformerWeights, max_tokens: int) -> DecodeBackend:
    """The decode loop over any backend's kernels, for backends without one of their own."""
    return TransformerDecodeBackend(weights, backend, max_tokens=max_tokens)


def open_judged(name: str, device: str) -> Subject:
    """Whom the command line names, with the reference's decode loop where it has none of its own.  [PA-OPEN-1]"""
    return open_subject(name, device, decode_backend)


def _scheduler(max_chunk_tokens: int | None, by_priority: bool) -> ContinuousBatchScheduler:
    policy = SchedulingPolicy.Priority if by_priority else SchedulingPolicy.FCFS
    return ContinuousBatchScheduler(SchedulerConfig(policy=policy), max_chunk_tokens=max_chunk_tokens)


def byte_tokenizer() -> HuggingFaceTokenizer:
    """One id for each byte, four longer pieces, and one special token."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelled = [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]
    vocabulary = {text: number for number, text in enumerate([*spelled, *WORDS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return HuggingFaceTokenizer(backend, special_tokens=SpecialTokens(eos_token=TokenId(len(vocabulary))))
