"""Added and special tokens that a Hugging Face directory lists outside tokenizer.json.

    tokenizer_config.json     roles ("eos_token"), further named tokens ("image_token"), extra_special_tokens,
                              added_tokens_decoder: {"<id>": {"content", "lstrip", ...}}
    special_tokens_map.json   roles again; they count where tokenizer_config.json has no added_tokens_decoder
    added_tokens.json         {"<token>": id}, likewise

Source: transformers, `PreTrainedTokenizerBase._from_pretrained`.  Clauses: TK-DIR-2, TK-DIR-5 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.types.sampling import SpecialTokens

ROLES: Final = tuple(field.name for field in fields(SpecialTokens))
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class NamedTokens:
    """What the files call their tokens."""

    roles: Mapping[str, str]  # SpecialTokens' fields
    others: Mapping[str, str]  # a model's own names, which its chat template may use
    listed: Sequence[AddedToken]  # in the order in which they get their ids
    special: Sequence[AddedToken]
    has_list: bool  # tokenizer_config.json has an added_tokens_decoder, whose flags count


def named_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any], source: str
) -> NamedTokens:
    """The tokens of tokenizer_config.json, special_tokens_map.json and added_tokens.json together.  Pure.

    Raises InvalidFormatError on an entry that is no token.
    """
    by_id = config.get("added_tokens_decoder")
    first, second = (config, special_map) if by_id is None else (special_map, config)
    merged = {**first, **{key: value for key, value in second.items() if value is not None}}
    texts: dict[str, str] = {}
    special: list[AddedToken] = []
    for name, value in _named(merged):
        texts[name] = (token := _token(value, name, source)).content
        special.append(token)
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens")
    if isinstance(extra, list):
        special += [_token(value, "extra_special_tokens", source) for value in extra]
    contents = {token.content for token in special}
    return NamedTokens(
        roles={name: text for name, text in texts.items() if name in ROLES},
        others={name: text for name, text in texts.items() if name not in ROLES},
        listed=_by_text(added, contents, source) if by_id is None else _by_id(by_id, source),
        special=special,
        has_list=by_id is not None,
    )


def add_to(backend: Tokenizer, tokens: NamedTokens) -> None:
    """Make the listed tokens added tokens of `backend` and the named ones special.  Mutates `backend`.  [TK-DIR-5]

    A token that tokenizer.json has added already keeps its flags, unless added_tokens_decoder says otherwise; where
    there is no such list, a name makes it special.  A role whose text is not in the vocabulary is left to the caller.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = {*tokens.roles.values(), *tokens.others.values()}
    if tokens.has_list:
        wanted = list(tokens.listed)
    else:
        wanted = [token for token in tokens.listed if token.content not in known]
        wanted += [token for token in known.values() if token.content in named]
    contents = known.keys() | {token.content for token in wanted}
    for token in tokens.special:
        absent_role = token.content in tokens.roles.values() and backend.token_to_id(token.content) is None
        if token.content not in contents and not absent_role:
            wanted.append(token)
    for token in wanted:
        token.special = token.special or token.content in named
    backend.add_tokens(wanted)


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Roles; then "<anything>_token", and the entries of an extra_special_tokens that is an object."""
    for role in ROLES:
        if config.get(role) not in (None, ""):
            yield role, config[role]
    for name, value in config.items():
        if name.endswith("_token") and name not in ROLES and isinstance(value, str | dict):
            yield name, value
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        yield from extra.items()


def _token(value: Any, name: str, source: str) -> AddedToken:
    """A token as its text, which makes it special, or as an object with "content" and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise InvalidFormatError(f"read {source}: {name}: got {value!a:.80}, expected a token's text")
    flags = {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
    return AddedToken(content, **{"special": True, **flags})


def _by_id(value: Any, source: str) -> list[AddedToken]:
    """added_tokens_decoder, in the order of the ids."""
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise InvalidFormatError(
            f"read {source}: added_tokens_decoder: got {value!a:.80}, expected tokens by their ids"
        )
    return [
        _token({"special": False, **entry} if isinstance(entry, dict) else entry, "added_tokens_decoder", source)
        for _, entry in sorted(value.items(), key=lambda item: int(item[0]))
    ]


def _by_text(added: Mapping[str, Any], special: set[str], source: str) -> list[AddedToken]:
    """added_tokens.json: no flags but whether a token is special, which the roles tell."""
    wrong = next((text for text, place in added.items() if not isinstance(place, int)), None)
    if wrong is not None:
        raise InvalidFormatError(
            f"read {source}: added_tokens.json: {wrong!a:.60}: got {added[wrong]!a:.40}, expected an id"
        )
    texts = sorted(added, key=lambda text: int(added[text]))
    return [AddedToken(text, special=text in special, normalized=text not in special) for text in texts]
