"""Loading a model by path, and what it is wired to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrum_ref import assembly
from ferrum_ref.assembly import LoadedModel, load_model, plan_kv_blocks
from ferrum_ref.errors import InvalidParameterError, ModelError, NotFoundError, ResourceExhaustedError
from ferrum_ref.interfaces.model_executor import AttentionType, SpeculativeExecutor, UnifiedBatch, UnifiedBatchItem
from ferrum_ref.kv_cache.storage_contiguous import KvShape
from ferrum_ref.types.devices import DataType, Device
from ferrum_ref.types.models import ModelType

IDS = [5, 70, 3, 9, 9, 41]


@pytest.fixture(scope="module")
def folder(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, tiny model) with a word-level tokenizer of 97 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny")
    tiny = tiny_llama(5)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": [7, 8],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    save_file(tiny.tensors, path / "model.safetensors")
    return path, tiny


@pytest.fixture(scope="module")
def loaded(folder: Any) -> LoadedModel:
    return load_model(folder[0])


@pytest.mark.clause("LM-LOAD-1")
def test_a_directory_becomes_a_model(folder: Any, loaded: LoadedModel) -> None:
    path, tiny = folder
    assert loaded.path == path
    assert loaded.stop_token_ids >= {7, 8, 9}
    info = loaded.info
    assert (str(info.model_id), info.model_type) == (str(path), ModelType.Llama)
    assert info.num_parameters == sum(values.size for values in tiny.tensors.values())
    assert (info.hidden_size, info.num_layers, info.num_heads, info.num_kv_heads) == (32, 3, 4, 2)
    assert (info.vocab_size, info.max_sequence_length) == (97, 96)
    assert (info.dtype, info.device, info.metadata["head_dim"]) == (DataType.FP32, Device.CPU, 8)
    exact = tiny.logits(IDS, True)[-1]
    bound = 2 * np.abs(tiny.logits(IDS, False) - tiny.logits(IDS, True)).max()
    assert np.abs(loaded.new_llm().prefill("a", IDS) - exact).max() <= bound
    assert loaded.tokenizer.encode("w5 w70 w3", False) == [5, 70, 3]


@pytest.mark.clause("LM-LOAD-1")
def test_stop_ids_do_not_hang_on_the_tokenizer(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        stop_token_ids = frozenset({3})

    monkeypatch.setattr(assembly, "load_tokenizer", lambda path: Silent())
    assert load_model(folder[0]).stop_token_ids == {3, 7, 8, 9}


@pytest.mark.clause("LM-LOAD-3")
def test_executor_and_manager_share_one_storage(folder: Any, loaded: LoadedModel) -> None:
    executor, manager = loaded.new_executor(6, 4, max_batch_size=5)
    capabilities = executor.capabilities()
    assert capabilities.attention_mechanisms[:2] == [AttentionType.GroupedQuery, AttentionType.Paged]
    flash = loaded.backend.capabilities().supports_flash_attention
    assert (AttentionType.Flash in capabilities.attention_mechanisms) == flash
    assert (capabilities.max_batch_size, capabilities.max_sequence_length) == (5, 96)
    memory = capabilities.memory_requirements
    assert memory.parameter_memory == sum(values.nbytes for values in folder[1].tensors.values())
    assert memory.kv_cache_memory_per_token == 2 * 2 * 8 * 4
    assert memory.calculate_total_memory(1, 24, 3) > 24 * 3 * 128 + memory.parameter_memory
    assert manager.stats().total_memory_bytes == 24 * 3 * 128
    from ferrum_ref.interfaces.kv_cache import AllocationRequest
    from ferrum_ref.types.ids import RequestId
    from ferrum_ref.types.sampling import Priority

    handle = manager.allocate_now(
        AllocationRequest(RequestId.new(), 6, 96, 3, 2, 8, Device.CPU, DataType.FP32, Priority.Normal)
    )
    assert (np.asarray(handle.key_cache(0).to_numpy()) == 0).all()  # type: ignore[union-attr]
    executor.execute_unified(UnifiedBatch([UnifiedBatchItem("a", IDS, handle, 0, True)]))
    assert (np.abs(handle.key_cache(0).to_numpy()).max(axis=(1, 2)) > 0).all()  # type: ignore[union-attr]


@pytest.mark.clause("LM-LOAD-2")
def test_the_context_can_be_shortened(folder: Any) -> None:
    assert load_model(folder[0], max_tokens=10).info.max_sequence_length == 10
    assert load_model(folder[0], max_tokens=1000).info.max_sequence_length == 96
    with pytest.raises(InvalidParameterError, match="max_tokens"):
        load_model(folder[0], max_tokens=0)
    with pytest.raises(ResourceExhaustedError, match="context"):
        load_model(folder[0], max_tokens=5).new_llm().prefill("a", IDS)


@pytest.mark.clause("LM-LOAD-2")
def test_what_is_not_there(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="zzz"):
        load_model(folder[0], "zzz")
    with pytest.raises(NotFoundError):
        load_model(tmp_path / "absent")
    with pytest.raises(InvalidParameterError, match="FP32, FP16 or BF16"):
        load_model(folder[0], dtype=DataType.INT8)


@pytest.mark.clause("LM-LOAD-1")
def test_element_type_and_backend_object(folder: Any) -> None:
    from ferrum_ref.numpy_backend import make_backend

    backend = make_backend()
    loaded = load_model(folder[0], backend, dtype=DataType.BF16)
    assert loaded.backend is backend
    assert loaded.info.dtype is DataType.BF16
    assert loaded.kv_shape.bytes_per_token() == 2 * 3 * 2 * 8 * 2
    logits = loaded.new_llm().prefill("a", IDS)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.clause("LM-LOAD-4")
def test_planning_blocks() -> None:
    shape = KvShape(30, 3, 64)  # 46,080 bytes a token
    assert plan_kv_blocks(shape, 2**30, 16) == 1456
    assert plan_kv_blocks(shape, 16 * 46080, 16) == 1
    assert plan_kv_blocks(shape, 2**30, 16, max_tokens=100) == 7
    assert plan_kv_blocks(shape, 2**30, 16, max_tokens=100, max_num_seqs=8) == 56
    assert plan_kv_blocks(shape, 2**30, 16, max_tokens=8192, max_num_seqs=8) == 1456
    with pytest.raises(ResourceExhaustedError, match="one block"):
        plan_kv_blocks(shape, 16 * 46080 - 1, 16)
    for sizes in ({"block_size": 0}, {"max_tokens": 0}, {"max_num_seqs": 0}):
        with pytest.raises(InvalidParameterError, match="plan_kv_blocks"):
            plan_kv_blocks(shape, 2**30, **sizes)


@pytest.mark.clause("MX-ASSEMBLY-1", "MX-ASSEMBLY-2", "MX-SPEC-8")
def test_speculation_over_a_loaded_model(folder: Any, loaded: LoadedModel, tiny_llama: Any) -> None:
    executor, manager = loaded.new_speculative_executor(6, 4, max_batch_size=5)
    assert isinstance(executor, SpeculativeExecutor)
    assert executor.capabilities().supports_speculative_decoding
    assert manager.stats().total_blocks == 6
    llm = loaded.new_llm()
    text = list(IDS)
    logits = llm.prefill("a", IDS)
    for _ in range(30):
        text.append(int(logits.argmax()))
        logits = llm.decode("a", text[-1], len(text) - 1)
    for decoder in (loaded.new_speculative(ngram=3), loaded.new_speculative(draft=loaded)):
        found = decoder.generate(IDS, 30)
        assert IDS + found.token_ids == text
    assert found.counts.acceptance_rate == 1.0  # the draft is the model itself
    with pytest.raises(InvalidParameterError, match="either"):
        loaded.new_speculative()
    with pytest.raises(InvalidParameterError, match="either"):
        loaded.new_speculative(draft=loaded, ngram=2)
    other = dataclasses.replace(loaded, info=dataclasses.replace(loaded.info, vocab_size=98))
    with pytest.raises(ModelError, match="98 tokens, the target's 97"):
        loaded.new_speculative(draft=other)
    short = loaded.shortened(10)
    assert short.info.max_sequence_length == short.decoder.max_tokens == 10
    assert short.decoder.weights is loaded.decoder.weights
