"""The chat templates of a Hugging Face directory.  [TK-DIR-3, TK-DIR-6]

chat_template.jinja                     the default
additional_chat_templates/<name>.jinja  others, by their names
tokenizer_config.json, chat_template    older: a text, or [{"name", "template"}, ...]; only where there is no file
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferrum_ref.errors import FerrumIOError, InvalidFormatError


def template_texts(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Templates by name; that of the model's ordinary chats is "default".

    Raises InvalidFormatError (no text, not UTF-8), FerrumIOError; each names the file.
    """
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    texts = {path.stem: _read(path) for path in files}
    if (directory / "chat_template.jinja").exists():
        texts["default"] = _read(directory / "chat_template.jinja")
    return texts or _in_config(config.get("chat_template"), f"read {directory / 'tokenizer_config.json'}")


def _in_config(value: Any, reading: str) -> dict[str, str]:
    named: dict[str, Any] = {} if value is None else {"default": value}
    if isinstance(value, list):
        wrong = next((e for e in value if not isinstance(e, dict) or not isinstance(e.get("name"), str)), None)
        if wrong is not None:
            raise InvalidFormatError(f"{reading}: chat_template: got {wrong!a:.80}, expected a name and a template")
        named = {entry["name"]: entry.get("template") for entry in value}
    for text in named.values():
        if not isinstance(text, str):
            raise InvalidFormatError(f"{reading}: chat_template: got {text!a:.80}, expected a text")
    return {name: text for name, text in named.items() if text}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise FerrumIOError(f"read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidFormatError(f"read {path}: byte {error.start}: {error.reason}, expected UTF-8") from None
