"""Loading the families: what a name or path becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ferrum_ref.errors import InvalidFormatError, InvalidParameterError, NotFoundError, UnsupportedError
from ferrum_ref.families import load_embedder, load_multimodal, load_speech, load_transcriber
from ferrum_ref.types.devices import DataType


@pytest.mark.clause("FM-LOAD-1", "FM-LOAD-2", "FM-LOAD-3", "FM-LOAD-4")
@pytest.mark.parametrize("load", [load_embedder, load_multimodal, load_transcriber, load_speech])
def test_what_is_no_such_model(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(NotFoundError, match="known: "):
        load("no such model", cache_dir=tmp_path)
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="model_type: got 'gpt2'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidFormatError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(UnsupportedError, match="got a file, expected"):
        load(tmp_path / "config.json")
    with pytest.raises(NotFoundError, match="abacus"):
        load(tmp_path, "abacus")


@pytest.mark.clause("FM-LOAD-1")
def test_a_pulled_name_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="ferrum-ref pull all-minilm-l6-v2"):
        load_embedder("all-minilm-l6-v2", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.clause("FM-LOAD-1", "FM-BERT-4")
def test_a_type_that_is_no_float(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        load_embedder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    )
    with pytest.raises(InvalidParameterError, match="INT8"):
        load_embedder(tmp_path, dtype=DataType.INT8)
    assert load_embedder(tmp_path, dtype=DataType.FP16).embed_texts(["a"]).shape == (1, 4)
