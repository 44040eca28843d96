"""LLaVA against transformers' LlavaForConditionalGeneration, judged by its float64 run, on random tiny checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ferrum_ref.errors import (
    AlreadyExistsError,
    FerrumError,
    InvalidFormatError,
    InvalidParameterError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    ShapeError,
    UnsupportedError,
)
from ferrum_ref.families import load_multimodal
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.multimodal_config import MultimodalConfig
from ferrum_ref.models.multimodal_llm import LlavaLlm
from ferrum_ref.models.multimodal_weights import canonical_multimodal_name
from ferrum_ref.models.vision_config import PixelScaling, VisionConfig

IMAGE, SIDE, ROWS = 49, 13, 9  # placeholder, pixels of a side, rows of a picture: 13 // 4 squared
MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
STD = np.array((0.26862954, 0.26130258, 0.27577711))
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_llava(directory: Path, seed: int = 0, text: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A random transformers model, saved to `directory`."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**{**VISION, **changes.pop("vision", {})})
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**{**TEXT, **(text or {})}), image_token_index=IMAGE, **changes
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(directory)
    return model


def doubled(model: Any) -> Any:
    """float64 throughout: transformers' RMSNorm rounds to float32 by itself."""
    import torch

    class DoubleNorm(torch.nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    model = model.double()
    language = model.model.language_model
    language.norm = DoubleNorm(language.norm)
    for layer in language.layers:
        layer.input_layernorm = DoubleNorm(layer.input_layernorm)
        layer.post_attention_layernorm = DoubleNorm(layer.post_attention_layernorm)
    return model


class Judge:
    """transformers' logits and visual rows in both precisions."""

    def __init__(self, model: Any) -> None:
        import copy

        self.single, self.double = model, doubled(copy.deepcopy(model))

    def logits(self, ids: list[int], pictures: list[NDArray[np.uint8]]) -> tuple[NDArray[Any], float]:
        """(float64 logits [T, V], four times float32's error)."""
        import torch

        found = []
        with torch.no_grad():
            for model, kind in ((self.single, torch.float32), (self.double, torch.float64)):
                values = {} if not pictures else {"pixel_values": pixel_values(pictures).to(kind)}
                found.append(model(input_ids=torch.tensor([ids]), **values).logits[0].numpy())
        return found[1], 4 * float(np.abs(found[0] - found[1]).max())

    def rows(self, picture: NDArray[np.uint8]) -> tuple[NDArray[Any], float]:
        """(float64 visual rows, four times float32's error)."""
        import torch

        found = []
        with torch.no_grad():
            for model, kind in ((self.single, torch.float32), (self.double, torch.float64)):
                layer = model.config.vision_feature_layer
                values = pixel_values([picture]).to(kind)
                found.append(model.get_image_features(values, vision_feature_layer=layer).pooler_output[0].numpy())
        return found[1], 4 * float(np.abs(found[0] - found[1]).max())


def pixel_values(pictures: list[NDArray[np.uint8]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([((each / 255 - MEAN) / STD).transpose(2, 0, 1) for each in pictures]))


def picture(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def judge(directory: Path) -> Judge:
    return Judge(make_llava(directory, image_seq_length=ROWS))


@pytest.fixture
def llm(directory: Path, judge: Judge) -> LlavaLlm[Any]:
    return load_multimodal(directory).new_llm()


PROMPT = [1, 5, *[IMAGE] * ROWS, 7, 8, 9]


@pytest.mark.clause("FM-IMAGE-4", "FM-LLAVA-1", "FM-LOAD-2")
def test_a_prompt_with_a_picture(judge: Judge, llm: LlavaLlm[Any]) -> None:
    exact, bound = judge.logits([*PROMPT, 11, 12], [picture(1)])
    visual = llm.encode_image(picture(1).tobytes())
    assert np.abs(llm.prefill_with_images("a", PROMPT, [visual]) - exact[len(PROMPT) - 1]).max() <= bound
    for pos, token in ((14, 11), (15, 12)):
        assert np.abs(llm.decode("a", token, pos) - exact[pos]).max() <= bound


@pytest.mark.clause("FM-IMAGE-4")
def test_two_pictures_in_order_and_pieces(judge: Judge, llm: LlavaLlm[Any]) -> None:
    ids = [*[IMAGE] * ROWS, 3, *[IMAGE] * 4, 4, *[IMAGE] * 5]
    exact, bound = judge.logits(ids, [picture(2), picture(3)])
    one, two = (llm.encode_image(picture(seed).tobytes()) for seed in (2, 3))
    assert np.abs(llm.prefill_with_images("a", ids, [one, two]) - exact[-1]).max() <= bound
    swapped = llm.prefill_with_images("b", ids, [two, one])
    assert np.abs(swapped - exact[-1]).max() > 100 * bound
    whole = np.concatenate([one, two])  # rows laid end to end count, not how they are packed
    halves = [whole[: 16 * 5], whole[16 * 5 :]]
    assert np.abs(llm.prefill_with_images("c", ids, halves) - exact[-1]).max() <= bound


@pytest.mark.clause("FM-IMAGE-3", "FM-IMAGE-1", "FM-VISION-4")
def test_visual_rows(judge: Judge, llm: LlavaLlm[Any]) -> None:
    exact, bound = judge.rows(picture(4))
    found = llm.encode_image(picture(4).tobytes())
    assert (found.dtype, found.shape) == (np.float32, (ROWS * 16,))
    assert np.abs(found.reshape(ROWS, 16) - exact).max() <= bound
    assert np.array_equal(llm.encode_image(picture(4).tobytes()), found)
    assert llm.cache_metrics_snapshot() == {"num_caches": 0, "num_tokens": 0, "size_bytes": 0}
    seen = picture(4)
    seen[12:] = 0  # the thirteenth row and column belong to no patch
    seen[:, 12:] = 0
    assert np.array_equal(llm.encode_image(seen.tobytes()), found)


@pytest.mark.clause("FM-AUDIO-1")
def test_it_has_no_ears(llm: LlavaLlm[Any]) -> None:
    assert llm.encode_audio(np.ones(8, np.float32)).shape == (0,)


VARIANTS: dict[str, dict[str, Any]] = {
    "class row": {"vision_feature_select_strategy": "full"},
    "last layer": {"vision_feature_layer": -1},
    "first layer": {"vision_feature_layer": 1},
    "two layers": {"vision_feature_layer": [-2, -1]},
    "no projector bias": {"multimodal_projector_bias": False, "projector_hidden_act": "gelu_new"},
    "one huge patch": {"vision": {"patch_size": 13, "hidden_act": "gelu", "layer_norm_eps": 0.1}},
    "tied": {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True}},
}


@pytest.mark.clause("FM-LLAVA-1", "FM-LLAVA-2", "FM-LLAVA-3", "FM-IMAGE-4", "FM-VISION-4", "FM-VISION-5")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    changes = json.loads(json.dumps(VARIANTS[name]))
    judge = Judge(make_llava(tmp_path, 5, **changes))
    llm = load_multimodal(tmp_path).new_llm()
    rows, bound = judge.rows(picture(6))
    assert llm.num_visual_tokens == len(rows)
    visual = llm.encode_image(picture(6).tobytes())
    assert np.abs(visual.reshape(rows.shape) - rows).max() <= bound
    ids = [3, *[IMAGE] * len(rows), 4]
    exact, bound = judge.logits(ids, [picture(6)])
    assert np.abs(llm.prefill_with_images("a", ids, [visual]) - exact[-1]).max() <= bound


@pytest.mark.clause("FM-LLAVA-3")
@pytest.mark.parametrize("spelling", ["4.0", "4.52", "tied"])
def test_spellings_of_tensor_names(spelling: str, tmp_path: Path, directory: Path, judge: Judge) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = {}
    for name, value in load_file(directory / "model.safetensors").items():
        if spelling == "4.0":
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        else:
            name = "model." + name
            name = name.replace("model.language_model.model.", "model.language_model.")
            name = name.replace("model.language_model.lm_head", "lm_head")
        tensors[name] = value
    tensors[
        "model.vision_tower.embeddings.position_ids"
        if spelling != "4.0"
        else "vision_tower.vision_model.embeddings.position_ids"
    ] = np.arange(10)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    if spelling == "tied":
        rename = canonical_multimodal_name(MultimodalConfig.from_hf(CONFIG | {"tie_word_embeddings": True}).text)
        assert rename("lm_head.weight") is None
        assert rename("language_model.lm_head.weight") is None
    exact, bound = judge.logits(PROMPT, [picture(1)])
    llm = load_multimodal(tmp_path).new_llm()
    visual = llm.encode_image(picture(1).tobytes())
    assert np.abs(llm.prefill_with_images("a", PROMPT, [visual]) - exact[-1]).max() <= bound


Call = tuple[Callable[[LlavaLlm[Any], NDArray[Any]], Any], type[FerrumError], str]
REFUSED: dict[str, Call] = {
    "no picture": (lambda m, v: m.prefill("x", PROMPT), ModelError, "9 image placeholders .* for 0 visual rows"),
    "no placeholder": (lambda m, v: m.prefill_with_images("x", [1], [v]), ModelError, "0 image placeholders"),
    "one too few": (lambda m, v: m.prefill_with_images("x", PROMPT[:10], [v]), ModelError, "8 image placeholders"),
    "not whole rows": (lambda m, v: m.prefill_with_images("x", PROMPT, [v[:-1]]), ModelError, "rows of 16"),
    "not flat": (lambda m, v: m.prefill_with_images("x", PROMPT, [v.reshape(9, 16)]), ModelError, "rows of 16"),
    "live id": (lambda m, v: m.prefill_with_images("a", PROMPT, [v]), AlreadyExistsError, "live"),
    "empty": (lambda m, v: m.prefill_with_images("x", [], []), ModelError, "empty"),
    "unknown token": (lambda m, v: m.prefill_with_images("x", [*PROMPT, 50], [v]), InvalidParameterError, "50"),
    "too long": (lambda m, v: m.prefill_with_images("x", [*PROMPT, *[1] * 60], [v]), ResourceExhaustedError, "64"),
    "short picture": (lambda m, v: m.encode_image(bytes(13 * 13 * 3 - 1)), ModelError, "506 bytes, expected 507"),
    "long picture": (lambda m, v: m.encode_image(bytes(13 * 13 * 4)), ModelError, "676 bytes, expected 507"),
}


@pytest.mark.clause("FM-IMAGE-1", "FM-IMAGE-5")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_changes_nothing(llm: LlavaLlm[Any], name: str) -> None:
    call, error, text = REFUSED[name]
    visual = llm.encode_image(picture(1).tobytes())
    llm.prefill("a", [1, 2])
    before = llm.cache_metrics_snapshot()
    with pytest.raises(error, match=text):
        call(llm, visual)
    assert llm.cache_metrics_snapshot() == before
    with pytest.raises(NotFoundError):
        llm.cache_length("x")


@pytest.mark.clause("FM-IMAGE-6", "FM-IMAGE-5")
def test_a_drawn_placeholder_is_an_ordinary_token(judge: Judge, llm: LlavaLlm[Any]) -> None:
    exact, bound = judge.logits([1, 2, IMAGE, 3, IMAGE], [])
    llm.prefill("a", [1, 2])
    assert np.abs(llm.decode("a", IMAGE, 2) - exact[2]).max() <= bound
    rows = llm.forward_verify("a", [3, IMAGE]).reshape(2, 50)
    assert np.abs(rows - exact[3:]).max() <= bound
    (row,) = llm.unified_forward([("b", [1, 2, IMAGE], 0, True)])
    assert row is not None
    assert np.abs(row - exact[2]).max() <= bound


@pytest.mark.clause("FM-IMAGE-4")
def test_prompts_without_pictures_are_the_decoders(judge: Judge, llm: LlavaLlm[Any]) -> None:
    exact, bound = judge.logits([5, 6, 7], [])
    assert np.abs(llm.prefill("a", [5, 6, 7]) - exact[-1]).max() <= bound


@pytest.mark.clause("LM-FORWARD-6")
def test_inputs_stand_for_the_embedding(llm: LlavaLlm[Any]) -> None:
    decoder = llm.decoder
    batch = ForwardBatch.build([[1, 2, 3]], [0])

    def run(**inputs: Any) -> NDArray[Any]:
        cache = llm._factory.new_cache()
        return np.asarray(decoder.forward(batch, llm._factory.bind([cache], [3]), **inputs).to_numpy())

    plain = run()
    assert np.array_equal(run(inputs=decoder.embed(batch.token_ids)), plain)
    assert not np.array_equal(run(inputs=decoder.embed(np.array([1, 4, 3]))), plain)
    with pytest.raises(ShapeError, match=r"expected \(3, 16\)"):
        run(inputs=decoder.embed(np.array([1, 2])))


@pytest.mark.clause("FM-IMAGE-4", "FM-VISION-4")
def test_any_backend_runs_it(directory: Path, judge: Judge) -> None:
    ferrum_torch = pytest.importorskip("ferrum_torch")
    llm = load_multimodal(directory, ferrum_torch.make_backend("cpu")).new_llm()
    exact, bound = judge.logits(PROMPT, [picture(1)])
    visual = llm.encode_image(picture(1).tobytes())
    assert np.abs(llm.prefill_with_images("a", PROMPT, [visual]) - exact[-1]).max() <= bound


CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "vision_config": {"model_type": "clip_vision_model", **VISION},
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-6, **TEXT},
}


@pytest.mark.clause("FM-LLAVA-2", "FM-VISION-2")
def test_what_configurations_leave_out() -> None:
    config = MultimodalConfig.from_hf(
        {
            "model_type": "llava",
            "vision_config": {"model_type": "clip_vision_model"},
            "text_config": {"vocab_size": 32064},
        }
    )
    text, vision = config.text, config.vision
    assert (text.hidden_size, text.num_layers, text.num_kv_heads, text.vocab_size) == (4096, 32, 32, 32064)
    assert (text.intermediate_size, text.max_position_embeddings, text.rms_norm_eps) == (11008, 2048, 1e-6)
    assert vision == VisionConfig()
    assert (vision.hidden_size, vision.num_layers, vision.patch_size, vision.hidden_act) == (768, 12, 32, "quick_gelu")
    assert (config.feature_layers, config.image_token_id, config.projector_act) == ((11,), 32000, "gelu")
    assert config.num_visual_tokens == 49
    assert not text.tie_word_embeddings
    tied = MultimodalConfig.from_hf({**CONFIG, "tie_word_embeddings": True})
    assert tied.text.tie_word_embeddings


BROKEN: dict[str, tuple[dict[str, Any], type[FerrumError], str]] = {
    "another model": ({"model_type": "llava_next"}, UnsupportedError, "model_type: got 'llava_next'"),
    "no tower": ({"vision_config": None}, InvalidFormatError, "vision_config: got None"),
    "another tower": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        UnsupportedError,
        "vision_config: model_type",
    ),
    "tower act": ({"vision_config": {**CONFIG["vision_config"], "hidden_act": "x"}}, UnsupportedError, "hidden_act"),
    "grey": ({"vision_config": {**CONFIG["vision_config"], "num_channels": 1}}, UnsupportedError, "num_channels"),
    "patch": ({"vision_config": {**CONFIG["vision_config"], "patch_size": 14}}, InvalidFormatError, "patch_size"),
    "heads": (
        {"vision_config": {**CONFIG["vision_config"], "num_attention_heads": 5}},
        InvalidFormatError,
        "multiple of the 5 heads",
    ),
    "tower eps": (
        {"vision_config": {**CONFIG["vision_config"], "layer_norm_eps": "0"}},
        InvalidFormatError,
        "layer_norm_eps",
    ),
    "no decoder": ({"text_config": []}, InvalidFormatError, "text_config"),
    "another decoder": (
        {"text_config": {**CONFIG["text_config"], "model_type": "gpt2"}},
        UnsupportedError,
        "text_config: model_type",
    ),
    "placeholder": ({"image_token_index": 50}, InvalidFormatError, "image_token_index: got 50"),
    "layer": ({"vision_feature_layer": 4}, InvalidFormatError, "vision_feature_layer: got 4"),
    "no layer": ({"vision_feature_layer": []}, InvalidFormatError, "vision_feature_layer"),
    "layer text": ({"vision_feature_layer": "-2"}, InvalidFormatError, "vision_feature_layer"),
    "strategy": ({"vision_feature_select_strategy": "cls"}, InvalidFormatError, "strategy"),
    "act": ({"projector_hidden_act": "mish"}, UnsupportedError, "projector_hidden_act"),
    "bias": ({"multimodal_projector_bias": 1}, InvalidFormatError, "multimodal_projector_bias"),
}


@pytest.mark.clause("FM-LLAVA-2", "FM-VISION-1", "FM-VISION-2")
@pytest.mark.parametrize("name", BROKEN)
def test_configurations_that_are_refused(name: str) -> None:
    changes, error, text = BROKEN[name]
    with pytest.raises(error, match=text) as caught:
        MultimodalConfig.from_hf({**CONFIG, **changes}, "here.json")
    assert "here.json" in str(caught.value)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["gelu", "", "-2"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "model_type"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.clause("FM-LLAVA-2", "FM-VISION-2", "FM-BERT-2")
@given(st.data())
def test_any_json_is_a_configuration_or_a_named_error(data: st.DataObject) -> None:
    def changed(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, **data.draw(st.dictionaries(st.sampled_from(sorted(config)), JSON_VALUES, max_size=3))}

    llava = changed(
        {**CONFIG, "vision_feature_layer": -2, "projector_hidden_act": "gelu", "tie_word_embeddings": False}
    )
    for part in ("vision_config", "text_config"):
        if isinstance(llava[part], dict) and llava[part] and data.draw(st.booleans()):
            llava[part] = changed(llava[part])
    bert = changed({**TEXT, "model_type": "bert", "layer_norm_eps": 1e-5, "hidden_act": "gelu", "type_vocab_size": 2})
    for read, given_config in ((MultimodalConfig.from_hf, llava), (BertConfig.from_hf, bert)):
        with contextlib.suppress(InvalidFormatError, UnsupportedError):
            read(given_config, "here.json")


@pytest.mark.clause("FM-IMAGE-2")
def test_pixels_are_scaled_as_the_files_say(tmp_path: Path, directory: Path, judge: Judge) -> None:
    assert PixelScaling.from_directory(tmp_path) == PixelScaling(1 / 255, tuple(MEAN.tolist()), tuple(STD.tolist()))
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}}))
    assert PixelScaling.from_directory(tmp_path) == PixelScaling(1 / 255, (0.5,) * 3, (0.25,) * 3)
    path = tmp_path / "preprocessor_config.json"  # wins
    path.write_text(json.dumps({"do_rescale": False, "do_normalize": False, "image_mean": [0.5] * 3}))
    assert PixelScaling.from_directory(tmp_path) == PixelScaling(1.0, (0.0,) * 3, (1.0,) * 3)
    path.write_text(json.dumps({"image_mean": [0, -1, 0.5], "rescale_factor": 0.5}))
    assert PixelScaling.from_directory(tmp_path) == PixelScaling(0.5, (0.0, -1.0, 0.5), tuple(STD.tolist()))
    for wrong in (
        {"image_mean": [1, 2]},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [1, 0, 1]},
        {"do_rescale": 1},
        {"rescale_factor": "x"},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InvalidFormatError, match=next(iter(wrong))):
            PixelScaling.from_directory(tmp_path)


@pytest.mark.clause("FM-IMAGE-2", "FM-IMAGE-1")
def test_patches_hold_scaled_pixels_channel_by_channel(directory: Path, judge: Judge) -> None:
    images = load_multimodal(directory).images
    image = picture(7)
    found = images._tower.patches(image.tobytes()).to_numpy()
    exact = (image / 255 - MEAN) / STD
    for index, (row, column) in enumerate((row, column) for row in range(3) for column in range(3)):
        block = exact[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].transpose(2, 0, 1).reshape(-1)
        # slope, offset, product, sum: four roundings of numbers up to 1 / std + mean / std
        assert np.abs(found[index] - block).max() <= 4 * 2**-24 * (1 / STD.min() + (MEAN / STD).max())


@pytest.mark.clause("FM-VISION-5")
def test_hidden_states_that_are_asked_for(directory: Path, judge: Judge) -> None:
    import torch

    tower = load_multimodal(directory).images._tower
    assert len(tower.weights.layers) == 2  # the third one is not needed, and not loaded
    with torch.no_grad():
        exact = judge.double.model.vision_tower(pixel_values([picture(8)]), output_hidden_states=True).hidden_states
    found = tower.hidden_states(picture(8).tobytes(), (2, 0, 1, 0))
    for state, index in zip(found, (2, 0, 1, 0), strict=True):
        assert np.abs(state.to_numpy() - exact[index][0].numpy()).max() <= 2**-18 * float(exact[index].abs().max())
    for wrong in ((), (3,), (-1,)):
        with pytest.raises(InvalidParameterError, match=r"\[0, 2\]"):
            tower.hidden_states(picture(8).tobytes(), wrong)


@pytest.mark.clause("FM-VISION-3")
def test_a_tower_without_a_tensor_is_refused(directory: Path, judge: Judge, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    for name in ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    load_multimodal(tmp_path)
    del tensors["vision_tower.pre_layrnorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidFormatError, match=r"vision\.pre_layrnorm\.bias"):
        load_multimodal(tmp_path)


@pytest.mark.clause("FM-LOAD-2")
def test_loading(directory: Path, judge: Judge, smollm2_like: Path) -> None:
    loaded = load_multimodal(directory, max_tokens=20)
    assert loaded.tokenizer is None
    assert loaded.new_llm().kv_capacity() == 20
    with pytest.raises(UnsupportedError, match="expected the Hugging Face directory of a LLaVA model"):
        load_multimodal(smollm2_like)


@pytest.fixture
def smollm2_like(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path
