"""`ferrum-ref pull`: the path on stdout, the rest on stderr, and where the cache lies."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from ferrum_ref.cli import cache, pull
from ferrum_ref.errors import NotFoundError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pull.add_parser(parser.add_subparsers())
    return parser.parse_args(["pull", *arguments])


@pytest.mark.clause("MD-PULL-1", "MD-PULL-3")
@pytest.mark.model
def test_a_pulled_model_is_only_named(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("smollm2-135m", "--cache-dir", str(smollm2_path.parent.parent.parent))
    assert args.func(args) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{smollm2_path}\n"
    assert captured.err == ""


@pytest.mark.clause("MD-PULL-1")
def test_unknown_names_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("llama-9", "--cache-dir", str(tmp_path))
    with pytest.raises(NotFoundError, match="'llama-9': got an unknown name"):
        args.func(args)
    assert capsys.readouterr().out == ""


@pytest.mark.clause("MD-PULL-5")
def test_sources_are_checked_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("smollm2-135m", "--source", "ftp")
    assert "invalid choice: 'ftp'" in capsys.readouterr().err


@pytest.mark.clause("MD-PULL-1")
def test_cache_directory_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir(parse("m", "--cache-dir", "here")) == Path("here")
    assert cache.cache_dir(parse("m")) == tmp_path / "variable"
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    assert cache.cache_dir(parse("m")) == tmp_path / "xdg" / "ferrum-ref"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_dir(parse("m")) is None


@pytest.mark.clause("MD-PULL-5")
def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    with pull.RichProgress(Console(stderr=True)) as progress:
        progress.note("a [bold]note[/bold]")
        progress.start("step [one]", 10)
        progress.advance(5)
        progress.start("step two", None)
        progress.finish()
    assert capsys.readouterr().err == "note: a [bold]note[/bold]\nstep [one]\nstep two\n"


def test_the_parser_needs_no_heavy_import() -> None:
    code = (
        "import sys; import ferrum_ref.cli.pull, ferrum_ref.cli.inspect; "
        "print([m for m in ('rich', 'tokenizers', 'jinja2', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
