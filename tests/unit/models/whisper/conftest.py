"""Small random Whisper models: as transformers writes them, as CTranslate2 does, and judged in float64."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

END, START, NO_TIMES, NUM_TIMES = 60, 61, 69, 30
SPECIAL = {
    "<|endoftext|>": END,
    "<|startoftranscript|>": START,
    "<|en|>": 62,
    "<|de|>": 63,
    "<|translate|>": 64,
    "<|transcribe|>": 65,
    "<|startoflm|>": 66,
    "<|startofprev|>": 67,
    "<|nospeech|>": 68,
    "<|notimestamps|>": NO_TIMES,
}
VOCAB = NO_TIMES + 1 + NUM_TIMES
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_mel_bins": 8,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 56,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
GENERATION: dict[str, Any] = {
    "suppress_tokens": [1, 2, 64, 66, 67, 68, START, 65],
    "begin_suppress_tokens": [3, END],
}


def make_model(seed: int = 0, **changes: Any) -> Any:
    """A random WhisperForConditionalGeneration with weights that matter."""
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def write_directory(directory: Path, model: Any) -> Path:
    """As a Hugging Face directory, with a tokenizer of 60 words."""
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    added = [
        {"id": number, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for text, number in SPECIAL.items()
    ]  # fmt: skip
    vocabulary = {f"word{index}": index for index in range(END)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


class Judge:
    """transformers in float32 and float64."""

    def __init__(self, model: Any) -> None:
        self.single = model
        self.double = copy.deepcopy(model).double()

    def run(self, features: NDArray[Any], ids: list[int]) -> dict[str, tuple[NDArray[Any], float]]:
        """(float64 values, four times float32's error) of the encoded rows and of all logits."""
        found: dict[str, list[NDArray[Any]]] = {"encoded": [], "logits": []}
        with torch.no_grad():
            for model, kind in ((self.single, torch.float32), (self.double, torch.float64)):
                picture = torch.from_numpy(features)[None].to(kind)
                out = model(input_features=picture, decoder_input_ids=torch.tensor([ids]))
                found["encoded"].append(out.encoder_last_hidden_state[0].double().numpy())
                found["logits"].append(out.logits[0].double().numpy())
        return {name: (double, 4 * float(np.abs(single - double).max())) for name, (single, double) in found.items()}


def ct2_bytes(
    variables: Mapping[str, NDArray[Any]], aliases: Mapping[str, str] | None = None, kind: str = "WhisperSpec",
    version: int = 6,
) -> bytes:  # fmt: skip
    """model.bin by the format's description."""
    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}

    def text(value: str) -> bytes:
        data = value.encode() + b"\0"
        return struct.pack("<H", len(data)) + data

    out = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        out += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        out += struct.pack("<BI", codes[str(values.dtype)], values.nbytes) + values.tobytes()
    aliases = aliases or {}
    out += struct.pack("<I", len(aliases))
    return out + b"".join(text(alias) + text(name) for alias, name in aliases.items())


def ct2_variables(model: Any, kind: str = "float16") -> dict[str, NDArray[Any]]:
    """What CTranslate2's converter makes of a transformers model."""
    state = {name.removeprefix("model."): values.numpy().astype(kind) for name, values in model.state_dict().items()}
    config = model.config
    found: dict[str, NDArray[Any]] = {
        "decoder/activation": np.array(3, np.int8),
        "decoder/alibi": np.array(0, np.int8),
        "decoder/alignment_heads": np.array([[0, 1]], np.int16),
        "decoder/pre_norm": np.array(1, np.int8),
        "decoder/num_heads": np.array(config.decoder_attention_heads, np.int16),
        "encoder/num_heads": np.array(config.encoder_attention_heads, np.int16),
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }
    for half, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        found[f"{half}/position_encodings/encodings"] = state[f"{half}.embed_positions.weight"]
        _norm(found, f"{half}/layer_norm", state, f"{half}.layer_norm")
        for index in range(count):
            old, new = f"{half}.layers.{index}", f"{half}/layer_{index}"
            _fused(found, f"{new}/self_attention/linear_0", state, [f"{old}.self_attn.{each}_proj" for each in "qkv"])
            _fused(found, f"{new}/self_attention/linear_1", state, [f"{old}.self_attn.out_proj"])
            _norm(found, f"{new}/self_attention/layer_norm", state, f"{old}.self_attn_layer_norm")
            if half == "decoder":
                inner = f"{old}.encoder_attn"
                _fused(found, f"{new}/attention/linear_0", state, [f"{inner}.q_proj"])
                _fused(found, f"{new}/attention/linear_1", state, [f"{inner}.k_proj", f"{inner}.v_proj"])
                _fused(found, f"{new}/attention/linear_2", state, [f"{inner}.out_proj"])
                _norm(found, f"{new}/attention/layer_norm", state, f"{inner}_layer_norm")
            _fused(found, f"{new}/ffn/linear_0", state, [f"{old}.fc1"])
            _fused(found, f"{new}/ffn/linear_1", state, [f"{old}.fc2"])
            _norm(found, f"{new}/ffn/layer_norm", state, f"{old}.final_layer_norm")
    for name in ("conv1", "conv2"):
        for kind_of in ("weight", "bias"):
            found[f"encoder/{name}/{kind_of}"] = state[f"encoder.{name}.{kind_of}"]
    return found


def _norm(found: dict[str, NDArray[Any]], name: str, state: Mapping[str, NDArray[Any]], old: str) -> None:
    found[f"{name}/gamma"], found[f"{name}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]


def _fused(found: dict[str, NDArray[Any]], name: str, state: Mapping[str, NDArray[Any]], parts: list[str]) -> None:
    found[f"{name}/weight"] = np.concatenate([state[f"{part}.weight"] for part in parts])
    zeros = np.zeros(found[f"{name}/weight"].shape[0] // len(parts), found[f"{name}/weight"].dtype)
    found[f"{name}/bias"] = np.concatenate([state.get(f"{part}.bias", zeros) for part in parts])


def write_ct2(directory: Path, model: Any, kind: str = "float16") -> Path:
    """As a CTranslate2 directory."""
    directory.mkdir(exist_ok=True)
    content = ct2_bytes(ct2_variables(model, kind), {"decoder/projection/weight": "decoder/embeddings/weight"})
    (directory / "model.bin").write_bytes(content)
    settings = {
        "suppress_ids": GENERATION["suppress_tokens"],
        "suppress_ids_begin": GENERATION["begin_suppress_tokens"],
    }
    (directory / "config.json").write_text(json.dumps(settings))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A random model; not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def whisper_directory(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("whisper"), tiny_model)


@pytest.fixture(scope="session")
def ct2_directory(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct2(tmp_path_factory.mktemp("ct2"), tiny_model)


@pytest.fixture(scope="session")
def judge(tiny_model: Any) -> Judge:
    return Judge(tiny_model)


@pytest.fixture
def make_ct2() -> Callable[..., bytes]:
    """make_ct2(variables, aliases) -> the bytes of a model.bin."""
    return ct2_bytes


@pytest.fixture
def ct2_of() -> Callable[..., dict[str, NDArray[Any]]]:
    return ct2_variables


@pytest.fixture
def new_whisper() -> Callable[..., Any]:
    return make_model


@pytest.fixture
def save_whisper() -> Callable[..., Path]:
    return write_directory
