"""Directories that transformers wrote become executors: the same logits as load_model's, by way of the loader."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ferrum_ref.assembly import load_model
from ferrum_ref.builder import DecoderModelBuilder
from ferrum_ref.errors import (
    ConfigError,
    DeviceError,
    FerrumIOError,
    FerrumTimeoutError,
    ModelError,
    NotFoundError,
    ResourceExhaustedError,
    UnsupportedError,
)
from ferrum_ref.interfaces.model_builder import BuildOptions
from ferrum_ref.interfaces.weights import TensorSpec, TensorTransformation, WeightLoader, WeightSource
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.models import ModelSource, ModelType, QuantizationConfig

IDS = [5, 70, 3, 9, 9, 41]
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "biases, one kv head": {"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "tied, wide heads": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 16},
}


class WatchedLoader(WeightLoader):
    """A loader that notes what it was asked, on which loop, and can be slow, wrong or broken."""

    def __init__(self, inner: WeightLoader) -> None:
        self.inner = inner
        self.specs: list[TensorSpec] = []
        self.loops: set[int] = set()
        self.delay_s = 0.0
        self.change: Any = None

    async def load_tensor(self, spec: TensorSpec) -> Any:
        self.specs.append(spec)
        self.loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(self.delay_s)
        found = await self.inner.load_tensor(spec)
        return found if self.change is None else self.change(spec, found)

    async def load_tensors(self, specs: Any) -> list[Any]:
        return [await self.load_tensor(spec) for spec in specs]

    async def is_available(self, source: WeightSource) -> bool:
        return await self.inner.is_available(source)

    async def get_metadata(self, source: WeightSource) -> Any:
        return await self.inner.get_metadata(source)

    async def preload(self, source: WeightSource) -> None:
        await self.inner.preload(source)

    def capabilities(self) -> Any:
        return self.inner.capabilities()


def rebuilt(model: Any, tmp_path: Path, **config: Any) -> Path:
    """A copy of the directory, with other fields in config.json (None takes one out)."""
    path = tmp_path / "copy"
    shutil.copytree(model.path, path)
    found = json.loads((path / "config.json").read_text())
    found.update(config)
    (path / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return path


def from_source(path: Path, **options: Any) -> tuple[Any, BuildOptions]:
    return ModelSource.Local(str(path)), BuildOptions(**options)


@pytest.mark.clause("MB-BUILD-1", "MB-BUILD-2")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_load_model(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, name: str
) -> None:
    model = saved(1, **VARIANTS[name])
    executor = run(builder.build_model(model.config(), backend, loader))
    found = prompt_logits(executor, model.ids)
    assert model.error(found) <= model.bound
    loaded = load_model(model.path)
    theirs, _ = loaded.new_executor(12, 16)
    lender = loaded.new_executor(12, 16)[0]
    np.testing.assert_array_equal(found, prompt_logits(lender, model.ids))
    assert executor.info().num_parameters == theirs.info().num_parameters == loaded.info.num_parameters
    assert dataclasses.replace(executor.info(), model_id=loaded.info.model_id) == loaded.info


@pytest.mark.clause("MB-BUILD-2", "MB-WEIGHTS-3")
@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_other_element_types(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, dtype: DataType
) -> None:
    model = saved(1)
    executor = run(builder.build_model(dataclasses.replace(model.config(), dtype=dtype), backend, loader))
    assert executor.info().dtype is dtype
    theirs, _ = load_model(model.path, dtype=dtype).new_executor(12)
    np.testing.assert_array_equal(prompt_logits(executor, IDS), prompt_logits(theirs, IDS))


@pytest.mark.clause("MB-BUILD-3")
def test_head_size_and_kv_heads_are_the_models_own(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any
) -> None:
    """D-21: hidden_size 48 over 4 heads is 12; the model says 16."""
    model = saved(1, **VARIANTS["tied, wide heads"])
    info = run(builder.build_model(model.config(), backend, loader)).info()
    assert (info.metadata["head_dim"], info.num_kv_heads, info.num_heads) == (16, 2, 4)
    assert info.metadata["head_dim"] != info.hidden_size // info.num_heads
    assert info.num_parameters == sum(values.size for values in model.tiny.tensors.values())
    assert info.model_type == ModelType.Llama


@pytest.mark.clause("MB-BUILD-4")
def test_context_and_cache_are_as_asked(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    model = saved(1)
    token_bytes = 2 * 3 * 2 * 8 * 4
    plain = run(builder.build_model(model.config(max_batch_size=3), backend, loader))
    assert plain.status().memory_usage.allocated_bytes == 3 * 6 * 16 * token_bytes
    assert plain.capabilities().max_batch_size == 3
    settings = dataclasses.replace(model.config(), max_sequence_length=10, extra_config={"block_size": 4})
    short = run(builder.build_model(settings, backend, loader))
    assert (short.info().max_sequence_length, short.status().memory_usage.allocated_bytes) == (10, 12 * token_bytes)
    with pytest.raises(ResourceExhaustedError, match="context"):
        prompt_logits(short, list(range(11)))
    few = run(builder.build_model(model.config(extra_config={"num_blocks": 1}), backend, loader))
    with pytest.raises(ResourceExhaustedError):
        prompt_logits(few, list(range(17)))
    memory = few.capabilities().memory_requirements
    assert memory.parameter_memory == sum(values.nbytes for values in model.tiny.tensors.values())
    with pytest.raises(ResourceExhaustedError, match="num_blocks"):
        run(
            builder.build_model(
                model.config(extra_config={"num_blocks": 2**31 - 1, "block_size": 2**20}), backend, loader
            )
        )


@pytest.mark.clause("MB-BUILD-5", "MB-OPTIONS-5")
def test_damaged_weights_are_found_by_running(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, tmp_path: Path
) -> None:
    path = rebuilt(saved(1), tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path / "model.safetensors")
    for level in (2, 1):
        source, options = from_source(path, optimization_level=level)
        with pytest.raises(ModelError, match="97 of them not finite"):
            run(builder.build_from_source(source, backend, loader, options))
        off = dataclasses.replace(options, enable_validation=False)
        assert run(builder.build_from_source(source, backend, loader, off)).info().num_layers == 3


@pytest.mark.clause("MB-BUILD-6")
def test_several_builds_at_once(saved: Any, builder: Any, backend: Any, loader: Any, prompt_logits: Any) -> None:
    models = [saved(1), saved(2), saved(1, **VARIANTS["tied, wide heads"])]

    async def build() -> list[Any]:
        return await asyncio.gather(*(builder.build_model(each.config(), backend, loader) for each in models))

    for model, executor in zip(models, asyncio.run(build()), strict=True):
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound


@pytest.mark.clause("MB-SOURCE-1", "MB-SOURCE-2")
@pytest.mark.parametrize("shards", [None, "12KB"])
def test_a_directory_or_the_file_in_it(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, shards: str | None
) -> None:
    model = saved(1, shards)
    name = "model.safetensors.index.json" if shards else "model.safetensors"
    assert (model.path / name).exists()
    assert len(list(model.path.glob("*.safetensors"))) == (1 if not shards else len(list(model.path.glob("model-*"))))
    for place in (model.path, model.path / name):
        executor = run(builder.build_from_source(*_swap(from_source(place), backend, loader)))
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound


def _swap(pair: tuple[Any, BuildOptions], backend: Any, loader: Any) -> tuple[Any, Any, Any, BuildOptions]:
    return pair[0], backend, loader, pair[1]


@pytest.mark.clause("MB-SOURCE-2")
def test_pickled_weights_and_no_weights(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, tmp_path: Path
) -> None:
    import torch

    model = saved(1)
    path = rebuilt(model, tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors, model\.safetensors\.index\.json, pytorch_model\.bin"):
        run(builder.build_from_source(*_swap(from_source(path), backend, loader)))
    torch.save({name: torch.from_numpy(values) for name, values in tensors.items()}, path / "pytorch_model.bin")
    executor = run(builder.build_from_source(*_swap(from_source(path), backend, loader)))
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound


@pytest.mark.clause("MB-SOURCE-1")
@pytest.mark.parametrize("place", ["absent", "", "a\x00b"])
def test_places_that_are_not_there(
    builder: Any, backend: Any, loader: Any, run: Any, tmp_path: Path, place: str
) -> None:
    source = ModelSource.Local(str(tmp_path / place) if place == "absent" else place)
    with pytest.raises(NotFoundError):
        run(builder.build_from_source(source, backend, loader, BuildOptions()))


@pytest.mark.clause("MB-BUILD-1")
def test_a_given_configuration_replaces_the_file(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, tmp_path: Path
) -> None:
    model = saved(1)
    path = rebuilt(model, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text("nonsense")
    executor = run(
        builder.build_from_source(
            ModelSource.Local(str(path)), backend, loader, BuildOptions(additional_options={"config": config})
        )
    )
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    settings = dataclasses.replace(model.config(), model_path=str(path), extra_config={"config": config})
    again = run(builder.build_model(settings, backend, loader))
    assert model.error(prompt_logits(again, model.ids)) <= model.bound


@pytest.mark.clause("MB-OPTIONS-1")
@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"dtype": DataType.INT8}, ConfigError, "FP32, FP16 or BF16"),
        ({"device": Device.CUDA(0)}, DeviceError, "cuda:0"),
        ({"tensor_parallel_size": 2}, UnsupportedError, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 3}, UnsupportedError, "pipeline_parallel_size"),
        ({"enable_cuda_graphs": True}, UnsupportedError, "enable_cuda_graphs"),
        ({"model_path": ""}, ConfigError, "model_path"),
        ({"max_batch_size": 0}, ConfigError, "max_batch_size"),
        ({"extra_config": {"num_blocks": 0}}, ConfigError, "num_blocks"),
        ({"quantization": QuantizationConfig.SmoothQuant(0.5, 8)}, UnsupportedError, "quantization"),
    ],
)
def test_settings_are_honoured_or_refused(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, changes: dict[str, Any], kind: Any, said: str
) -> None:
    settings = dataclasses.replace(saved(1).config(), **changes)
    with pytest.raises(kind, match=said):
        run(builder.build_model(settings, backend, loader))


@pytest.mark.clause("MB-OPTIONS-1")
def test_settings_that_are_no_refusal(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    for changes in ({"use_paged_attention": False}, {"use_flash_attention": True}, {"tensor_parallel_size": 1}):
        assert run(builder.build_model(saved(1).config(**changes), backend, loader)).info().dtype is DataType.FP32


@pytest.mark.clause("MB-OPTIONS-2")
def test_options_of_a_source(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    path = saved(1).path

    def build(**additional: Any) -> Any:
        options = BuildOptions(additional_options=additional)
        return run(builder.build_from_source(ModelSource.Local(str(path)), backend, loader, options))

    plain = build().info()
    assert (plain.dtype, plain.max_sequence_length, str(plain.model_id)) == (DataType.FP32, 96, str(path))
    asked = build(dtype="bfloat16", max_tokens=20, max_batch_size=4, model_id="mine", device="cpu")
    info = asked.info()
    assert (info.dtype, info.max_sequence_length, str(info.model_id)) == (DataType.BF16, 20, "mine")
    assert asked.capabilities().max_batch_size == 4
    for wrong in (
        {"speed": 9},
        {"max_tokens": 0},
        {"dtype": "INT8"},
        {"config": [1]},
        {"model_id": 5},
        {"block_size": True},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(**wrong)


@pytest.mark.clause("MB-OPTIONS-3")
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_level_keeps_the_bound(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, level: int
) -> None:
    from ferrum_ref.builder.ir_decoder import IrDecoder
    from ferrum_ref.models.decoder import Decoder

    for name in VARIANTS:
        model = saved(1, **VARIANTS[name])
        source, options = from_source(model.path, optimization_level=level)
        executor = run(builder.build_from_source(source, backend, loader, options))
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound
        assert isinstance(executor._decoder, Decoder if level == 2 else IrDecoder)
        assert ("optimizations" in executor.info().metadata) == (level in (1, 3))
    off = dataclasses.replace(options, enable_optimization=False)
    executor = run(builder.build_from_source(source, backend, loader, off))
    assert executor._decoder.num_steps == 22 * 3 + 8
    with pytest.raises(ConfigError, match="optimization_level"):
        run(builder.build_from_source(source, backend, loader, BuildOptions(optimization_level=4)))


@pytest.mark.clause("MB-OPTIONS-4")
def test_a_build_that_takes_too_long(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    slow = WatchedLoader(loader)
    slow.delay_s = 5.0
    source, options = from_source(saved(1).path, build_timeout_seconds=1)
    with pytest.raises(FerrumTimeoutError, match="1 s, in phase WeightLoading"):
        run(builder.build_from_source(source, backend, slow, options))
    assert len(slow.specs) <= 3  # what was under way; nothing further was asked for
    at_once = dataclasses.replace(options, build_timeout_seconds=0)
    fresh = WatchedLoader(loader)
    with pytest.raises(FerrumTimeoutError):
        run(builder.build_from_source(source, backend, fresh, at_once))
    assert fresh.specs == []


@pytest.mark.clause("MB-OPTIONS-4")
def test_time_is_looked_at_between_weights(saved: Any, backend: Any, loader: Any, run: Any) -> None:
    """A loader that never yields cannot be interrupted, but the next weight is not asked for."""
    now = [0.0]
    watched = WatchedLoader(loader)

    def tick(spec: TensorSpec, found: Any) -> Any:
        now[0] += 10.0
        return found

    watched.change = tick
    builder = DecoderModelBuilder(clock=lambda: now[0])
    source, options = from_source(saved(1).path, build_timeout_seconds=25)
    with pytest.raises(FerrumTimeoutError, match="25 s"):
        run(builder.build_from_source(source, backend, watched, options))
    assert 3 <= len(watched.specs) <= 5
    unlimited = dataclasses.replace(options, build_timeout_seconds=None)
    assert run(builder.build_from_source(source, backend, watched, unlimited)).info().num_layers == 3


@pytest.mark.clause("MB-OPTIONS-4")
def test_a_caller_may_give_up(saved: Any, builder: Any, backend: Any, loader: Any) -> None:
    slow = WatchedLoader(loader)
    slow.delay_s = 0.05

    async def give_up() -> int:
        task = asyncio.create_task(builder.build_model(saved(1).config(), backend, slow))
        await asyncio.sleep(0.12)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        asked = len(slow.specs)
        await asyncio.sleep(0.3)
        return len(slow.specs) - asked

    assert asyncio.run(give_up()) <= 2


@pytest.mark.clause("MB-OPTIONS-6", "MB-QUANT-1")
def test_what_is_not_offered(saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any) -> None:
    source, _ = from_source(saved(1).path)

    def build(**options: Any) -> Any:
        return run(builder.build_from_source(source, backend, loader, BuildOptions(**options)))

    with pytest.raises(UnsupportedError, match="compression"):
        build(enable_compression=True)
    with pytest.raises(ConfigError, match="quantization_config"):
        build(enable_quantization=True)
    for scheme in (
        QuantizationConfig.SmoothQuant(0.5, 16),
        QuantizationConfig.INT8(True, True),
        QuantizationConfig.INT4(False, 8),
        QuantizationConfig.FP8(True, True),
    ):
        with pytest.raises(UnsupportedError, match="quantization"):
            build(enable_quantization=True, quantization_config=scheme)
    plain = prompt_logits(build(), IDS)
    unused = build(quantization_config=QuantizationConfig.FP8(True, False))
    np.testing.assert_array_equal(prompt_logits(unused, IDS), plain)


@pytest.mark.clause("MB-QUANT-1", "MB-QUANT-2")
@pytest.mark.parametrize("level", [2, 3])
def test_quantised_weights_are_the_rounded_ones(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, tmp_path: Path, level: int
) -> None:
    """FP8: the layers' matrices become their nearest e4m3 numbers; nothing else changes."""
    model = saved(1)
    path = rebuilt(model, tmp_path)
    tensors = load_file(path / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 2 and "layers" in name:
            tensors[name] = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    expected = run(
        builder.build_from_source(ModelSource.Local(str(path)), backend, loader, BuildOptions(optimization_level=level))
    )
    scheme = BuildOptions(
        optimization_level=level, enable_quantization=True, quantization_config=QuantizationConfig.FP8(True, False)
    )
    found = run(builder.build_from_source(ModelSource.Local(str(model.path)), backend, loader, scheme))
    np.testing.assert_array_equal(prompt_logits(found, IDS), prompt_logits(expected, IDS))
    assert np.abs(prompt_logits(found, model.ids) - model.exact).max() > 1e3 * model.bound


@pytest.mark.clause("MB-QUANT-1", "MB-QUANT-2")
def test_every_scheme_is_asked_of_the_loader(saved: Any, builder: Any, backend: Any, loader: Any, run: Any) -> None:
    from ferrum_ref.interfaces.weights import QuantizationConfig as Scheme

    pairs = [
        (QuantizationConfig.INT8(True, False), Scheme.INT8(True)),
        (QuantizationConfig.INT4(True, 8), Scheme.INT4(8)),
        (QuantizationConfig.FP8(False, False), Scheme.FP8(False)),
        (QuantizationConfig.GPTQ(4, 8, False), Scheme.GPTQ(4, 8, False)),
        (QuantizationConfig.AWQ(4, True, "gemm"), Scheme.AWQ(4, True)),
    ]
    for given, wanted in pairs:
        watched = WatchedLoader(loader)
        watched.inner = loader
        settings = saved(1).config(quantization=given)
        too_wide = isinstance(given, type(QuantizationConfig.AWQ(4, True, "")))  # groups of 128 do not fit here
        with pytest.raises(ModelError) if too_wide else contextlib.nullcontext():
            run(builder.build_model(settings, backend, watched))
        steps = {spec.name: spec.transformations for spec in watched.specs}
        assert steps["model.embed_tokens.weight"] == []
        assert steps["model.layers.0.self_attn.q_proj.weight"] == [TensorTransformation.Quantize(wanted)]


@pytest.mark.clause("MB-WEIGHTS-1")
@pytest.mark.parametrize("level", [1, 2])
def test_everything_comes_from_the_loader(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, level: int
) -> None:
    """Upstream's builder ignores its loader: here other numbers from the loader are another model."""
    model = saved(1)
    watched = WatchedLoader(loader)
    source, options = from_source(model.path, optimization_level=level)
    first = run(builder.build_from_source(source, backend, watched, options))
    assert sorted(spec.name for spec in watched.specs) == sorted(model.tiny.tensors)
    for spec in watched.specs:
        assert tuple(spec.shape) == model.tiny.tensors[spec.name].shape
        assert (spec.dtype, spec.device, spec.transformations) == (DataType.FP32, Device.CPU, [])
    assert len(watched.loops) == 1
    halved = WatchedLoader(loader)
    halved.change = lambda spec, found: backend.tensor_factory().from_numpy(found.to_numpy() * np.float32(0.5))
    second = run(builder.build_from_source(source, backend, halved, options))
    assert not np.allclose(prompt_logits(first, IDS), prompt_logits(second, IDS))


@pytest.mark.clause("MB-WEIGHTS-2")
@pytest.mark.parametrize("level", [1, 2])
def test_exactly_the_tensors_of_the_configuration(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, tmp_path: Path, level: int
) -> None:
    path = rebuilt(saved(1), tmp_path)
    whole = load_file(path / "model.safetensors")
    source, options = from_source(path, optimization_level=level)

    def build(tensors: dict[str, Any]) -> Any:
        save_file(tensors, path / "model.safetensors")
        return run(builder.build_from_source(source, backend, loader, options))

    with pytest.raises(ModelError, match=r"model.norm.weight: got nothing"):
        build({name: values for name, values in whole.items() if name != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"q_proj.weight: got shape \[32, 16\], expected \[32, 32\]"):
        build({**whole, "model.layers.1.self_attn.q_proj.weight": np.zeros((32, 16), np.float32)})
    with pytest.raises(ModelError, match=r"no place for.*q_norm"):
        build({**whole, "model.layers.0.self_attn.q_norm.weight": np.zeros(8, np.float32)})
    old_table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    assert build({**whole, **old_table}).info().num_layers == 3


@pytest.mark.clause("MB-WEIGHTS-2")
@pytest.mark.parametrize("level", [1, 2])
def test_a_tied_matrix_stored_twice(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, tmp_path: Path, level: int
) -> None:
    path = rebuilt(saved(1, **VARIANTS["tied, wide heads"]), tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source, options = from_source(path, optimization_level=level)
    save_file(tensors, path / "model.safetensors")
    assert run(builder.build_from_source(source, backend, loader, options)).info().vocab_size == 97
    tensors["lm_head.weight"][5, 7] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight: got values that differ"):
        run(builder.build_from_source(source, backend, loader, options))


@pytest.mark.clause("MB-WEIGHTS-4")
@pytest.mark.parametrize("level", [1, 2])
def test_a_loader_that_fails_or_lies(saved: Any, builder: Any, backend: Any, loader: Any, run: Any, level: int) -> None:
    source, options = from_source(saved(1).path, optimization_level=level)
    factory = backend.tensor_factory()

    def broken(spec: TensorSpec, found: Any) -> Any:
        if "layers.1.mlp" in spec.name:
            raise FerrumIOError("the disk is gone")
        return found

    for change, kind, said in (
        (broken, FerrumIOError, "the disk is gone"),
        (lambda spec, found: factory.from_numpy(found.to_numpy()[:1]), ModelError, "the loader gave"),
        (lambda spec, found: found.to_dtype(DataType.FP16), ModelError, "the loader gave float16"),
    ):
        watched = WatchedLoader(loader)
        watched.change = change
        with pytest.raises(kind, match=said):
            run(builder.build_from_source(source, backend, watched, options))


@pytest.mark.clause("MB-BUILD-2", "MB-RUN-1")
def test_another_backend(saved: Any, builder: Any, loader: Any, run: Any, prompt_logits: Any) -> None:
    """The same builder on torch: its own tensors, the same promise."""
    from ferrum_ref.plugins import load_backend

    torch_backend = load_backend("torch")
    model = saved(1)
    for level in (2, 1):
        source, options = from_source(model.path, optimization_level=level)
        executor = run(builder.build_from_source(source, torch_backend, loader, options))
        assert executor.info().metadata["backend"] == "torch"
        assert model.error(prompt_logits(executor, model.ids, torch_backend)) <= model.bound
