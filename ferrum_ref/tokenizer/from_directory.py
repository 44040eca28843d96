"""A tokenizer from a Hugging Face directory.

    tokenizer.json            the algorithm, the vocabulary, the added tokens
    tokenizer_config.json     which tokens have roles; the chat template (older spelling)
    special_tokens_map.json   the roles again, in older checkpoints
    chat_template.jinja       the chat template (newer spelling; wins)
    generation_config.json, config.json   ids that end a generation

Clauses: TK-DIR-1..4 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens

_ROLES: Final = tuple(field.name for field in fields(SpecialTokens))


def tokenizer_from_directory(directory: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a model directory.  [TK-DIR-1..4]

    Raises NotFoundError (no tokenizer.json), InvalidFormatError (a broken file, by its name), FerrumIOError.
    """
    backend = _read_backend(directory / "tokenizer.json")
    config = {**_optional(directory / "special_tokens_map.json"), **_optional(directory / "tokenizer_config.json")}
    texts = _role_texts(config, directory)
    ids: dict[str, TokenId] = {}
    for role, text in texts.items():
        token_id = backend.token_to_id(text)
        if token_id is None:
            raise InvalidFormatError(
                f"read {directory / 'tokenizer_config.json'}: {role}: got {text!a:.80}, "
                "expected a token of tokenizer.json's vocabulary"
            )
        ids[role] = TokenId(token_id)
    template = _template_text(config, directory)
    return HuggingFaceTokenizer(
        backend,
        special_tokens=SpecialTokens(**ids),
        stop_token_ids=_stop_token_ids(directory),
        chat_template=None if template is None else ChatTemplate(template, texts),
        model_name=directory.resolve().name,
    )


def _read_backend(path: Path) -> Tokenizer:
    """tokenizer.json through the library, whose complaint becomes one line.  [TK-DIR-1]"""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"open tokenizer {path}: no such file") from None
    except OSError as error:
        raise FerrumIOError(f"open tokenizer {path}: {error.strerror or error}") from error
    try:
        return Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  a panic of the library is no Exception
        reason = " ".join(str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ").split())
        raise InvalidFormatError(f"read {path}: {reason:.200}; expected a Hugging Face tokenizer.json") from None


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _role_texts(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Role -> token text; a token is written as its text or as an object with "content".  [TK-DIR-2]"""
    texts: dict[str, str] = {}
    for role in _ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if text is None:
            continue
        if not isinstance(text, str):
            raise InvalidFormatError(
                f"read {directory / 'tokenizer_config.json'}: {role}: got {value!a:.80}, expected a token's text"
            )
        texts[role] = text
    return texts


def _template_text(config: Mapping[str, Any], directory: Path) -> str | None:
    """chat_template.jinja, else "chat_template": a text, or a list of named texts of which "default" counts."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except OSError as error:
            raise FerrumIOError(f"read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InvalidFormatError(f"read {path}: byte {error.start}: {error.reason}, expected UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise InvalidFormatError(
            f"read {directory / 'tokenizer_config.json'}: chat_template: got {value!a:.80}, expected a text"
        )
    return value or None


def _stop_token_ids(directory: Path) -> frozenset[int]:
    """Union of eos_token_id in generation_config.json and config.json.  [TK-SPECIAL-2; D-28]"""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _optional(directory / name).get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None or token_id == -1:
                continue
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 2**32:
                raise InvalidFormatError(
                    f"read {directory / name}: eos_token_id: got {value!a:.80}, expected a token id or a list of them"
                )
            found.add(token_id)
    return frozenset(found)
