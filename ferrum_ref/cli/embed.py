"""`ferrum-ref embed MODEL TEXT...`: texts to vectors.  Clauses: FM-CLI-1..3 (specs/families.md)."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, Final

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.errors import RequestValidationError
from ferrum_ref.program import table_console

if TYPE_CHECKING:
    from ferrum_ref.models.bert_embedding import SentenceEmbedder

_SHOWN_NUMBERS: Final = 4
_SHOWN_CHARACTERS: Final = 40
_FILE_WIDTH: Final = 120


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "embed",
        help="turn texts into vectors and compare them",
        description="Turn texts into vectors with a BERT-style embedding model and show how alike they are (cosine)."
        " --json gives the vectors.",
    )
    parser.add_argument("model", metavar="MODEL", help="a pulled model's name (all-minilm-l6-v2) or a directory")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="a text; quote it")
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="vectors of length 1 (default: as the model's files say)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every number")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Load, embed, print.  [FM-CLI-1..3]  Raises RequestValidationError for an empty text."""
    from ferrum_ref.families import load_embedder

    if not all(args.texts):
        raise RequestValidationError(f"embed: text {args.texts.index('') + 1} is empty; give at least one character")
    embedder = load_embedder(args.model, args.backend, args.device, cache_dir=cache_dir(args))
    facts = describe(embedder, args.texts, args.normalize)
    if args.json:
        print(json.dumps({"model": args.model, **facts}, ensure_ascii=False))
    else:
        _print_tables(facts)
    return 0


def describe(embedder: SentenceEmbedder, texts: list[str], normalize: bool | None) -> dict[str, Any]:
    """Vectors, their lengths and the cosines of all pairs, JSON-ready.  [FM-CLI-1]"""
    import numpy as np

    settings = embedder.model.settings
    vectors = embedder.embed_texts(texts, normalize=normalize)
    shortest = [[float(str(number)) for number in vector] for vector in vectors]  # float32's own shortest text
    exact = vectors.astype(np.float64)
    lengths = np.sqrt((exact**2).sum(-1))
    unit = exact / np.where(lengths > 0, lengths, 1)[:, None]
    return {
        "dim": vectors.shape[1],
        "pooling": settings.pooling.value,
        "normalized": settings.normalize if normalize is None else normalize,
        "max_tokens": settings.max_tokens,
        "embeddings": [
            {"text": text, "num_tokens": len(embedder.token_ids(text)), "norm": norm, "embedding": vector}
            for text, norm, vector in zip(texts, lengths.tolist(), shortest, strict=True)
        ],
        "cosine": (unit @ unit.T).tolist(),
    }


def _print_tables(facts: dict[str, Any]) -> None:
    import sys

    from rich.table import Table
    from rich.text import Text  # texts come from the user: never markup

    console = table_console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    table = Table("", "text", title=f"Vectors of {facts['dim']} numbers", title_justify="left")
    for heading in ("tokens", "length", "begins with"):
        table.add_column(heading, justify="right")
    for index, each in enumerate(facts["embeddings"], 1):
        begin = " ".join(f"{value:+.4f}" for value in each["embedding"][:_SHOWN_NUMBERS])
        text = " ".join(each["text"].split())
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
        table.add_row(str(index), Text(shown), str(each["num_tokens"]), f"{each['norm']:.4f}", begin)
    console.print(table)
    if len(facts["embeddings"]) > 1:
        numbers = [str(number) for number in range(1, len(facts["cosine"]) + 1)]
        cosines = Table("", *numbers, title="Cosine", title_justify="left")
        for number, row in zip(numbers, facts["cosine"], strict=True):
            cosines.add_row(number, *(f"{value:.3f}" for value in row))
        console.print(cosines)
