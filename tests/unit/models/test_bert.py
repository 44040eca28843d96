"""The BERT encoder against BertModel of transformers, judged in float64: tiny random models and the real MiniLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ferrum_ref.errors import (
    FerrumError,
    InvalidFormatError,
    InvalidParameterError,
    ModelError,
    ResourceExhaustedError,
    ShapeError,
    UnsupportedError,
)
from ferrum_ref.models.bert import BertEncoder
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.bert_weights import read_bert_weights
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.types.devices import DataType

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "quick gelu": {"hidden_act": "quick_gelu"},
    "large eps": {"layer_norm_eps": 0.3},
    "one head": {"num_attention_heads": 1, "type_vocab_size": 1},
}
BATCH = [[3, 14, 15, 9, 26], [5], [35, 8, 9, 7, 9, 3, 2, 3, 8, 4], [1, 2, 3, 4, 59], [0] * 20]


def make_tiny(directory: Path, seed: int = 0, model: str = "BertModel", **changes: Any) -> Any:
    """A random transformers model with norms and biases that matter, saved to `directory`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    made = getattr(transformers, model)(transformers.BertConfig(**{**TINY, **changes})).eval()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.4)
    made.save_pretrained(directory)
    return made


def encoder_of(directory: Path, backend: Any = None, dtype: DataType = DataType.FP32) -> BertEncoder:
    backend = backend or make_backend()
    config = BertConfig.from_hf(json.loads((directory / "config.json").read_text()))
    return BertEncoder(config, read_bert_weights(directory, config, backend, dtype), backend)


def judged(model: Any, **inputs: Any) -> tuple[NDArray[Any], float]:
    """(float64 hidden states [B, T, E], four times float32's largest error where the mask is 1).  Leaves float64."""
    import torch

    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        single = model.float()(**inputs).last_hidden_state.numpy()
        exact = model.double()(**inputs).last_hidden_state.numpy()
    kept = (
        inputs["attention_mask"].numpy().astype(bool) if "attention_mask" in inputs else np.ones(exact.shape[:2], bool)
    )
    return exact, 4 * float(np.abs(single - exact)[kept].max())


@pytest.mark.clause("FM-BERT-5", "FM-ACT-1")
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_of_tiny_models(variant: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, **VARIANTS[variant])
    exact, bound = judged(model, input_ids=[BATCH[2]])
    (found,) = encoder_of(tmp_path).forward([BATCH[2]])
    assert np.abs(found.to_numpy() - exact[0]).max() <= bound


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BertEncoder]:
    directory = tmp_path_factory.mktemp("bert")
    return make_tiny(directory, seed=1), encoder_of(directory)


@pytest.mark.clause("FM-BERT-5", "FM-BERT-7")
def test_every_layer_is_transformers(tiny: tuple[Any, BertEncoder]) -> None:
    import torch

    model, encoder = tiny
    seen: dict[str, NDArray[Any]] = {}
    encoder.forward([BATCH[2]], observe=lambda name, rows: seen.update({name: rows.to_numpy()}))
    ids = torch.tensor([BATCH[2]])
    with torch.no_grad():
        single = model.float()(ids, output_hidden_states=True).hidden_states
        exact = model.double()(ids, output_hidden_states=True).hidden_states
    assert list(seen) == ["embedding", "layers.0.hidden", "layers.1.hidden", "layers.2.hidden"]
    noise = 4 * max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True))
    for rows, wanted in zip(seen.values(), exact, strict=True):
        assert np.abs(rows - wanted[0].numpy()).max() <= noise


@pytest.mark.clause("FM-BERT-7")
def test_a_batch_is_each_of_its_sequences(tiny: tuple[Any, BertEncoder]) -> None:
    model, encoder = tiny
    found = encoder.forward(BATCH)
    for ids, rows in zip(BATCH, found, strict=True):
        exact, bound = judged(model, input_ids=[ids])
        assert rows.shape() == (len(ids), 24)
        assert np.abs(rows.to_numpy() - exact[0]).max() <= bound


@pytest.mark.clause("FM-BERT-7")
def test_an_observer_sees_shorter_sequences_first(tiny: tuple[Any, BertEncoder]) -> None:
    seen: dict[str, NDArray[Any]] = {}
    found = tiny[1].forward(BATCH, observe=lambda name, rows: seen.update({name: rows.to_numpy()}))
    ordered = [rows.to_numpy() for _, rows in sorted(enumerate(found), key=lambda pair: (len(BATCH[pair[0]]), pair[0]))]
    assert np.array_equal(seen["layers.2.hidden"], np.concatenate(ordered))


@pytest.mark.clause("FM-BERT-5", "FM-BERT-7")
def test_token_types(tiny: tuple[Any, BertEncoder]) -> None:
    model, encoder = tiny
    types = [0, 1, 2, 1, 0]
    exact, bound = judged(model, input_ids=[BATCH[0]], token_type_ids=[types])
    (found,) = encoder.forward([BATCH[0]], [types])
    assert np.abs(found.to_numpy() - exact[0]).max() <= bound
    (zeros,), (default,) = encoder.forward([BATCH[0]], [[0] * 5]), encoder.forward([BATCH[0]])
    assert np.array_equal(zeros.to_numpy(), default.to_numpy())


@pytest.mark.clause("FM-BERT-8")
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padded_batches(tiny: tuple[Any, BertEncoder], side: str) -> None:
    model, encoder = tiny
    ids = np.random.default_rng(5).integers(0, 60, (3, 8))
    mask = np.ones((3, 8), int)
    for row, length in enumerate((8, 5, 1)):
        if side == "holes":
            mask[row, [1, 3, 6][: 8 - length]] = 0
        else:
            mask[row, length:] = 0
    if side == "left":
        mask = mask[:, ::-1].copy()
    types = np.random.default_rng(6).integers(0, 3, (3, 8))
    exact, bound = judged(model, input_ids=ids, attention_mask=mask, token_type_ids=types)
    found = encoder.forward_padded(ids, mask, types).to_numpy()
    kept = mask.astype(bool)
    assert np.abs(found - exact)[kept].max() <= bound
    assert not found[~kept].any()
    poisoned = np.where(kept, ids, 999)  # what lies under the padding is not looked at
    assert np.array_equal(encoder.forward_padded(poisoned, mask, types).to_numpy(), found)


@pytest.mark.clause("FM-BERT-8")
def test_padded_refusals(tiny: tuple[Any, BertEncoder]) -> None:
    encoder = tiny[1]
    with pytest.raises(ShapeError, match=r"\[B, T\]"):
        encoder.forward_padded([[1, 2]], [[1]])
    with pytest.raises(InvalidParameterError, match="mask"):
        encoder.forward_padded([[1, 2]], [[1, 2]])
    with pytest.raises(ModelError, match="at least one token"):
        encoder.forward_padded([[1, 2], [1, 2]], [[1, 1], [0, 0]])


REFUSED: dict[str, tuple[tuple[Any, ...], type[FerrumError], str]] = {
    "nothing": (([],), ModelError, "at least one token"),
    "an empty sequence": (([[1], []],), ModelError, r"lengths \[1, 0\]"),
    "an id too large": (([[1], [60]],), InvalidParameterError, r"token id must be in \[0, 60\), got 60"),
    "a negative id": (([[-1]],), InvalidParameterError, "got -1"),
    "a type too large": (([[1]], [[3]]), InvalidParameterError, "token type"),
    "too long": (([[1] * 21],), ResourceExhaustedError, "20 positions"),
    "types of another length": (([[1, 2]], [[0]]), ShapeError, "differ in length"),
}


@pytest.mark.clause("FM-BERT-6")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_computed(tiny: tuple[Any, BertEncoder], name: str) -> None:
    arguments, error, text = REFUSED[name]
    seen: list[str] = []
    with pytest.raises(error, match=text):
        tiny[1].forward(*arguments, observe=lambda step, _: seen.append(step))
    assert seen == []


@pytest.mark.clause("FM-BERT-3")
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_names_of_task_models(kind: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, model=kind).bert
    exact, bound = judged(model, input_ids=[BATCH[0]])
    (found,) = encoder_of(tmp_path).forward([BATCH[0]])
    assert np.abs(found.to_numpy() - exact[0]).max() <= bound


@pytest.mark.clause("FM-BERT-3")
def test_old_names_of_norms(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    make_tiny(tmp_path)
    (before,) = encoder_of(tmp_path).forward([BATCH[0]])
    path = tmp_path / "model.safetensors"
    tensors = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    tensors["bert.embeddings.position_ids"] = np.arange(20)[None]
    save_file(tensors, path)
    (after,) = encoder_of(tmp_path).forward([BATCH[0]])
    assert np.array_equal(before.to_numpy(), after.to_numpy())


@pytest.mark.clause("FM-BERT-4")
@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_half_precision(dtype: DataType, tmp_path: Path) -> None:
    import torch

    model = make_tiny(tmp_path)
    half = torch.float16 if dtype is DataType.FP16 else torch.bfloat16
    ids = torch.tensor([BATCH[2]])
    with torch.no_grad():
        rounded = model.to(half)  # the stored numbers, rounded once
        low = rounded(ids).last_hidden_state.double()[0].numpy()
        exact = rounded.double()(ids).last_hidden_state[0].numpy()
    (found,) = encoder_of(tmp_path, dtype=dtype).forward([BATCH[2]])
    assert found.dtype() is dtype
    assert np.abs(found.to_numpy().astype(np.float64) - exact).max() <= 4 * np.abs(low - exact).max()
    with pytest.raises(InvalidParameterError, match="INT8"):
        encoder_of(tmp_path, dtype=DataType.INT8)


@pytest.mark.clause("FM-BERT-5")
def test_any_backend_runs_it(tmp_path: Path) -> None:
    ferrum_torch = pytest.importorskip("ferrum_torch")
    model = make_tiny(tmp_path, hidden_act="quick_gelu")
    exact, bound = judged(model, input_ids=[BATCH[2]])
    (found,) = encoder_of(tmp_path, ferrum_torch.make_backend("cpu")).forward([BATCH[2]])
    assert np.abs(found.to_numpy() - exact[0]).max() <= bound


GOOD: dict[str, Any] = {**TINY, "model_type": "bert"}
BROKEN: dict[str, tuple[dict[str, Any], type[FerrumError], str]] = {
    "roberta": ({"model_type": "roberta"}, UnsupportedError, "model_type: got 'roberta'"),
    "relative positions": ({"position_embedding_type": "relative_key"}, UnsupportedError, "position_embedding_type"),
    "decoder": ({"is_decoder": True}, UnsupportedError, "is_decoder"),
    "cross-attention": ({"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
    "quantised": ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
    "activation": ({"hidden_act": "gelu_10"}, UnsupportedError, "hidden_act: got 'gelu_10'"),
    "no size": ({"hidden_size": None}, InvalidFormatError, "hidden_size: got None"),
    "odd heads": ({"num_attention_heads": 5}, InvalidFormatError, "multiple of the 5 heads"),
    "text": ({"vocab_size": "60"}, InvalidFormatError, "vocab_size: got '60'"),
    "bool": ({"num_hidden_layers": True}, InvalidFormatError, "num_layers|num_hidden_layers"),
    "huge": ({"intermediate_size": 2**31}, InvalidFormatError, "intermediate_size"),
    "eps": ({"layer_norm_eps": 0}, InvalidFormatError, "layer_norm_eps: got 0"),
    "infinite eps": ({"layer_norm_eps": 10**400}, InvalidFormatError, "layer_norm_eps"),
}


@pytest.mark.clause("FM-BERT-1", "FM-BERT-2")
@pytest.mark.parametrize("name", BROKEN)
def test_configurations_that_are_refused(name: str) -> None:
    changes, error, text = BROKEN[name]
    with pytest.raises(error, match=text) as caught:
        BertConfig.from_hf({**GOOD, **changes}, "here.json")
    assert "here.json" in str(caught.value)


@pytest.mark.clause("FM-BERT-2")
def test_configuration_defaults() -> None:
    given = {name: value for name, value in GOOD.items() if name != "type_vocab_size"}
    config = BertConfig.from_hf(given)
    assert (config.type_vocab_size, config.layer_norm_eps, config.hidden_act) == (2, 1e-12, "gelu")
    assert BertConfig.from_hf({**GOOD, "position_embedding_type": "absolute", "is_decoder": False}).num_layers == 3


@pytest.mark.model
@pytest.mark.clause("FM-BERT-5", "FM-BERT-8")
def test_minilm(minilm_path: Path) -> None:
    from transformers import BertModel

    model, encoder = BertModel.from_pretrained(minilm_path).eval(), encoder_of(minilm_path)
    ids = np.random.default_rng(0).integers(1000, 30000, (3, 40))
    mask = np.arange(40) < np.array([[40], [17], [3]])
    exact, bound = judged(model, input_ids=ids, attention_mask=mask.astype(int))
    found = encoder.forward_padded(ids, mask.astype(int)).to_numpy()
    assert np.abs(found - exact)[mask].max() <= bound
