"""Tokenizers of Hugging Face directories, against transformers reading the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ferrum_ref.errors import (
    FerrumError,
    FerrumIOError,
    InvalidFormatError,
    InvalidParameterError,
    NotFoundError,
)
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
@pytest.mark.parametrize("lists_added_tokens", [True, False])
def test_roles_in_their_spellings(tokenizer_directory: Path, lists_added_tokens: bool) -> None:
    """Where the two files disagree, transformers believes special_tokens_map.json unless the other lists tokens."""
    put(tokenizer_directory, "special_tokens_map.json", {"bos_token": "<pad>", "pad_token": {"content": "<pad>"}})
    config: dict[str, Any] = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "__type": "AddedToken"}}
    if lists_added_tokens:
        config |= {"added_tokens_decoder": {}, "pad_token": "<pad>"}
    put(tokenizer_directory, "tokenizer_config.json", config)
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    special = load_tokenizer(tokenizer_directory).special_tokens()
    assert (special.bos_token, special.eos_token, special.pad_token) == (260 if lists_added_tokens else 262, 261, 262)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (special.bos_token, 261, 262)


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


@pytest.mark.clause("TK-DIR-6", "TK-CHAT-9")
@pytest.mark.parametrize("in_files", [True, False])
def test_named_templates(tokenizer_directory: Path, in_files: bool) -> None:
    """Chosen as transformers chooses: by name, "tool_use" for chats with tools, else the default."""
    texts = {"default": "plain", "tool_use": "tools", "rag": "{{ documents[0].text }}"}
    if in_files:
        (tokenizer_directory / "additional_chat_templates").mkdir()
        for name, text in texts.items():
            file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
            put(tokenizer_directory, f"{file}.jinja", text)
        put(tokenizer_directory, "tokenizer_config.json", {"chat_template": "not this one"})
    else:
        listed = [{"name": name, "template": text} for name, text in texts.items()]
        put(tokenizer_directory, "tokenizer_config.json", {"chat_template": listed})
    ours = load_tokenizer(tokenizer_directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    chat = [{"role": "user", "content": "x"}]
    documents = [{"text": "known"}]
    for name in (None, "default", "tool_use", "rag"):
        for tools in (None, [], [{"name": "f"}]):
            expected = theirs.apply_chat_template(
                chat, chat_template=name, tools=tools, documents=documents, tokenize=False
            )
            assert ours.apply_chat_template(chat, template=name, tools=tools, documents=documents) == expected
    assert set(ours.named_chat_templates) == {"tool_use", "rag"}
    with pytest.raises(InvalidParameterError, match="got 'other', expected one of this model's: rag, tool_use"):
        ours.apply_chat_template(chat, template="other")


@pytest.mark.clause("TK-CHAT-9")
def test_templates_without_a_default(tokenizer_directory: Path) -> None:
    put(tokenizer_directory, "tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "r"}]})
    ours = load_tokenizer(tokenizer_directory)
    assert ours.info().supports_chat_template
    assert ours.apply_chat_template([ChatMessage.user("x")], template="rag") == "r"
    with pytest.raises(InvalidParameterError, match="template: got 'no name', expected one of this model's: rag"):
        ours.apply_chat_template([ChatMessage.user("x")])


ADDED: list[dict[str, Any]] = [
    {"config": {"eos_token": "he", "image_token": "<tool>", "extra_special_tokens": ["hello", "<new>"]}},
    {"config": {"extra_special_tokens": {"boi_token": "<boi>", "audio": "ll"}, "pad_token": None}},
    {
        "config": {
            "bos_token": "<bos>",
            "added_tokens_decoder": {
                "264": {"content": "<late>", "special": True},
                "257": {"content": "ll", "lstrip": True, "special": False},
                "263": {"content": "<tool>", "rstrip": True, "normalized": False, "special": True},
            },
            "additional_special_tokens": ["<late>"],
        }
    },
    {
        "config": {"bos_token": "<bos>"},
        "special_map": {"eos_token": {"content": "<end>", "lstrip": True}, "additional_special_tokens": ["he"]},
        "added": {"<end>": 265, "<mine>": 264},
    },
    {"config": {"eos_token": "<eos>", "split_special_tokens": True}},
]
WITH_ADDED = ("hello  ll he <tool>  x<new><late>", "<bos>he<eos>", " <end><mine> <boi>ll", "shell  ll ", "")


@pytest.mark.clause("TK-DIR-5", "TK-DIR-2")
@pytest.mark.parametrize("case", ADDED)
def test_tokens_listed_outside_tokenizer_json(case: dict[str, Any], tokenizer_directory: Path) -> None:
    names = {"config": "tokenizer_config.json", "special_map": "special_tokens_map.json", "added": "added_tokens.json"}
    for key, content in case.items():
        put(tokenizer_directory, names[key], content)
    put(tokenizer_directory, "chat_template.jinja", "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ boi_token }}")
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    ours = load_tokenizer(tokenizer_directory)
    chat = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.vocab_size() == len(theirs)
    for text in WITH_ADDED:
        ids = theirs.encode(text)
        assert ours.encode(text, True) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.clause("TK-DIR-7")
def test_the_file_counts_and_not_the_class(tmp_path: Path) -> None:
    """Llama-2's pipeline; by transformers, then with the class that takes the file as it is."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    put(tmp_path, "config.json", {"model_type": "llama"})
    found = {}
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        put(tmp_path, "tokenizer_config.json", {"tokenizer_class": name, "bos_token": "<s>", "unk_token": "<unk>"})
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        found[name] = [tokens[i] for i in theirs.encode("  a", add_special_tokens=False)]
        assert [tokens[i] for i in load_tokenizer(tmp_path).encode("  a", False)] == ["▁", "▁", "▁a"]
    assert found == {"LlamaTokenizer": ["▁", "▁a"], "PreTrainedTokenizerFast": ["▁", "▁", "▁a"]}


@pytest.mark.clause("TK-DECODE-3")
@pytest.mark.parametrize("insists", [True, False])
def test_spaces_of_byte_pair_encodings_are_cleaned_up_on_insistence(tokenizer_directory: Path, insists: bool) -> None:
    setting = "clean_up_tokenization_spaces"
    config = {setting: True, f"{setting}_for_bpe_even_though_it_will_corrupt_output": insists}
    put(tokenizer_directory, "tokenizer_config.json", config)
    tokenizer = load_tokenizer(tokenizer_directory)
    assert tokenizer.decode(list(b"a , b"), True) == ("a, b" if insists else "a , b")


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
        ("tokenizer_config.json", {"chat_template": [5]}, "chat_template: got 5, expected a name and a template"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template: got None, expected a text"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, r"added_tokens_decoder: got \[\], expected tokens by"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": 2}},
            "added_tokens_decoder: got 2, expected a token's",
        ),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": [1]},
            "extra_special_tokens: got 1, expected a token's text",
        ),
        ("added_tokens.json", {"<x>": "y"}, "'<x>': got 'y', expected an id"),
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
