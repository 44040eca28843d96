"""Bugs of the engine's parts, each a wrapper that passes everything on but one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ferrum_ref.parity.engine.parts import EngineParts
from ferrum_ref.parity.mutants import engine_blocks as blocks
from ferrum_ref.parity.mutants import engine_steps as steps
from ferrum_ref.parity.mutants import engine_streams as streams
from ferrum_ref.parity.mutants.wrapped import Wrapped

Mutate = Callable[[EngineParts], EngineParts]


@dataclass(frozen=True)
class EngineMutant:
    """`mutate` gives parts of which one has a bug."""

    group: str
    name: str
    mutate: Mutate


def _pool(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant("KV cache", name, lambda parts: replace(parts, make_pool=_after(parts.make_pool, wrapper)))


def _manager(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant(
        "KV cache", name, lambda parts: replace(parts, make_manager=_after(parts.make_manager, wrapper))
    )


def _cache(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant("KV cache", name, lambda parts: replace(parts, make_cache=_after(parts.make_cache, wrapper)))


def _scheduler(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant(
        "scheduler", name, lambda parts: replace(parts, make_scheduler=_after(parts.make_scheduler, wrapper))
    )


def _loop(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant("scheduler", name, lambda parts: replace(parts, make_loop=_after(parts.make_loop, wrapper)))


def _tokenizer(name: str, wrapper: type[Wrapped]) -> EngineMutant:
    return EngineMutant(
        "tokenizer", name, lambda parts: replace(parts, make_tokenizer=_after(parts.make_tokenizer, wrapper))
    )


def _after(make: Callable[..., Any], wrapper: type[Wrapped]) -> Callable[..., Any]:
    return lambda *arguments: wrapper(make(*arguments))


ENGINE_MUTANTS: tuple[EngineMutant, ...] = (
    _pool("double free accepted", blocks.FreesTwice),
    _pool("partial allocation not rolled back", blocks.LendsPart),
    _pool("last block never given back", blocks.KeepsLast),
    _pool("one block lent twice", blocks.LendsOneTwice),
    _pool("block numbers from 1", blocks.CountsFromOne),
    _manager("partial block forgotten", blocks.RoundsDown),
    _manager("growth noticed one token late", blocks.ExtendsLate),
    _manager("failed extension keeps a block", blocks.ExtendsPartly),
    _manager("failed allocation keeps a block", blocks.AllocatesPartly),
    _manager("release keeps a block", blocks.LeaksOnRelease),
    _manager("fork's blocks not counted", blocks.ForksWithoutCount),
    _manager("write to a shared block", blocks.WritesShared),
    _cache("prefix hit names a wrong block", blocks.HitsWrongBlock),
    _cache("prefix known by its place alone", blocks.HitsByPosition),
    _cache("block findable before it is full", blocks.RegistersTooEarly),
    _cache("room for one token fewer", blocks.GrowsOneShort),
    _cache("failed admission keeps a block", blocks.LeaksWhenShort),
    _cache("shared block freed twice", blocks.FreesSharedTwice),
    _cache("one block left behind", blocks.LeaksOnce),
    _cache("spoiled blocks trusted", blocks.TrustsSpoiledBlocks),
    _scheduler("token budget ignored", steps.IgnoresBudget),
    _scheduler("batch size ignored", steps.IgnoresBatchSize),
    _scheduler("last in, first out", steps.LastInFirstOut),
    _scheduler("priority ignored", steps.IgnoresPriority),
    _scheduler("a request forgotten", steps.ForgetsThird),
    _scheduler("a position skipped between chunks", steps.SkipsPosition),
    _scheduler("partial prompt samples", steps.SamplesTooEarly),
    _scheduler("preemption replays output", steps.ReplaysAfterPreemption),
    _scheduler("a request twice in a step", steps.RunsTwice),
    _loop("tokens handed to the neighbour", steps.SwapsTokens),
    _loop("last token lost", steps.LosesLastToken),
    _loop("stop token ignored", steps.IgnoresStop),
    _loop("one token beyond max_tokens", steps.OneTokenMore),
    _loop("cancelled request goes on", steps.KeepsCancelled),
    _loop("failed step counts as done", steps.CommitsFailedStep),
    _tokenizer("split UTF-8 emits U+FFFD", streams.DecodesAlone),
    _tokenizer("end of the stream lost", streams.DropsEnd),
    _tokenizer("spaces of a piece stripped", streams.StripsPieces),
    _tokenizer("text held back to the end", streams.HoldsBack),
    _tokenizer("streams share a state", streams.SharesState),
    _tokenizer("reset forgets nothing", streams.KeepsStateOnReset),
    _tokenizer("special tokens shown", streams.ShowsSpecialTokens),
)
