"""`ferrum-ref verify MODEL`: a checkpoint against another program, layer by layer.  Clauses: VE-CLI-1..3."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.errors import NotFoundError, RequestValidationError, UnsupportedError
from ferrum_ref.program import EXIT_FOUND_FAILURE, table_console

DEFAULT_TEXT: Final = (
    "A reference says exactly what an implementation must compute. In 1969 three people flew to the Moon and back; "
    "their computer held 4,096 words of memory, and every one of them had been checked by hand."
)
_FILE_WIDTH: Final = 120


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a checkpoint with transformers, layer by layer",
        description="Run a local checkpoint here and in Hugging Face transformers (float64, and float32 as the noise "
        "floor), compare the hidden state after every layer, the logits and the greedy text, and name the first layer "
        "that leaves the noise floor. Exit code 1 if one does.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face directory, a GGUF file, or a pulled model's name"
    )
    parser.add_argument("--against", choices=["transformers"], default="transformers", help="the other program")
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", default=None, help="the text to run (default: two sentences)")
    given.add_argument("--token-ids", default=None, metavar="IDS", help="the tokens to run, as 1,2,3")
    parser.add_argument("--generate", type=int, default=16, metavar="N", help="greedy tokens to compare (default 16)")
    parser.add_argument("--all-layers", action="store_true", help="show every layer in the table")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run both, compare, print.  [VE-CLI-1..3]"""
    from rich.console import Console

    from ferrum_ref.models.source import resolve_model
    from ferrum_ref.plugins import load_backend
    from ferrum_ref.verification.comparison import compare
    from ferrum_ref.verification.own_run import OwnModel
    from ferrum_ref.verification.report import as_json, as_lines, as_table
    from ferrum_ref.verification.transformers_run import run_transformers

    if args.generate < 0:
        raise RequestValidationError(f"verify: --generate is {args.generate}, expected 0 or more tokens")
    path = resolve_model(args.model, cache_dir(args))
    notes = Console(stderr=True)
    with notes.status("opening") if notes.is_terminal else _Silent() as status:
        model = OwnModel(path, load_backend(args.backend, args.device))
        tokens = _tokens(args, path, model.config.vocab_size, model.config.max_position_embeddings - args.generate)
        wide, narrow, margins = run_transformers(path, tokens, args.generate, status.update)
        status.update(f"{args.backend} on {args.device}")
        verification = compare(model.run(tokens, wide.greedy), wide, narrow, margins)
    if args.json:
        facts = {"model": args.model, "against": args.against, "backend": args.backend, "num_tokens": len(tokens)}
        print(json.dumps({**facts, **as_json(verification)}))
    else:
        console = table_console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
        title = f"{args.model} on {args.backend}, against transformers in float64, {len(tokens)} tokens"
        console.print(as_table(verification, title, args.all_layers))
        for line in as_lines(verification):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if verification.passed else EXIT_FOUND_FAILURE


class _Silent:
    """In place of a spinner where standard error is no terminal."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, message: str) -> None:
        """Nobody is watching."""


def _tokens(args: argparse.Namespace, path: Path, vocab_size: int, room: int) -> Sequence[int]:
    """The given ids, or the text's; made up where the model has no tokenizer.  [VE-CLI-2]"""
    if room < 1:
        raise RequestValidationError(f"verify: --generate {args.generate} leaves no room for a prompt in the context")
    if args.token_ids is not None:
        return _given_ids(args.token_ids, vocab_size, room)
    from ferrum_ref.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except (NotFoundError, UnsupportedError):
        if args.prompt is not None:
            raise
        return [(7 + 13 * number * number) % vocab_size for number in range(min(48, room))]
    found = [int(token) for token in tokenizer.encode(args.prompt or DEFAULT_TEXT, True)]
    if not found:
        raise RequestValidationError("verify: the prompt is empty; give at least one character")
    if len(found) > room and args.prompt is not None:
        raise RequestValidationError(f"verify: the prompt has {len(found)} tokens, there is room for {room}")
    return found[:room]


def _given_ids(text: str, vocab_size: int, room: int) -> Sequence[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestValidationError(f"verify: --token-ids {text!r}: expected numbers with commas, as 1,2,3") from None
    if not all(0 <= token < vocab_size for token in ids):
        raise RequestValidationError(f"verify: --token-ids must be in [0, {vocab_size}), got {text}")
    if len(ids) > room:
        raise RequestValidationError(f"verify: {len(ids)} tokens are given, there is room for {room}")
    return ids
