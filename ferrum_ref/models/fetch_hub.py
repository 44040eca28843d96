"""A model file from the Hugging Face hub, through huggingface_hub.  Clause: MD-PULL-5 (specs/model_files.md)."""

from __future__ import annotations

import inspect
import queue
import threading
from pathlib import Path
from typing import Any, Final

from ferrum_ref.errors import FerrumError, InvalidFormatError, NetworkError, UnsupportedError
from ferrum_ref.models.known import KnownModel
from ferrum_ref.models.progress import PullProgress

_CONNECT_S: Final = 4.0
_ANSWER_S: Final = 8.0  # name resolution has no time-out of its own


def fetch_from_hub(model: KnownModel, staging: Path, progress: PullProgress, endpoint: str | None = None) -> Path:
    """Download the file below `staging`, resuming an earlier attempt, and return its path.  [MD-PULL-5]

    Raises UnsupportedError (huggingface_hub absent), NetworkError (no answer within seconds, or a failed transfer),
    InvalidFormatError (the hub announces another file than the pinned one).
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UnsupportedError(
            "Hugging Face hub: huggingface_hub is not installed; pip install 'ferrum-ref[hub]'"
        ) from None
    _require_answer(model, huggingface_hub, endpoint)
    options: dict[str, Any] = {"etag_timeout": _CONNECT_S, "local_dir": staging, "endpoint": endpoint}
    if "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        options["tqdm_class"] = _bar_class(progress)
    progress.start(f"{model.hub.file_name} from the Hugging Face hub", model.num_bytes)
    try:
        found = huggingface_hub.hf_hub_download(
            model.hub.repo_id, model.hub.file_name, revision=model.hub.revision, **options
        )
    except Exception as error:  # the library raises its own errors, httpx's and the system's
        raise _network_error(model, error) from error
    finally:
        progress.finish()
    return Path(found)


def _require_answer(model: KnownModel, hub: Any, endpoint: str | None) -> None:
    """Ask the hub for the file's size and checksum; give up after seconds, whatever the network does meanwhile."""
    answers: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        try:
            url = hub.hf_hub_url(model.hub.repo_id, model.hub.file_name, revision=model.hub.revision, endpoint=endpoint)
            answers.put(hub.get_hf_file_metadata(url, timeout=_CONNECT_S, endpoint=endpoint))
        except Exception as error:  # noqa: BLE001  handed to the asking thread
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="hub-question").start()
    try:
        answer = answers.get(timeout=_ANSWER_S)
    except queue.Empty:
        raise NetworkError(f"Hugging Face hub: no answer within {_ANSWER_S:g} s") from None
    if isinstance(answer, Exception):
        raise _network_error(model, answer)
    if answer.size != model.num_bytes:
        raise InvalidFormatError(
            f"Hugging Face hub: {model.hub.repo_id}/{model.hub.file_name}: got {answer.size} bytes, "
            f"expected {model.num_bytes}"
        )


def _network_error(model: KnownModel, error: Exception) -> FerrumError:
    lines = str(error).strip().splitlines() or [""]
    return NetworkError(f"Hugging Face hub: {model.hub.repo_id}: {type(error).__name__}: {lines[0]:.160}")


def _bar_class(progress: PullProgress) -> type:
    """A tqdm that draws nothing and reports to `progress`."""
    from tqdm.std import tqdm  # type: ignore[import-untyped, unused-ignore]

    class ReportingBar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            progress.advance(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            progress.advance(int(n or 0))
            return None

    return ReportingBar
