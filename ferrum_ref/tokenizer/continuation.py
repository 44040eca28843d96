"""Prompts that end inside the last message, so that the model goes on with it.  [TK-CHAT-8]

The message is rendered with a tag behind it and the prompt is cut at the tag.
Source: transformers, `continue_final_message` of apply_chat_template.
"""

from __future__ import annotations

from typing import Any, Final

from ferrum_ref.errors import InvalidParameterError

_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")


def mark(chat: list[dict[str, Any]], field: bool | str, template: str) -> str:
    """Put the tag behind the last message's `field` ("content" for True); the text to go on with.  Mutates `chat`.

    Raises InvalidParameterError where there is nothing to go on with or the template never reads the field.
    """
    name = field if isinstance(field, str) else "content"
    if not chat or chat[-1].get(name) is None:
        raise _refusal(f"a last message without {name!r}" if chat else "no messages", "a message to go on with")
    last = chat[-1]
    text = last[name]
    same = [other for other in _REASONING_FIELDS if last.get(other) == text] if name in _REASONING_FIELDS else [name]
    if not any(other in template for other in same):
        raise _refusal(f"{name!r}", "a field that the template reads")
    if isinstance(text, list | tuple):
        part = next((each for each in reversed(text) if "text" in each), None)
        if part is None:
            raise _refusal("a last message without text", "a text to go on with")
        text = part["text"]
        part["text"] = text + _TAG
    else:
        for other in same:
            last[other] = text + _TAG
    return str(text)


def cut(prompt: str, text: str) -> str:
    """The prompt up to the tag; where the template trimmed the message, without the space before it either."""
    if text.strip() not in prompt or _TAG.strip() not in prompt:
        raise _refusal("a template that drops the last message", "one that shows it whole")
    place = prompt.rindex(_TAG.strip())
    head = prompt[:place]
    return head if prompt.startswith(_TAG, place) else head.rstrip()


def _refusal(got: str, expected: str) -> InvalidParameterError:
    return InvalidParameterError(f"apply chat template: continue_final_message: got {got}, expected {expected}")
