"""A model over several processes: what each of them does, and the call that starts them all.

    results = run_jobs([Job("model/", [1, 2, 3], num_new_tokens=8, num_shards=2)], num_ranks=4)
    results[0][0].logits, results[0][0].tokens              # of the first job, on rank 0

Clauses: TP-RUN-5, TP-PROC-1..4 (specs/parallel.md).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import (
    FerrumError,
    FerrumTimeoutError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    ResourceExhaustedError,
)
from ferrum_ref.interfaces.collectives import Collectives
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_latent import LatentKvFactory
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.parallel.pipeline import PipelineStage, read_stage
from ferrum_ref.parallel.processes import EXIT_LOST, run_processes
from ferrum_ref.parallel.rules import ExpertSharding, check_ranks
from ferrum_ref.parallel.source import layer_ranges
from ferrum_ref.parallel.subgroup import grid
from ferrum_ref.plugins import load_backend

GLOO: Final = "ferrum_torch.collectives:make_collectives"
TIMEOUT_S: Final = 600.0
_EXIT_FAILED: Final = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One text through one model: the logits of every given token, then greedy tokens up to one that stops."""

    model: str
    token_ids: list[int]
    num_new_tokens: int = 0
    num_shards: int = 0  # tensor-parallel ranks of each pipeline stage; 0: all ranks, in one stage
    stop_token_ids: tuple[int, ...] = ()
    experts: str = "split"  # or "whole"
    backend: str = "numpy"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class JobResult:
    """logits `[T, V]` of the given tokens; the greedy tokens after them; bytes of this rank's weights."""

    logits: npt.NDArray[np.float32]
    tokens: list[int]
    num_weight_bytes: int


def run_jobs(
    jobs: Sequence[Job],
    num_ranks: int,
    *,
    collectives: str = GLOO,
    timeout_s: float = TIMEOUT_S,
) -> list[list[JobResult]]:
    """Every rank's results, `[rank][job]`, from processes on this machine.  [TP-RUN-5, TP-PROC-4]

    What cannot lie over that many ranks is refused before a process is started: InvalidParameterError, naming both
    numbers. Raises NetworkError and FerrumTimeoutError as `run_processes`.
    """
    for job in jobs:
        check_job(job, num_ranks)
    with tempfile.TemporaryDirectory(prefix="parallel-") as name:
        folder = Path(name)
        plan = {
            "jobs": [asdict(job) for job in jobs],
            "num_ranks": num_ranks,
            "collectives": collectives,
            "rendezvous": f"file://{folder / 'rendezvous'}",
            "timeout_s": timeout_s,
        }
        (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
        command = [sys.executable, "-m", "ferrum_ref.parallel_run", str(folder)]
        run_processes([[*command, str(rank)] for rank in range(num_ranks)], timeout_s)
        return [[_load(folder, rank, index) for index in range(len(jobs))] for rank in range(num_ranks)]


def check_job(job: Job, num_ranks: int) -> None:
    """Raises InvalidParameterError, naming both numbers, for a model that cannot lie over that many ranks; errors of
    the checkpoint pass through."""
    num_shards = job.num_shards or num_ranks
    if num_ranks < 1 or num_shards < 1 or num_ranks % num_shards:
        raise InvalidParameterError(
            f"parallel run: num_shards: got {num_shards} for {num_ranks} ranks, expected a divisor"
        )
    with open_checkpoint(job.model) as checkpoint:
        check_ranks(checkpoint.config, num_shards, _experts(job.experts))
        layer_ranges(checkpoint.config.num_layers, num_ranks // num_shards)


def run_job(job: Job, world: Collectives) -> JobResult:
    """This rank's part of a job.  Raises the errors of models, backends and collectives."""
    peers, stages = grid(world, job.num_shards or world.num_ranks)
    backend = load_backend(job.backend, job.device)
    with open_checkpoint(job.model) as checkpoint:
        decoder = read_stage(checkpoint, backend, stages, peers, experts=_experts(job.experts))
    config = decoder.config
    shape = KvShape(decoder.num_layers, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device)
    kind = ContiguousKvFactory if config.latent is None else LatentKvFactory
    logits, tokens = _generate(decoder, kind(backend, shape, decoder.max_tokens), job)
    return JobResult(logits, tokens, decoder.weights.num_bytes())


def _generate(
    decoder: PipelineStage, factory: ContiguousKvFactory, job: Job
) -> tuple[npt.NDArray[np.float32], list[int]]:
    if len(job.token_ids) + job.num_new_tokens > decoder.max_tokens:
        raise ResourceExhaustedError(
            f"parallel run: {len(job.token_ids)} tokens and {job.num_new_tokens} new ones exceed the context of "
            f"{decoder.max_tokens}; shorten the prompt or generate less"
        )
    cache, tokens = factory.new_cache(), list(job.token_ids)
    batch = ForwardBatch.build([tokens], [0]).with_all_logits()
    first: npt.NDArray[np.float32] | None = None
    found: list[int] = []
    while first is None or len(found) < job.num_new_tokens:
        kv = factory.bind([cache], batch.lengths)
        logits = np.array(decoder.forward(batch, kv).to_numpy(), np.float32)
        kv.commit()
        first = logits if first is None else first
        if len(found) < job.num_new_tokens:
            found.append(int(logits[-1].argmax()))
            if found[-1] in job.stop_token_ids:
                break
            batch = ForwardBatch.build([found[-1:]], [cache.num_tokens])
    return first, found


def load_collectives(target: str) -> Callable[..., Collectives]:
    """The factory at "package.module:factory": (rank, num_ranks, rendezvous, timeout_s) -> Collectives.

    Raises InvalidParameterError for another form, NotFoundError if there is no such module or factory.
    """
    module, _, factory = target.partition(":")
    if not module or not factory:
        raise InvalidParameterError(f"collectives: got {target!r}, expected 'package.module:factory'")
    try:
        found: Callable[..., Collectives] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise NotFoundError(f"collectives: {target!r}: {error}") from error
    return found


def rank_main(folder: Path, rank: int) -> None:
    """What the process of one rank does: the plan's jobs, its results beside the plan.

    Raises the errors of `run_job`.
    """
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text("utf-8"))
    make = load_collectives(plan["collectives"])
    with make(rank, plan["num_ranks"], plan["rendezvous"], plan["timeout_s"]) as world:
        for index, job in enumerate(plan["jobs"]):
            result = run_job(Job(**job), world)
            np.savez(
                _file(folder, rank, index),
                logits=result.logits,
                tokens=np.array(result.tokens, np.int64),
                num_weight_bytes=np.int64(result.num_weight_bytes),
            )
        world.barrier()


def _file(folder: Path, rank: int, index: int) -> Path:
    return folder / f"{rank}-{index}.npz"


def _load(folder: Path, rank: int, index: int) -> JobResult:
    with np.load(_file(folder, rank, index)) as found:
        return JobResult(found["logits"], found["tokens"].tolist(), int(found["num_weight_bytes"]))


def _experts(name: str) -> ExpertSharding:
    try:
        return ExpertSharding(name)
    except ValueError:
        expected = ", ".join(each.value for each in ExpertSharding)
        raise InvalidParameterError(f"parallel run: experts: got {name!r}, expected one of {expected}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The process of one rank; its exit code.  [TP-PROC-4]"""
    parser = argparse.ArgumentParser(prog="python -m ferrum_ref.parallel_run")
    parser.add_argument("folder", type=Path, help="where the plan is")
    parser.add_argument("rank", type=int)
    args = parser.parse_args(argv)
    try:
        rank_main(args.folder, args.rank)
    except (NetworkError, FerrumTimeoutError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_LOST
    except FerrumError as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
