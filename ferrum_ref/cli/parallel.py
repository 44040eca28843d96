"""`ferrum-ref parallel MODEL "prompt"`: a model over several processes.  Clauses: TP-CLI-1..2 (specs/parallel.md)."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.errors import RequestValidationError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "parallel",
        help="run a model over several processes",
        description="Continue a text greedily with a model that lies over several processes of this machine: T "
        "tensor-parallel shards in each of P pipeline stages. With --check the logits of the prompt are compared with "
        "those of one process. Exit code 1 if the ranks disagree with each other.",
    )
    parser.add_argument("model", metavar="MODEL", help="a pulled model's name, a GGUF file or a Hugging Face directory")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue")
    given.add_argument("--token-ids", metavar="IDS", help="the tokens to continue, as 1,2,3")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T", help="shards of each layer (default 1)")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="P", help="runs of layers (default 1)")
    parser.add_argument(
        "--experts", choices=["split", "whole"], default="split", help="every expert on all ranks, or each on one"
    )
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="longest answer (default 32)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for all of it (default 600)")
    parser.add_argument("--check", action="store_true", help="compare the prompt's logits with those of one process")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Start the ranks, collect, print.  [TP-CLI-1..2]"""
    import numpy as np

    from ferrum_ref.errors import InternalError, InvalidParameterError
    from ferrum_ref.models.checkpoint import open_checkpoint
    from ferrum_ref.models.source import resolve_model
    from ferrum_ref.parallel.subgroup import ALONE
    from ferrum_ref.parallel_run import Job, check_job, run_job, run_jobs
    from ferrum_ref.tokenizer import load_tokenizer

    for name in ("tensor_parallel", "pipeline_parallel"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise InvalidParameterError(f"parallel: --{option}: got {getattr(args, name)}, expected at least 1")
    path = resolve_model(args.model, cache_dir(args))
    with open_checkpoint(path) as checkpoint:
        vocab_size, stops = checkpoint.config.vocab_size, checkpoint.generation.eos_token_ids
    tokenizer = None if args.token_ids is not None else load_tokenizer(path)
    ids = _given_ids(args.token_ids, vocab_size) if tokenizer is None else tokenizer.encode(args.prompt, True)
    job = Job(
        str(path),
        [int(token) for token in ids],
        args.max_tokens,
        args.tensor_parallel,
        tuple(stops),
        args.experts,
        args.backend,
        args.device,
    )
    num_ranks = args.tensor_parallel * args.pipeline_parallel
    check_job(job, num_ranks)
    ranks = [results[0] for results in run_jobs([job], num_ranks, timeout_s=args.timeout)]
    for rank, each in enumerate(ranks):
        print(f"rank {rank}: {each.num_weight_bytes / 1e6:.1f} MB of weights", file=sys.stderr)
        if each.tokens != ranks[0].tokens or not np.array_equal(each.logits, ranks[0].logits, equal_nan=True):
            raise InternalError(f"parallel: rank {rank} has other logits than rank 0")
    tokens = [token for token in ranks[0].tokens if token not in stops]
    text = None if tokenizer is None else tokenizer.decode(tokens, True)
    answer: dict[str, Any] = {
        "model": args.model,
        "num_ranks": num_ranks,
        "token_ids": ranks[0].tokens,
        "text": text,
        "weight_bytes": [each.num_weight_bytes for each in ranks],
    }
    if args.check:
        alone = run_job(Job(job.model, job.token_ids, job.num_new_tokens, 1, job.stop_token_ids), ALONE)
        difference = float(np.abs(ranks[0].logits - alone.logits).max())
        answer |= {"largest_difference": difference, "largest_logit": float(np.abs(alone.logits).max())}
        answer["same_tokens"] = alone.tokens == ranks[0].tokens
        print(
            f"logits differ from one process's by {difference:.3g} at most, of {answer['largest_logit']:.3g}; "
            f"the tokens are {'the same' if answer['same_tokens'] else 'others'}",
            file=sys.stderr,
        )
    print(json.dumps(answer, ensure_ascii=False) if args.json else _shown(text, tokens))
    return 0


def _shown(text: str | None, tokens: list[int]) -> str:
    return ",".join(map(str, tokens)) if text is None else text


def _given_ids(text: str, vocab_size: int) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestValidationError(
            f"parallel: --token-ids {text!r}: expected numbers with commas, as 1,2,3"
        ) from None
    if not all(0 <= token < vocab_size for token in ids):
        raise RequestValidationError(f"parallel: --token-ids must be in [0, {vocab_size}), got {text}")
    return ids
