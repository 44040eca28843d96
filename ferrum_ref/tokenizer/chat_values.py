"""What a chat template may see: values rebuilt from plain JSON types, messages as transformers hands them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ferrum_ref.errors import TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage

_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")


def template_messages(messages: Sequence[ChatMessage | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as fields: those that are None left out, reasoning under every name templates ask for.  [TK-CHAT-7]

    Pure.  Raises TokenizerError on what is no message and on values that are not JSON.
    """
    return [_with_reasoning(_fields(message)) for message in messages]


def template_value(value: Any, name: str) -> Any:
    """The value rebuilt from exact JSON types, so that a template meets no method it could misuse.  [TK-CHAT-4]

    Tuples stay tuples and keys stay what they are, since a template can print them.
    """
    try:
        return _plain(value, name)
    except RecursionError:
        raise TokenizerError(f"apply chat template: {name}: got a value that holds itself, expected JSON") from None


def _fields(message: ChatMessage | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(message, ChatMessage):
        fields = {**template_value(message.metadata, "metadata"), "role": message.role, "content": message.content}
    elif isinstance(message, Mapping):
        fields = template_value(message, "message")
    else:
        raise TokenizerError(
            f"apply chat template: message: got {type(message).__name__}, expected a ChatMessage or a mapping"
        )
    return {name: value for name, value in fields.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates of different families read one field under different names."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for exact in (str, int, float):  # a subclass may have methods of its own
        if isinstance(value, exact):
            return getattr(exact, f"__{exact.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (_plain(item, name) for item in value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    raise TokenizerError(
        f"apply chat template: {name}: Object of type {type(value).__name__} is no JSON, expected JSON values"
    )
