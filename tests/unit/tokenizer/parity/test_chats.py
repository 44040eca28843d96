"""Chats rendered here and by transformers' apply_chat_template, with templates in the public models' formats."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ferrum_ref.errors import TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer

TEMPLATES = ("chatml", "llama3", "qwen25", "qwen3", "mistral", "gemma3", "phi3", "deepseek_v3", "rag")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_weather",
            "description": "Weather at a place, “now” <or> later & é",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "number"}}},
        },
    },
    {"type": "function", "function": {"name": "f", "description": "", "parameters": {}, "return": {"type": "null"}}},
]
DOCUMENTS = [{"title": 'A "title" & more', "text": "line\nline <2>"}, {"title": "", "text": "世界"}]


def make_chat(rng: random.Random, texts: list[str]) -> list[dict[str, Any]]:
    """A chat that some templates refuse: the same refusal is asked of both sides."""

    def content() -> Any:
        text = rng.choice(texts)
        if rng.random() < 0.1:
            return [{"type": "text", "text": text}, {"type": "image"}, {"type": "text", "text": rng.choice(texts)}]
        return text

    chat: list[dict[str, Any]] = [{"role": "system", "content": content()}] if rng.random() < 0.4 else []
    for turn in range(rng.randrange(1, 6)):
        role = ("user", "assistant")[turn % 2] if rng.random() < 0.9 else rng.choice(["user", "system", "tool", "x"])
        message: dict[str, Any] = {"role": role, "content": content()}
        if role == "assistant":
            if rng.random() < 0.3:
                arguments = {"place": rng.choice(texts), "days": rng.choice([1, 2.5, None, True, [1, "é<"]]), "é": {}}
                call = {"id": "c1", "type": "function", "function": {"name": "find_weather", "arguments": arguments}}
                message["tool_calls"] = [call] * rng.choice([1, 1, 2])
                message["content"] = rng.choice([None, "", message["content"]])
            if rng.random() < 0.3:
                message[rng.choice(["reasoning_content", "thinking", "reasoning"])] = rng.choice(
                    [None, "", "so\n", "x"]
                )
            elif rng.random() < 0.3 and isinstance(message["content"], str):
                message["content"] = f"<think>\n{rng.choice(texts)}\n</think>\n\n{message['content']}"
        chat.append(message)
        if "tool_calls" in message:
            chat += [{"role": "tool", "content": rng.choice(texts), "name": "f"}] * rng.choice([1, 2])
    return chat


def outcome(render: Callable[..., str], *args: Any, **options: Any) -> str | None:
    """The prompt, or None for a refusal: a template may fail in any way."""
    try:
        return render(*args, **options)
    except Exception:  # noqa: BLE001
        return None


def check(ours: HuggingFaceTokenizer, theirs: PreTrainedTokenizerBase, texts: list[str], num_chats: int) -> int:
    """Both render, and encode, or both refuse; the number that rendered."""
    rng = random.Random(11)
    rendered = 0
    for _ in range(num_chats):
        chat = make_chat(rng, texts)
        prompt = rng.random() < 0.6
        options: dict[str, Any] = {
            "tools": TOOLS if rng.random() < 0.3 else None,
            "documents": DOCUMENTS if rng.random() < 0.3 else None,
            "continue_final_message": not prompt and rng.random() < 0.3,
        }
        extra = {"enable_thinking": rng.random() < 0.5, "variable": {"b": 1, "a": "é"}} if rng.random() < 0.5 else {}
        expected = outcome(
            theirs.apply_chat_template, chat, tokenize=False, add_generation_prompt=prompt, **options, **extra
        )
        got = outcome(ours.apply_chat_template, chat, add_generation_prompt=prompt, variables=extra, **options)
        assert got == expected, (chat, options)
        if got is not None:
            assert ours.encode(got, False) == theirs(got, add_special_tokens=False)["input_ids"]
            rendered += 1
    return rendered


@pytest.fixture(scope="module")
def with_template(
    directory_of: Callable[[str], Path], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[HuggingFaceTokenizer, PreTrainedTokenizerBase]]:
    def load(name: str) -> tuple[HuggingFaceTokenizer, PreTrainedTokenizerBase]:
        theirs = AutoTokenizer.from_pretrained(directory_of("byte-level"))
        theirs.chat_template = (repository / f"tests/unit/tokenizer/templates/{name}.jinja").read_text("utf-8")
        directory = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(directory)
        return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)

    return load


@pytest.mark.clause("TK-CHAT-2", "TK-CHAT-3", "TK-CHAT-6", "TK-CHAT-7", "TK-CHAT-8")
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats(name: str, with_template: Callable[[str], Any], strings: list[str]) -> None:
    assert check(*with_template(name), strings, 120) > 30


@pytest.mark.slow
@pytest.mark.clause("TK-CHAT-2", "TK-CHAT-3", "TK-CHAT-6", "TK-CHAT-7", "TK-CHAT-8")
@pytest.mark.parametrize("name", TEMPLATES)
def test_three_thousand_chats(name: str, with_template: Callable[[str], Any], strings: list[str]) -> None:
    assert check(*with_template(name), strings, 3000) > 800


@pytest.mark.clause("TK-CHAT-7")
def test_a_chat_of_records_and_one_of_mappings(with_template: Callable[[str], Any]) -> None:
    ours, theirs = with_template("qwen3")
    records = [ChatMessage.user("hi"), ChatMessage("assistant", "ho", {"reasoning": "hm", "name": None})]
    fields = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "thinking": "hm"}]
    expected = theirs.apply_chat_template(fields, tokenize=False)
    assert "<think>\nhm\n</think>" in expected
    assert ours.apply_chat_template(records, add_generation_prompt=False) == expected
    assert ours.apply_chat_template(fields, add_generation_prompt=False) == expected
    with pytest.raises(TokenizerError, match="message: got str, expected a ChatMessage or a mapping"):
        ours.apply_chat_template(["hi"])
