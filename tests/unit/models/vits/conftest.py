"""Small random VITS voices: as transformers writes them, as Piper exports them, and judged in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 3,
    "ffn_dim": 40,
    "ffn_kernel_size": 3,
    "flow_size": 12,
    "spectrogram_bins": 9,
    "upsample_initial_channel": 16,
    "upsample_rates": [4, 3],
    "upsample_kernel_sizes": [8, 5],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "depth_separable_num_layers": 2,
    "duration_predictor_flow_bins": 6,
    "duration_predictor_num_flows": 3,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 3,
    "posterior_encoder_num_wavenet_layers": 1,
    "wavenet_dilation_rate": 2,
    "sampling_rate": 8000,
}
LETTERS = {letter: index for index, letter in enumerate("_ abcdefghijklmnop'-")}


def make_model(seed: int = 0, **changes: Any) -> Any:
    """A random VitsModel whose samples stay well inside (-1, 1)."""
    torch.manual_seed(seed)
    model = transformers.VitsModel(transformers.VitsConfig(**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():
        scale = 0.15 if name.startswith("decoder") else 0.3
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, scale)
    return model


def write_directory(directory: Path, model: Any) -> Path:
    """As a Hugging Face directory with 20 letters."""
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(LETTERS))
    (directory / "tokenizer_config.json").write_text(json.dumps({"phonemize": False}))
    return directory


class FixedNoise:
    """The same draws for the same shape, for us and for transformers."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.random.default_rng([self.seed, *shape]).standard_normal(shape)

    @contextmanager
    def in_torch(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape: torch.from_numpy(self(shape[-2:]))[None])
            patch.setattr(
                torch, "randn_like", lambda x: torch.from_numpy(self(tuple(x.shape[-2:])))[None].to(x.dtype)
            )  # fmt: skip
            yield


class Judge:
    """transformers in float32 and float64."""

    def __init__(self, model: Any) -> None:
        self.single = model
        self.double = copy.deepcopy(model).double()

    def waveform(self, ids: list[int], noise: FixedNoise, **options: Any) -> tuple[NDArray[Any], float]:
        """(float64 samples, four times float32's error)."""
        found = []
        with torch.no_grad(), noise.in_torch():
            for model in (self.single, self.double):
                found.append(model(torch.tensor([ids]), **options).waveform[0].double().numpy())
        single, double = found
        return double, 4 * float(np.abs(single - double).max())


def second_kind(model: Any) -> Any:
    """transformers' vocoder with residual blocks of HiFi-GAN's second kind: no undilated followers."""

    def forward(block: Any, hidden: Any) -> Any:
        for convolution in block.convs1:
            hidden = hidden + convolution(torch.nn.functional.leaky_relu(hidden, block.leaky_relu_slope))
        return hidden

    for block in model.decoder.resblocks:
        block.forward = forward.__get__(block)
    return model


def piper_bytes(model: Any, paired: bool, rename_folded: bool = True) -> bytes:
    """The graph's nodes and initialisers as Piper's exporter names them; the graph itself could not be run."""
    state = {name: values.detach().double().numpy() for name, values in model.state_dict().items()}
    config = model.config
    initialisers: dict[str, NDArray[Any]] = {}
    nodes = []

    def convolution(path: str, part: str, *, kind: str = "Conv", has_bias: bool = True, **attributes: Any) -> None:
        weight = _weight(state, part)
        if weight.ndim == 2:
            weight = weight[:, :, None]
        folded = rename_folded and f"{part}.parametrizations.weight.original0" in state
        name = f"onnx::Conv_{1000 + 3 * len(nodes)}" if folded else path.replace("/", ".") + ".weight"
        inputs = ["x", name]
        initialisers[name] = weight.astype(np.float32)
        if has_bias:
            inputs.append(path.replace("/", ".") + ".bias")
            initialisers[inputs[2]] = state[f"{part}.bias"].astype(np.float32)
        numbers = {"dilations": [1], "strides": [1], "kernel_shape": [weight.shape[2]], **attributes}
        nodes.append(helper.make_node(kind, inputs, [f"o{len(nodes)}"], name=f"/{path}/{kind}", **numbers))

    def norm(name: str, part: str) -> None:
        for ours, theirs in (("gamma", "weight"), ("beta", "bias")):
            initialisers[f"{name}.{ours}"] = state[f"{part}.{theirs}"].astype(np.float32)

    def stack(path: str, part: str) -> None:
        for index in range(config.depth_separable_num_layers):
            convolution(f"{path}/convs_sep.{index}", f"{part}.convs_dilated.{index}", dilations=[3**index])
            convolution(f"{path}/convs_1x1.{index}", f"{part}.convs_pointwise.{index}")
            for each in (1, 2):
                norm(f"{path.replace('/', '.')}.norms_{each}.{index}", f"{part}.norms_{each}.{index}")

    initialisers["odd name"] = state["text_encoder.embed_tokens.weight"].astype(np.float32)
    nodes.append(helper.make_node("Gather", ["odd name", "input"], ["h"], name="/enc_p/emb/Gather"))
    for index in range(config.num_hidden_layers):
        layer = f"text_encoder.encoder.layers.{index}"
        for theirs in ("q", "k", "v", "out"):
            convolution(
                f"enc_p/encoder/attn_layers.{index}/conv_{theirs[0]}", f"{layer}.attention.{theirs}_proj"
            )  # fmt: skip
        for each in ("emb_rel_k", "emb_rel_v"):
            name = f"enc_p.encoder.attn_layers.{index}.{each}"
            initialisers[name] = state[f"{layer}.attention.{each}"].astype(np.float32)
        for each in ("conv_1", "conv_2"):
            convolution(f"enc_p/encoder/ffn_layers.{index}/{each}", f"{layer}.feed_forward.{each}")
        norm(f"enc_p.encoder.norm_layers_1.{index}", f"{layer}.layer_norm")
        norm(f"enc_p.encoder.norm_layers_2.{index}", f"{layer}.final_layer_norm")
    convolution("enc_p/proj", "text_encoder.project")
    convolution("dp/pre", "duration_predictor.conv_pre")
    convolution("dp/proj", "duration_predictor.conv_proj")
    stack("dp/convs", "duration_predictor.conv_dds")
    initialisers["dp.flows.0.m"] = state["duration_predictor.flows.0.translate"].astype(np.float32)
    scale = np.exp(-state["duration_predictor.flows.0.log_scale"])
    initialisers["/dp/flows.0/Exp_output_0"] = scale.astype(np.float32)
    for index in range(2, config.duration_predictor_num_flows + 1):
        path, part = f"dp/flows.{2 * index - 1}", f"duration_predictor.flows.{index}"
        convolution(f"{path}/pre", f"{part}.conv_pre")
        convolution(f"{path}/proj", f"{part}.conv_proj")
        stack(f"{path}/convs", f"{part}.conv_dds")
    for index in range(config.prior_encoder_num_flows):
        path, part = f"flow/flows.{2 * index}", f"flow.flows.{index}"
        convolution(f"{path}/pre", f"{part}.conv_pre")
        convolution(f"{path}/post", f"{part}.conv_post")
        for layer in range(config.prior_encoder_num_wavenet_layers):
            inner = f"{part}.wavenet.in_layers.{layer}"
            convolution(f"{path}/enc/in_layers.{layer}", inner, dilations=[config.wavenet_dilation_rate**layer])
            convolution(f"{path}/enc/res_skip_layers.{layer}", f"{part}.wavenet.res_skip_layers.{layer}")
    convolution("dec/conv_pre", "decoder.conv_pre")
    convolution("dec/conv_post", "decoder.conv_post", has_bias=False)
    for index, rate in enumerate(config.upsample_rates):
        convolution(f"dec/ups.{index}", f"decoder.upsampler.{index}", kind="ConvTranspose", strides=[rate])
        count = len(config.resblock_kernel_sizes)
        for block, dilations in enumerate(config.resblock_dilation_sizes, index * count):
            for each, dilation in enumerate(dilations):
                part = f"decoder.resblocks.{block}"
                convolution(
                    f"dec/resblocks.{block}/{'convs1' if paired else 'convs'}.{each}", f"{part}.convs1.{each}",
                    dilations=[dilation],
                )  # fmt: skip
                if paired:
                    convolution(f"dec/resblocks.{block}/convs2.{each}", f"{part}.convs2.{each}")
    graph = helper.make_graph(
        nodes,
        "voice",
        [helper.make_tensor_value_info("input", TensorProto.INT64, [1, None])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in initialisers.items()],
    )
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


def _weight(state: dict[str, NDArray[Any]], part: str) -> NDArray[Any]:
    if f"{part}.weight" in state:
        return state[f"{part}.weight"]
    g, v = (state[f"{part}.parametrizations.weight.original{index}"] for index in (0, 1))
    return np.asarray(g * v / np.linalg.norm(v.reshape(len(v), -1), axis=1)[:, None, None])


VOICE: dict[str, Any] = {
    "audio": {"sample_rate": 8000},
    "espeak": {"voice": "en-us"},
    "inference": {"noise_scale": 0.667, "length_scale": 1, "noise_w": 0.8},
    "phoneme_type": "espeak",
    "phoneme_id_map": {letter: [index] for letter, index in LETTERS.items()} | {"^": [1], "$": [2]},
    "num_speakers": 1,
}


def write_piper(directory: Path, model: Any, paired: bool = True) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "voice.onnx").write_bytes(piper_bytes(model, paired))
    (directory / "voice.onnx.json").write_text(json.dumps(VOICE))
    return directory


@pytest.fixture(scope="session")
def tiny_voice() -> Any:
    """A random model; not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def voice_directory(tiny_voice: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("vits"), tiny_voice)


@pytest.fixture(scope="session")
def piper_directory(tiny_voice: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_piper(tmp_path_factory.mktemp("piper"), tiny_voice)


@pytest.fixture(scope="session")
def voice_judge(tiny_voice: Any) -> Judge:
    return Judge(tiny_voice)


@pytest.fixture
def new_voice() -> Callable[..., Any]:
    return make_model


@pytest.fixture
def save_voice() -> Callable[..., Path]:
    return write_directory


@pytest.fixture
def save_piper() -> Callable[..., Path]:
    return write_piper


@pytest.fixture
def without_followers() -> Callable[[Any], Any]:
    return second_kind


@pytest.fixture
def fixed_noise() -> Callable[..., FixedNoise]:
    return FixedNoise


@pytest.fixture
def piper_voice() -> dict[str, Any]:
    return copy.deepcopy(VOICE)


@pytest.fixture(scope="session")
def piper_content(tiny_voice: Any) -> bytes:
    return piper_bytes(tiny_voice, True)


@pytest.fixture(scope="session")
def joe_path() -> Path:
    """The real Piper voice en_US-joe-medium; fetched into the user's cache on first use."""
    import argparse

    from ferrum_ref.cli.cache import cache_dir
    from ferrum_ref.models.source import pull_model

    return pull_model("piper-joe", cache_dir(argparse.Namespace(cache_dir=None)))
