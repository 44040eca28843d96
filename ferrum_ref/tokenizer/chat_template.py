"""Chats to prompts by the model's own Jinja template, in a sandbox, rendered as transformers renders it.

Templates come with model files and are not trusted: the sandbox forbids attribute access to Python's internals and
changes to its arguments, and messages are rebuilt from plain JSON values.  Clauses: TK-CHAT-1..5 (specs/tokenizer.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ferrum_ref.errors import TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage

if TYPE_CHECKING:
    from jinja2 import Template


class ChatTemplate:
    """A template's text with the special tokens it may name.  Immutable; compiled on first use."""

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` as the template names them: "bos_token" -> text, ...; `now` is strftime_now's clock."""
        self.text = text
        self._special_tokens = dict(special_tokens or {})
        self._now = now

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for a chat; equal to transformers' `apply_chat_template(tokenize=False)`.  Pure.  [TK-CHAT-2..4]

        A message's metadata are further fields of it.
        Raises TokenizerError on a template that does not compile or fails, with its own words where it raises.
        """
        template = self._compiled
        chat = [{**_plain(message.metadata), "role": message.role, "content": message.content} for message in messages]
        try:
            return template.render(
                messages=chat,
                tools=_plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:
            raise TokenizerError(f"apply chat template: {_one_line(error)}") from error

    @cached_property
    def _compiled(self) -> Template:
        from jinja2 import TemplateError, TemplateSyntaxError

        from ferrum_ref.tokenizer.jinja_sandbox import make_environment

        try:
            return make_environment(self._now).from_string(self.text)
        except TemplateSyntaxError as error:
            raise TokenizerError(f"compile chat template: line {error.lineno}: {_one_line(error)}") from error
        except (TemplateError, RecursionError, MemoryError, SyntaxError) as error:
            raise TokenizerError(f"compile chat template: {_one_line(error)}") from error


def _plain(value: Any) -> Any:
    """The value rebuilt from exact JSON types, so that a template meets no method it could misuse."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"apply chat template: metadata: {error}, expected JSON values") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__
