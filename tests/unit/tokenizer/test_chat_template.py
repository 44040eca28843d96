"""Chat templates rendered here and by transformers."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ferrum_ref.errors import InvalidParameterError, TokenizerError
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.tokenizer import HuggingFaceTokenizer, load_tokenizer
from ferrum_ref.tokenizer.chat_template import ChatTemplate

CHAT = [
    ChatMessage.system("Answer  in one line. <b>&</b>"),
    ChatMessage.user("Was ist 1 < 2? 世界 🙂\n"),
    ChatMessage("assistant", "Yes.", {"tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None, "é<"]}}]}),
    ChatMessage.user("Again."),
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä", "parameters": {"x": 1}}}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "whitespace": "  {% for m in messages %}\n    {%- if loop.first %}\n  first\n  {% endif %}\n  {{ m.role | upper }}:"
    "\n    {{ m.content | trim }}\n  {% endfor %}\n\n  tail  ",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ pad_token }}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% for c in m.tool_calls %}{{ c.arguments | tojson(sort_keys=true) }}{% endfor %}"
    "{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }} {{ dict(a=1, b=2) | tojson }} {{ messages[::-1] | map(attribute='role') | join(',') }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ tools is none }}{{ documents is none }}|",
    "clock": "{{ strftime_now('%Y-%m') }}",
}
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.clause("TK-CHAT-2", "TK-CHAT-3")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_as_transformers_renders_it(
    name: str, add_generation_prompt: bool, tools: list[dict[str, Any]] | None, byte_backend: Tokenizer
) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_backend, **SPECIAL)
    expected = theirs.apply_chat_template(
        [{"role": m.role, "content": m.content, **m.metadata} for m in CHAT],
        chat_template=TEMPLATES[name],
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    ours = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert ours.render(CHAT, add_generation_prompt=add_generation_prompt, tools=tools) == expected
    assert expected


@pytest.mark.clause("TK-CHAT-2")
def test_role_and_content_win_over_metadata() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }}{{ m.extra }}{% endfor %}")
    message = ChatMessage("user", "hi", {"role": "system", "content": "x", "extra": "!"})
    assert template.render([message]) == "user=hi!"


@pytest.mark.clause("TK-CHAT-6")
def test_variables_of_the_template() -> None:
    """They go before the special tokens; the arguments' own names are taken."""
    template = ChatTemplate("{{ thinks }}{{ bos_token }}{{ documents[0].title }}", SPECIAL)
    variables = {"thinks": False, "bos_token": "<mine>"}
    assert template.render(CHAT, variables=variables, documents=[{"title": "T"}]) == "False<mine>T"
    with pytest.raises(InvalidParameterError, match="variables: got 'tools', expected other names"):
        template.render(CHAT, variables={"tools": []})


@pytest.mark.clause("TK-CHAT-4")
def test_values_keep_their_shape(byte_backend: Tokenizer) -> None:
    """What a template prints of a tuple, a key that is a number, a large number: as in transformers."""
    text = "{% for m in messages %}{{ m.content }} {{ m.content | tojson }};{% endfor %}"
    values: list[Any] = [(1, "a"), {1: (2.5, None), "x": [True]}, 10**30, 1e300, float("inf"), "é\u2028<", [[]]]
    chat = [{"role": "user", "content": value} for value in values]
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_backend)
    expected = theirs.apply_chat_template(chat, chat_template=text, tokenize=False)
    assert ChatTemplate(text).render(chat) == expected
    assert "(1, 'a') [1, \"a\"]" in expected


@pytest.mark.clause("TK-CHAT-8")
@pytest.mark.parametrize(
    ("last", "field", "expected"),
    [
        ({"content": "so "}, True, "<user>hi<assistant>so "),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}]}, True, "<user>hi<assistant>a"),
        ({"content": "x", "reasoning": "hm"}, "reasoning_content", "<user>hi<assistant>hm"),
        ({"content": "x", "thinking": "hm"}, "thinking", "<user>hi<assistant>hm"),
    ],
)
def test_going_on_with_the_last_message(last: Any, field: Any, expected: str, byte_backend: Tokenizer) -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}<end>"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", **last}]
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_backend)
    rendered = theirs.apply_chat_template(chat, chat_template=text, continue_final_message=field, tokenize=False)
    ours = ChatTemplate(text).render(chat, continue_final_message=field, add_generation_prompt=False)
    assert ours == rendered == expected
    assert "CONTINUE" not in str(chat)


@pytest.mark.clause("TK-CHAT-8")
@pytest.mark.parametrize(
    ("text", "chat", "message"),
    [
        ("{{ messages[0].content }}", [], "got no messages, expected a message to go on with"),
        ("{{ messages[0].content }}", [{"role": "x"}], "got a last message without 'content'"),
        (
            "{{ messages[0].role }}",
            [{"role": "x", "content": "y"}],
            "got 'content', expected a field that the template",
        ),
        ("{{ messages[0].content }}", [{"role": "x", "content": [{"a": 1}]}], "got a last message without text"),
        ("{{ messages[0].role }}{# content #}", [{"role": "x", "content": "y"}], "got a template that drops the last"),
    ],
)
def test_nothing_to_go_on_with(text: str, chat: list[Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"continue_final_message: {message}"):
        ChatTemplate(text).render(chat, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(InvalidParameterError, match="got it with add_generation_prompt, expected one of the two"):
        ChatTemplate(text).render(chat, continue_final_message=True)


@pytest.mark.clause("TK-CHAT-3")
def test_the_clock_is_an_argument() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render([]) == "26 Jul 2024"


@pytest.mark.clause("TK-CHAT-5")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n{% for %}", r"compile chat template: line 2: "),
        ("{% endfor %}", r"compile chat template: line 1: "),
        ("{{ raise_exception('only\nuser turns') }}", r"apply chat template: only user turns"),
        ("{{ messages[0]['content'] + 1 }}", r"apply chat template: can only concatenate str"),
        ("{{ nothing.more }}", r"apply chat template: 'nothing' is undefined"),
        ("{{ 1 // 0 }}", r"apply chat template: "),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", r"apply chat template: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"apply chat template: maximum recursion"),
    ],
)
def test_failing_templates_are_one_line(text: str, message: str) -> None:
    template = ChatTemplate(text)  # nothing is raised before a chat is rendered
    with pytest.raises(TokenizerError, match=message) as caught:
        template.render(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("TK-CHAT-4")
@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ namespace(__class__=1) }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
    ],
)
def test_the_sandbox_holds(text: str) -> None:
    with pytest.raises(TokenizerError, match="apply chat template"):
        ChatTemplate(text).render(CHAT)


@pytest.mark.clause("TK-CHAT-4")
def test_metadata_must_be_json() -> None:
    with pytest.raises(TokenizerError, match=r"metadata: .* expected JSON values"):
        ChatTemplate("x").render([ChatMessage("user", "hi", {"file": object()})])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TokenizerError, match="message: got a value that holds itself, expected JSON"):
        ChatTemplate("x").render([{"role": "user", "content": endless}])


@pytest.mark.clause("TK-CHAT-2")
def test_a_tokenizer_with_a_template_uses_it(byte_backend: Tokenizer) -> None:
    tokenizer = HuggingFaceTokenizer(byte_backend, chat_template=ChatTemplate(TEMPLATES["chatml"]))
    assert tokenizer.info().supports_chat_template
    assert tokenizer.apply_chat_template([ChatMessage.user("hi")]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.model
@pytest.mark.clause("TK-CHAT-2", "TK-GGUF-2")
def test_the_real_template(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    prompt = tokenizer.apply_chat_template([ChatMessage.user("What is the capital of France?")])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer.encode(prompt, False)) == 37
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer._backend.to_str()))
    assert tokenizer.chat_template is not None
    for messages in (CHAT, CHAT[1:]):
        expected = theirs.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=tokenizer.chat_template.text,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert tokenizer.apply_chat_template(messages) == expected
