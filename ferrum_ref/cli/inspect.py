"""`ferrum-ref inspect MODEL`: what a model consists of, without running it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.program import table_console

_FILE_WIDTH: Final = 120


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a model's architecture, tensors, memory and tokenizer",
        description="Show what a model's files say: architecture, tensors by element format, memory, tokenizer. "
        "Every check that loading makes is made here too.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a GGUF file, a Hugging Face directory, or a pulled model's name"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Open, check, print."""
    from ferrum_ref.models.checkpoint import open_checkpoint
    from ferrum_ref.models.inspection import describe
    from ferrum_ref.models.source import resolve_model

    path = resolve_model(args.model, cache_dir(args))
    with open_checkpoint(path) as checkpoint:
        facts = describe(checkpoint)
        if args.tensors:
            facts["tensors"] = [
                {"name": entry.name, "shape": list(entry.shape), "dtype": entry.dtype, "num_bytes": entry.num_bytes}
                for entry in checkpoint.tensors.values()
            ]
    facts["tokenizer"] = _tokenizer_facts(path)
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts)
    return 0


def _tokenizer_facts(path: Path) -> dict[str, Any]:
    """The tokenizer's metadata, or why there is none; a broken file is an error."""
    from dataclasses import asdict

    from ferrum_ref.errors import NotFoundError, UnsupportedError
    from ferrum_ref.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except (NotFoundError, UnsupportedError) as error:
        return {"available": False, "reason": error.message}
    info = tokenizer.info()
    return {
        "available": True,
        "type": info.tokenizer_type.value,
        "vocab_size": info.vocab_size,
        "max_token_length_characters": info.max_token_length,
        "special_tokens": {
            role: {"id": int(token_id), "text": tokenizer.token_text(token_id)}
            for role, token_id in asdict(info.special_tokens).items()
            if token_id is not None
        },
        "stop_token_ids": sorted(tokenizer.stop_token_ids),
        "chat_template": info.supports_chat_template,
        "model_name": info.model_name,
    }


def _print_tables(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text  # names come from files: never markup

    console = table_console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(Text(facts["path"]), soft_wrap=True)
    summary = Table(show_header=False)
    for name, value in _summary_rows(facts):
        summary.add_row(name, Text(value))
    console.print(summary)
    formats = Table("element format", title="Tensors", title_justify="left")
    for heading in ("tensors", "parameters", "bytes"):
        formats.add_column(heading, justify="right")
    for share in facts["formats"]:
        counts = (share["num_tensors"], share["num_parameters"], share["num_bytes"])
        formats.add_row(share["dtype"], *(f"{count:,}" for count in counts))
    console.print(formats)
    if "tensors" in facts:
        tensors = Table("tensor", "shape", "format", title="Every tensor", title_justify="left")
        tensors.add_column("bytes", justify="right")
        for entry in facts["tensors"]:
            shape = " x ".join(map(str, entry["shape"]))
            tensors.add_row(Text(entry["name"]), shape, entry["dtype"], f"{entry['num_bytes']:,}")
        console.print(tensors)


def _summary_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config, memory, tokenizer = facts["config"], facts["memory"], facts["tokenizer"]
    rows = [
        ("architecture", f"{config['architecture']}, from {facts['format']}"),
        ("parameters", f"{facts['num_parameters']:,} in {facts['num_tensors']} tensors"),
        ("layers", f"{config['num_layers']} of hidden size {config['hidden_size']}"),
        ("feed-forward", f"{config['intermediate_size']}, {config['hidden_act']}"),
        (
            "attention",
            f"{config['num_heads']} query heads, {config['num_kv_heads']} key/value heads of {config['head_dim']}",
        ),
        ("positions", f"rotary, theta {config['rope_theta']:g}; context {config['max_position_embeddings']:,} tokens"),
        ("embeddings", f"{config['vocab_size']:,} rows, {'tied' if config['tie_word_embeddings'] else 'not tied'}"),
        ("files", _size(memory["file_bytes"])),
        ("weights as float32", _size(memory["float32_weight_bytes"])),
        ("KV cache, float32", f"{_size(memory['float32_kv_bytes_per_token'])} a token"),
        ("", f"{_size(memory['float32_kv_bytes_full_context'])} for the whole context"),
    ]
    if (asked := facts["quantization"]) is not None:
        text = f"{asked['method']} {asked['format']}".rstrip() + f", {asked['bits']} bits"
        if asked["activations"] != "float":
            text += f"; activations stay floats (the file asks for {asked['activations']})"
        rows.append(("quantisation", text))
    if not tokenizer["available"]:
        return [*rows, ("tokenizer", f"none: {tokenizer['reason']}")]
    stops = ", ".join(map(str, tokenizer["stop_token_ids"])) or "none"
    special = ", ".join(
        f"{role.removesuffix('_token')} {each['id']}" for role, each in tokenizer["special_tokens"].items()
    )
    return [
        *rows,
        ("tokenizer", f"{tokenizer['type']}, {tokenizer['vocab_size']:,} tokens; stops at {stops}"),
        ("special tokens", special or "none"),
        ("chat template", "yes" if tokenizer["chat_template"] else "no"),
    ]


def _size(num_bytes: int) -> str:
    """Bytes in the unit that keeps the number readable: 1 KiB = 1024 B."""
    amount, units = float(num_bytes), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{num_bytes} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"
