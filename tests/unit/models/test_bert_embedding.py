"""Pooling, normalisation, sentence-transformers' files, and texts to vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ferrum_ref.errors import (
    FerrumError,
    FerrumIOError,
    InvalidFormatError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.families import load_embedder
from ferrum_ref.models.bert import BertEncoder
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.bert_embedding import BertEmbeddingModel, SentenceEmbedder
from ferrum_ref.models.bert_pooling import Pooling, SentenceSettings, normalized, pool
from ferrum_ref.models.bert_weights import read_bert_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer

BACKEND = make_backend()
ROWS = np.array([[1.0, -2.0], [3.0, 4.0], [-1.0, 1.0], [5.0, 1.0]], dtype=np.float32)
CLOSED_FORMS: dict[Pooling, Callable[[NDArray[Any]], NDArray[Any]]] = {
    Pooling.MEAN: lambda rows: rows.mean(0),
    Pooling.MEAN_SQRT_LEN: lambda rows: rows.sum(0) / np.sqrt(len(rows)),
    Pooling.CLS: lambda rows: rows[0],
    Pooling.MAX: lambda rows: rows.max(0),
}


@pytest.mark.clause("FM-POOL-2")
@pytest.mark.parametrize("mode", Pooling)
@pytest.mark.parametrize("length", [1, 3, 4])
def test_pooling(mode: Pooling, length: int) -> None:
    found = pool(BACKEND.tensor_factory().from_numpy(ROWS[:length]), mode, BACKEND).to_numpy()
    wanted = CLOSED_FORMS[mode](ROWS[:length].astype(np.float64))
    assert found.shape == (1, 2)
    assert np.abs(found[0] - wanted).max() <= 2**-22 * np.abs(ROWS).sum()


@pytest.mark.clause("FM-POOL-3")
def test_normalised_rows_have_length_one_and_zero_stays_zero() -> None:
    rows = np.array([[3, 4], [0, 0], [1e-8, 0], [1e15, -1e15]], dtype=np.float32)
    found = normalized(BACKEND.tensor_factory().from_numpy(rows), BACKEND).to_numpy().astype(np.float64)
    wanted = rows.astype(np.float64) / np.sqrt((rows.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-24)
    assert np.abs(found - wanted).max() <= 2**-21
    assert found[1].tolist() == [0, 0]


FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "sentence_bert_config.json": {"max_seq_length": 7, "do_lower_case": True},
}


def write(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.mark.clause("FM-POOL-1", "FM-POOL-4")
def test_settings_from_files(tmp_path: Path) -> None:
    assert SentenceSettings.from_directory(tmp_path, 20) == SentenceSettings(20, Pooling.MEAN, False, False)
    write(tmp_path, FILES)
    assert SentenceSettings.from_directory(tmp_path, 20) == SentenceSettings(7, Pooling.CLS, True, True)
    assert SentenceSettings.from_directory(tmp_path, 5).max_tokens == 5  # never beyond the position table
    write(tmp_path, {"modules.json": FILES["modules.json"][:2], "sentence_bert_config.json": {"max_seq_length": None}})
    assert SentenceSettings.from_directory(tmp_path, 20) == SentenceSettings(20, Pooling.CLS, False, False)
    with pytest.raises(InvalidParameterError, match="max_tokens"):
        SentenceSettings(0)


@pytest.mark.clause("FM-POOL-4")
@pytest.mark.parametrize("mode", Pooling)
def test_pooling_modes_by_flag_and_by_name(mode: Pooling, tmp_path: Path) -> None:
    flags = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": mode.value}
    by_flag = {f"pooling_mode_{flag}": name == mode.value for flag, name in flags.items()}
    if mode is not Pooling.MEAN_SQRT_LEN:
        by_flag["pooling_mode_mean_sqrt_len_tokens"] = False
    for config in (by_flag, {"pooling_mode": mode.value}):
        write(tmp_path, {**FILES, "1_Pooling/config.json": config})
        assert SentenceSettings.from_directory(tmp_path, 20).pooling is mode


MODULES = FILES["modules.json"]
DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
BROKEN: dict[str, tuple[dict[str, Any], type[FerrumError], str]] = {
    "dense": ({"modules.json": [*MODULES[:2], DENSE]}, UnsupportedError, "Dense"),
    "order": ({"modules.json": MODULES[::-1]}, UnsupportedError, "type"),
    "object": ({"modules.json": {"a": 1}}, InvalidFormatError, "expected a list"),
    "two values": ({"modules.json": '[], "b": 2'}, InvalidFormatError, "expected a list"),
    "no JSON": ({"modules.json": "["}, InvalidFormatError, "modules.json"),
    "a path": (
        {"modules.json": [MODULES[0], {**MODULES[1], "path": "../1_Pooling"}]},
        InvalidFormatError,
        "plain folder name",
    ),
    "no path": (
        {"modules.json": [MODULES[0], {"type": MODULES[1]["type"]}]},
        InvalidFormatError,
        "plain folder name",
    ),
    "no pooling file": ({"modules.json": [MODULES[0], {**MODULES[1], "path": "other"}]}, NotFoundError, "other"),
    "two modes": (
        {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
        UnsupportedError,
        "expected one of",
    ),
    "no mode": ({"1_Pooling/config.json": {}}, UnsupportedError, "expected one of"),
    "another mode": ({"1_Pooling/config.json": {"pooling_mode_lasttoken": True}}, UnsupportedError, "lasttoken"),
    "another name": ({"1_Pooling/config.json": {"pooling_mode": "lasttoken"}}, UnsupportedError, "lasttoken"),
    "limit": ({"sentence_bert_config.json": {"max_seq_length": 0}}, InvalidFormatError, "max_seq_length"),
    "case": ({"sentence_bert_config.json": {"do_lower_case": "no"}}, InvalidFormatError, "do_lower_case"),
    "prompt": ({"config_sentence_transformers.json": {"default_prompt_name": "q"}}, UnsupportedError, "prompt"),
}


@pytest.mark.clause("FM-POOL-5")
@pytest.mark.parametrize("name", BROKEN)
def test_settings_that_are_refused(name: str, tmp_path: Path) -> None:
    changes, error, text = BROKEN[name]
    write(tmp_path, {**FILES, **changes})
    with pytest.raises(error, match=text):
        SentenceSettings.from_directory(tmp_path, 20)


@pytest.mark.clause("FM-POOL-5")
def test_a_modules_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "modules.json").mkdir()
    with pytest.raises(FerrumIOError, match=r"modules\.json"):
        SentenceSettings.from_directory(tmp_path, 20)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 50 words "a0" ... "a44" behind five special tokens, saved by transformers."""
    import torch
    from transformers import BertConfig as TransformersConfig
    from transformers import BertModel

    directory = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(3)
    model = BertModel(
        TransformersConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.4)
    model.save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"a{index}" for index in range(45))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def embedder(tiny_directory: Path) -> SentenceEmbedder:
    return load_embedder(tiny_directory)


def reference(directory: Path, ids: list[int], normalize: bool) -> tuple[NDArray[Any], float]:
    """Mean-pooled vector of transformers in float64, and four times float32's error."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(directory).eval()
    found = []
    with torch.no_grad():
        for kind in (torch.float32, torch.float64):
            vector = model.to(kind)(torch.tensor([ids])).last_hidden_state[0].mean(0)
            found.append((torch.nn.functional.normalize(vector, dim=0) if normalize else vector).numpy())
    return found[1], 4 * float(np.abs(found[0] - found[1]).max())


@pytest.mark.clause("FM-EMBED-1", "FM-EMBED-4", "FM-EMBED-5", "FM-LOAD-1")
@pytest.mark.parametrize("normalize", [None, False, True])
def test_vectors_are_the_mean_of_transformers_states(
    tiny_directory: Path, embedder: SentenceEmbedder, normalize: bool | None
) -> None:
    batch = [[2, 5, 9, 3], [2, 49, 48, 47, 7, 7, 3], [4], [2, 5, 5, 3]]
    found = embedder.model.embed_batch(batch, normalize=normalize)
    assert (found.shape, found.dtype) == ((4, 16), np.float32)
    for ids, vector in zip(batch, found, strict=True):
        exact, bound = reference(tiny_directory, ids, bool(normalize))
        assert np.abs(vector - exact).max() <= bound
        if not normalize:
            assert np.abs(embedder.model.embed(ids) - exact).max() <= bound
    assert embedder.model.embed_batch([]).shape == (0, 16)


@pytest.mark.clause("FM-EMBED-3", "FM-EMBED-5")
def test_embedding_is_pure(tiny_directory: Path) -> None:
    config = BertConfig.from_hf(json.loads((tiny_directory / "config.json").read_text()))
    encoder = BertEncoder(config, read_bert_weights(tiny_directory, config, BACKEND), BACKEND)
    model = BertEmbeddingModel(encoder, SentenceSettings(12, normalize=True))
    before = model.embed([2, 8, 3])
    model.embed([2, 30, 31, 32, 3])
    assert np.array_equal(model.embed([2, 8, 3]), before)
    assert abs(float((before.astype(np.float64) ** 2).sum()) - 1) < 2**-20
    assert np.linalg.norm(model.embed_batch([[2, 8, 3]], normalize=False)) > 1.5
    assert model.embedding_dim == 16


@pytest.mark.clause("FM-EMBED-2", "FM-EMBED-4")
def test_what_cannot_be_embedded(embedder: SentenceEmbedder) -> None:
    for ids, error in (([], ModelError), ([50], InvalidParameterError), ([1] * 13, ResourceExhaustedError)):
        with pytest.raises(error):
            embedder.model.embed(ids)
        with pytest.raises(error):
            embedder.model.embed_batch([[1], ids])


@pytest.mark.clause("FM-TEXT-1", "FM-TEXT-2")
def test_texts_are_cut_inside_their_special_tokens(tiny_directory: Path, embedder: SentenceEmbedder) -> None:
    from transformers import PreTrainedTokenizerFast

    judge = PreTrainedTokenizerFast(tokenizer_file=str(tiny_directory / "tokenizer.json"))
    for num_words in (0, 1, 9, 10, 11, 12, 30):
        text = " ".join(f"a{index}" for index in range(num_words))
        assert embedder.token_ids(text) == judge(text, truncation=True, max_length=12)["input_ids"]
    short = SentenceEmbedder(
        BertEmbeddingModel(embedder.model.encoder, SentenceSettings(5, lower_case=True)), embedder.tokenizer
    )
    assert short.token_ids("A0 a1 A2 a3 a4") == [2, 5, 6, 7, 3]
    none = SentenceEmbedder(BertEmbeddingModel(embedder.model.encoder, SentenceSettings(1)), embedder.tokenizer)
    with pytest.raises(UnsupportedError, match="special tokens are in the way"):
        none.token_ids("a1 a2")


@pytest.mark.clause("FM-TEXT-2")
def test_special_tokens_inside_a_text_are_not_cut_around(embedder: SentenceEmbedder) -> None:
    backend = Tokenizer(models.WordLevel({"a": 5, "b": 6, "[SEP]": 3, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A [SEP] $A", special_tokens=[("[SEP]", 3)])
    twice = SentenceEmbedder(
        BertEmbeddingModel(embedder.model.encoder, SentenceSettings(4)), HuggingFaceTokenizer(backend)
    )
    assert twice.token_ids("a") == [5, 3, 5]
    with pytest.raises(UnsupportedError, match="special tokens are in the way"):
        twice.token_ids("a b")


@pytest.mark.clause("FM-TEXT-3")
def test_grouping_changes_nothing_but_last_bits(tiny_directory: Path, embedder: SentenceEmbedder) -> None:
    texts = [" ".join(f"a{(index * 7) % 45}" for index in range(n)) for n in (3, 1, 9, 2, 3)]
    for batch_size in (1, 2, 32):
        found = embedder.embed_texts(texts, batch_size=batch_size)
        for text, vector in zip(texts, found, strict=True):
            exact, bound = reference(tiny_directory, embedder.token_ids(text), False)
            assert np.abs(vector - exact).max() <= bound
    assert embedder.embed_texts([]).shape == (0, 16)
    with pytest.raises(InvalidParameterError, match="batch_size"):
        embedder.embed_texts(texts, batch_size=0)


@pytest.mark.model
@pytest.mark.clause("FM-TEXT-4", "FM-TEXT-1", "FM-EMBED-1", "FM-POOL-4")
def test_minilm_orders_texts_by_meaning(minilm_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = load_embedder("all-minilm-l6-v2", cache_dir=minilm_path.parents[2])
    assert loaded.model.settings == SentenceSettings(256, Pooling.MEAN, True, False)
    texts = [
        "A man is eating food.",
        "Someone is having a meal.",
        "A man is riding a horse.",
        "The stock market fell today.",
        "word " * 400,
    ]
    judge = AutoTokenizer.from_pretrained(minilm_path)
    for text in texts:
        assert loaded.token_ids(text) == judge(text, truncation=True, max_length=256)["input_ids"]
    vectors = loaded.embed_texts(texts)
    for text, vector in zip(texts, vectors, strict=True):
        exact, bound = reference(minilm_path, loaded.token_ids(text), True)
        assert np.abs(vector - exact).max() <= bound
    meal, horse, market = vectors[1:4] @ vectors[0]
    assert meal > horse > market
    assert meal > 0.5 > 0.2 > market
