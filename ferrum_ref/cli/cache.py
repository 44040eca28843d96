"""--cache-dir, and the environment variables that stand in for it.  The only place that reads them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final

ENVIRONMENT_VARIABLE: Final = "FERRUM_REF_CACHE"


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add --cache-dir to a subcommand."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help=f"where pulled models are kept (default: ${ENVIRONMENT_VARIABLE}, $XDG_CACHE_HOME/ferrum-ref or "
        "~/.cache/ferrum-ref)",
    )


def cache_dir(args: argparse.Namespace) -> Path | None:
    """The chosen directory; None leaves the library's default, ~/.cache/ferrum-ref."""
    if args.cache_dir is not None:
        return Path(args.cache_dir)
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(os.environ[ENVIRONMENT_VARIABLE])
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification: a relative path is to be ignored
        return Path(shared) / "ferrum-ref"
    return None
