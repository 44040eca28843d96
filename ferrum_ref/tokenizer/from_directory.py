"""A tokenizer from a Hugging Face directory.

    tokenizer.json            the algorithm, the vocabulary, the added tokens
    tokenizer.model           SentencePiece's own file, where there is no tokenizer.json
    tokenizer_config.json     which tokens have roles, and settings
    special_tokens_map.json, added_tokens.json   the same in older checkpoints (added_tokens.py)
    chat_template.jinja       the chat template (template_files.py)
    generation_config.json, config.json   ids that end a generation

Clauses: TK-DIR-1..7 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from ferrum_ref.errors import FerrumIOError, InvalidFormatError, NotFoundError, UnsupportedError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.tokenizer.added_tokens import add_to, named_tokens
from ferrum_ref.tokenizer.around_text import put_around
from ferrum_ref.tokenizer.chat_template import ChatTemplate
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.tokenizer.sentencepiece_model import SentencePieceModel, read_sentencepiece_model
from ferrum_ref.tokenizer.template_files import template_texts
from ferrum_ref.types.ids import TokenId
from ferrum_ref.types.sampling import SpecialTokens

_INSISTS: Final = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def tokenizer_from_directory(directory: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a model directory.  [TK-DIR-1..7]

    Raises NotFoundError (no tokenizer.json), InvalidFormatError (a broken file, by its name), FerrumIOError.
    """
    config = _optional(directory / "tokenizer_config.json")
    model = _sentencepiece(directory)
    backend = model.backend if model else _read_json(directory / "tokenizer.json")
    tokens = named_tokens(
        config,
        _optional(directory / "special_tokens_map.json"),
        _optional(directory / "added_tokens.json"),
        f"{directory / 'tokenizer_config.json'}",
    )
    if model:
        tokens = replace(tokens, roles={**model.roles, **tokens.roles})
    add_to(backend, tokens)
    special = _special_tokens(backend, tokens.roles, directory)
    if model:
        begin = tokens.roles.get("bos_token") if config.get("add_bos_token", True) else None
        put_around(backend, begin, tokens.roles.get("eos_token") if config.get("add_eos_token") else None)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    templates = {
        name: ChatTemplate(text, {**tokens.roles, **tokens.others})
        for name, text in template_texts(config, directory).items()
    }
    return HuggingFaceTokenizer(
        backend,
        special_tokens=special,
        stop_token_ids=_stop_token_ids(directory),
        chat_template=templates.pop("default", None),
        named_chat_templates=templates,
        model_name=directory.resolve().name,
        clean_up_spaces=_cleans_up(config, backend),
    )


def _special_tokens(backend: Tokenizer, roles: Mapping[str, str], directory: Path) -> SpecialTokens:
    ids: dict[str, TokenId] = {}
    for role, text in roles.items():
        token_id = backend.token_to_id(text)
        if token_id is None:
            raise InvalidFormatError(
                f"read {directory / 'tokenizer_config.json'}: {role}: got {text!a:.80}, "
                "expected a token of tokenizer.json's vocabulary"
            )
        ids[role] = TokenId(token_id)
    return SpecialTokens(**ids)


def _cleans_up(config: Mapping[str, Any], backend: Tokenizer) -> bool:
    """Byte-pair encodings mark their spaces, so for them the setting counts only if it insists.  [TK-DECODE-3]"""
    if type(backend.model).__name__ == "BPE":
        return config.get(_INSISTS) is True and config.get("clean_up_tokenization_spaces") is True
    return config.get("clean_up_tokenization_spaces") is True


def _sentencepiece(directory: Path) -> SentencePieceModel | None:
    """tokenizer.model, where there is no tokenizer.json.  [TK-SPM-7]"""
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").exists() or not path.exists():
        return None
    model = read_sentencepiece_model(path)
    if model.is_unigram:  # its users shift ids and add tokens, each family in its own way
        raise UnsupportedError(
            f"read {path}: got a Unigram model without tokenizer.json, expected BPE or tokenizer.json"
        )
    return model


def _read_json(path: Path) -> Tokenizer:
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
