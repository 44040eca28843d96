"""Chats to prompts by the model's own Jinja template, in a sandbox, rendered as transformers renders it.

Templates come with model files and are not trusted: the sandbox forbids attribute access to Python's internals and
changes to its arguments, and messages are rebuilt from plain JSON values.  Clauses: TK-CHAT-1..9 (specs/tokenizer.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ferrum_ref.errors import InvalidParameterError, TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.tokenizer import continuation
from ferrum_ref.tokenizer.chat_values import template_messages, template_value

if TYPE_CHECKING:
    from jinja2 import Template

_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


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
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat; equal to transformers' `apply_chat_template(tokenize=False)`.  Pure.  [TK-CHAT-2..8]

        A message is a ChatMessage, whose metadata are further fields of it, or a mapping of the fields themselves,
        whose "content" may then be a list of parts or absent.  `continue_final_message` (True, or the field's name)
        ends the prompt inside the last message.  `variables` are the template's own ("enable_thinking") and go before
        the special tokens' names.
        Raises TokenizerError on a template that does not compile or fails, with its own words where it raises;
        InvalidParameterError on arguments that contradict each other.
        """
        variables = dict(variables or {})
        _check(add_generation_prompt, continue_final_message, variables)
        template = self._compiled
        chat = template_messages(messages)
        tag = continuation.mark(chat, continue_final_message, self.text) if continue_final_message else None
        try:
            prompt = template.render(
                **{**self._special_tokens, **template_value(variables, "variables")},
                messages=chat,
                tools=template_value(tools, "tools"),
                documents=template_value(documents, "documents"),
                add_generation_prompt=add_generation_prompt,
            )
        except TokenizerError:
            raise
        except Exception as error:
            raise TokenizerError(f"apply chat template: {_one_line(error)}") from error
        return prompt if tag is None else continuation.cut(prompt, tag)

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


def _check(add_generation_prompt: bool, continue_final_message: bool | str, variables: Mapping[str, Any]) -> None:
    if add_generation_prompt and continue_final_message:
        raise InvalidParameterError(
            "apply chat template: continue_final_message: got it with add_generation_prompt, expected one of the two"
        )
    taken = next((name for name in _OWN_VARIABLES if name in variables), None)
    if taken is not None:
        raise InvalidParameterError(
            f"apply chat template: variables: got {taken!r}, expected other names; it is an argument of its own"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__
