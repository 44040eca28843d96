"""GGUF files: read under canonical names, through every way of building."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrum_ref.assembly import load_model
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.model_builder import BuildOptions
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelConfig, ModelSource, QuantizationConfig

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture
def gguf_path(saved: Any, tmp_path: Path) -> Any:
    """The tiny model as llama.cpp stores it: q and k rows permuted for adjacent pairs."""
    import gguf

    model = saved(1)
    path = tmp_path / "tiny.gguf"
    config = model.tiny.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, values in model.tiny.tensors.items():
        stem, kind = name.rsplit(".", 1)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(stem.rsplit(".", 1)[-1])
        if heads:
            values = values.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem)
        other = f"blk.{match[1]}.{NAMES[match[2]]}" if match else OUTER[stem]
        writer.add_tensor(f"{other}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.clause("MB-SOURCE-1", "MB-SOURCE-7", "MB-BUILD-1")
def test_every_way_of_building(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, gguf_path: Path
) -> None:
    model = saved(1)
    config = dataclasses.replace(ModelConfig.new("tiny", str(gguf_path)), dtype=DataType.FP32, max_sequence_length=96)
    assert builder.validate_config(config) == []
    alone = gguf_path.parent / "alone"
    alone.mkdir()
    shutil.copy(gguf_path, alone)
    definition = run(builder.export_model_definition(config))
    assert definition.metadata.additional["source"] == {"Local": str(gguf_path)}
    first = run(builder.build_model(config, backend, loader))
    for executor in (
        first,
        run(builder.build_from_source(ModelSource.Local(str(alone)), backend, loader, BuildOptions())),
        run(
            builder.build_from_source(
                ModelSource.Local(str(gguf_path)), backend, loader, BuildOptions(optimization_level=3)
            )
        ),
        run(builder.import_model_definition(definition, backend, loader)),
    ):
        assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    assert run(builder.estimate_build_time(config)).expected_time_seconds >= 0
    scheme = QuantizationConfig.FP8(True, False)
    with pytest.raises(UnsupportedError, match="GGUF"):
        run(builder.build_model(dataclasses.replace(config, quantization=scheme), backend, loader))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.clause("MB-BUILD-2", "MB-RUN-1", "MB-SOURCE-7")
def test_a_real_model(
    builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any, smollm2_path: Path
) -> None:
    """SmolLM2-135M: builder, graph at level 2 and load_model give the same bits."""
    source = ModelSource.Local(str(smollm2_path))
    loaded = load_model(smollm2_path, max_tokens=64)
    ids = loaded.tokenizer.encode("The capital of France is", False)
    expected = prompt_logits(loaded.new_executor(4)[0], ids)
    options = BuildOptions(additional_options={"max_tokens": 64})
    executor = run(builder.build_from_source(source, backend, loader, options))
    np.testing.assert_array_equal(prompt_logits(executor, ids), expected)
    del executor
    from ferrum_ref.builder.passes import default_passes

    config = dataclasses.replace(
        ModelConfig.new("smollm2", str(smollm2_path)), dtype=DataType.FP32, max_sequence_length=64
    )
    graph = run(builder.build_with_optimization(config, list(default_passes(2)), backend, loader))
    np.testing.assert_array_equal(prompt_logits(graph, ids), expected)
