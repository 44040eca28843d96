"""Tokenizers of Hugging Face directories, against transformers reading the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ferrum_ref.errors import FerrumError, FerrumIOError, InvalidFormatError, NotFoundError
from ferrum_ref.interfaces.tokenizer import ChatMessage
from ferrum_ref.tokenizer import load_tokenizer

CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def put(directory: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text, "utf-8")


@pytest.mark.clause("TK-LOAD-1", "TK-DIR-2", "TK-DIR-3", "TK-CHAT-2", "TK-ENCODE-1", "TK-DECODE-1")
def test_what_transformers_saved(byte_backend: Tokenizer, tmp_path: Path) -> None:
    """Saved by transformers, loaded by both: the same ids, texts, roles and prompts."""
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_backend, **roles)
    theirs.chat_template = CHATML
    theirs.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    special = ours.special_tokens()
    assert (special.bos_token, special.eos_token, special.pad_token) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert special.unk_token is None
    assert ours.vocab_size() == len(theirs)
    assert {i for i in range(len(theirs)) if ours.is_special_token(i)} == set(theirs.all_special_ids)
    for text in ("hello <eos> wörld\n", "", "<tool>x<pad>"):
        for add_special in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special)
            assert ours.encode(text, add_special) == ids
            for skip in (True, False):
                decoded = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip) == decoded
    chat = [ChatMessage.user("hi"), ChatMessage.assistant("ho")]
    plain = [{"role": each.role, "content": each.content} for each in chat]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(
        plain, tokenize=False, add_generation_prompt=True
    )
    assert ours.info().model_name == tmp_path.name


@pytest.mark.clause("TK-DIR-2")
def test_roles_in_their_spellings(tokenizer_directory: Path) -> None:
    put(tokenizer_directory, "special_tokens_map.json", {"bos_token": "<pad>", "pad_token": {"content": "<pad>"}})
    put(tokenizer_directory, "tokenizer_config.json", {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"})
    special = load_tokenizer(tokenizer_directory).special_tokens()
    assert (special.bos_token, special.eos_token, special.pad_token) == (260, 261, 262)


@pytest.mark.clause("TK-DIR-2", "TK-DIR-4")
def test_nothing_is_guessed(tokenizer_directory: Path) -> None:
    """The vocabulary has <bos> and <eos>, but no file gives them a role."""
    tokenizer = load_tokenizer(tokenizer_directory)
    assert tokenizer.special_tokens().eos_token is None
    assert tokenizer.stop_token_ids == frozenset()
    assert not tokenizer.info().supports_chat_template


@pytest.mark.clause("TK-DIR-3")
def test_templates_in_their_places(tokenizer_directory: Path) -> None:
    def rendered() -> str:
        return load_tokenizer(tokenizer_directory).apply_chat_template([ChatMessage.user("x")])

    put(tokenizer_directory, "tokenizer_config.json", {"chat_template": "config"})
    assert rendered() == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    put(tokenizer_directory, "tokenizer_config.json", {"chat_template": named})
    assert rendered() == "default"
    put(tokenizer_directory, "chat_template.jinja", "file")
    assert rendered() == "file"


@pytest.mark.clause("TK-SPECIAL-2")
def test_stop_ids_are_the_union(tokenizer_directory: Path) -> None:
    put(tokenizer_directory, "tokenizer_config.json", {"eos_token": "<eos>"})
    put(tokenizer_directory, "config.json", {"eos_token_id": 5})
    put(tokenizer_directory, "generation_config.json", {"eos_token_id": [6, 7, -1]})
    assert load_tokenizer(tokenizer_directory).stop_token_ids == {5, 6, 7, 261}


@pytest.mark.clause("TK-DIR-1", "TK-DIR-2", "TK-DIR-4")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "", "tokenizer.json: EOF while parsing"),
        ("tokenizer.json", "{}", "tokenizer.json: Model missing"),
        ("tokenizer.json", '{"version": "1.0",', "tokenizer.json: EOF while parsing"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: line 1"),
        ("tokenizer_config.json", {"eos_token": "<none>"}, "eos_token: got '<none>', expected a token of"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token: got 5, expected a token's text"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template: got 5, expected a text"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: got a list"),
        ("config.json", "nonsense", "config.json: line 1"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "generation_config.json: eos_token_id: got '</s>'"),
    ],
)
def test_broken_files_are_named(name: str, content: Any, message: str, tokenizer_directory: Path) -> None:
    put(tokenizer_directory, name, content)
    with pytest.raises(InvalidFormatError, match=message) as caught:
        load_tokenizer(tokenizer_directory)
    assert "\n" not in str(caught.value)


@pytest.mark.clause("TK-DIR-1", "TK-DIR-3")
def test_absent_and_unreadable(tokenizer_directory: Path) -> None:
    (tokenizer_directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidFormatError, match=r"chat_template\.jinja: byte 0"):
        load_tokenizer(tokenizer_directory)
    (tokenizer_directory / "chat_template.jinja").unlink()
    (tokenizer_directory / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tokenizer_directory)
    (tokenizer_directory / "tokenizer.json").mkdir()
    with pytest.raises(FerrumIOError, match=r"tokenizer\.json: "):
        load_tokenizer(tokenizer_directory)


@pytest.mark.clause("TK-DIR-1")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tokenizer_json(data: st.DataObject, byte_backend: Tokenizer, tmp_path: Path) -> None:
    content = bytearray(byte_backend.to_str().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place : place + data.draw(st.integers(1, 40))]
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = ""
    try:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("hello wörld", True), True)
    except FerrumError as error:
        message = str(error)
    assert "\n" not in message
