"""Logits against transformers in float64, and against the decoder to the bit."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from ferrum_ref.errors import UnsupportedError
from ferrum_ref.executor.decode_backend import TransformerDecodeBackend, kv_of_blocks
from ferrum_ref.interfaces.kernel_ops import AttentionOps, KernelOps
from ferrum_ref.interfaces.model_executor import (
    DecodeInput,
)
from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

IDS = np.random.default_rng(3).integers(0, 97, 90).tolist()


@pytest.mark.clause("DB-STEP-1", "DB-STEP-2", "DB-STEP-6", "DB-INIT-1", "DB-CACHE-2")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_every_position_of_a_text_from_an_empty_cache(
    tiny_llama: Any, variant: dict[str, Any], backend: str, make_bench: Any, judge: Any
) -> None:
    tiny = tiny_llama(1, **variant)
    bench = make_bench(tiny, backend)
    bench.decode.init_kv_cache("text", bench.no_kv(), 0)
    exact, bound = judge(tiny, IDS)
    assert np.abs(bench.steps("text", IDS) - exact).max() <= bound  # 90 tokens: beyond the first capacity of 64
    assert bench.decode.cached_tokens("text") == 90


class Qwen3:
    """A tiny Qwen 3 with random per-head norms, and transformers' answers."""

    def __init__(self, tiny: Any) -> None:
        rng = np.random.default_rng(11)
        self.config, self.tensors, self.read = tiny.config, tiny.tensors, tiny.read
        for layer in range(self.config.num_layers):
            for part in "qk":
                norm = (1 + 0.5 * rng.standard_normal(self.config.head_dim)).astype(np.float32)
                self.tensors[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = norm

    def logits(self, ids: list[int], double: bool) -> Any:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = self.config
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=False,
            )
        ).eval()
        model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in self.tensors.items()})
        if double:
            model = model.to(torch.float64)
            for module in list(model.modules()):
                for name, child in list(module.named_children()):
                    if type(child).__name__ == "Qwen3RMSNorm":
                        setattr(module, name, _double_norm(child))
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()


def _double_norm(norm: Any) -> Any:
    import torch

    class DoubleNorm(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    return DoubleNorm()


@pytest.mark.clause("DB-STEP-2", "DB-STEP-6", "TW-NORM-1")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_per_head_norms_as_in_qwen_3(tiny_llama: Any, backend: str, judge: Any) -> None:
    qwen = Qwen3(tiny_llama(4, head_dim=16))
    compute = load_backend(backend)
    weights = DecoderTransformerWeights.of_checkpoint(qwen, compute)
    decode = TransformerDecodeBackend(weights, compute)
    empty = compute.tensor_factory().zeros((0, 2, 16), DataType.FP32, weights.embed_weight().device())
    decode.init_kv_cache("q", [(empty, empty)] * 3, 0)
    exact, bound = judge(qwen, IDS[:40])
    rows = [decode.decode_step(token, i, "q").to_numpy()[0, 0] for i, token in enumerate(IDS[:40])]
    assert np.abs(np.stack(rows) - exact).max() <= bound


@pytest.mark.clause("DB-STEP-2")
@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.BF16])
def test_on_numpy_the_bits_are_the_decoders(
    tiny_llama: Any, variant: dict[str, Any], dtype: DataType, make_bench: Any
) -> None:
    bench = make_bench(tiny_llama(2, **variant), dtype=dtype)
    bench.decode.init_kv_cache("x", bench.no_kv(), 0)
    bench.llm.prefill("x", IDS[:1])
    ours = bench.steps("x", IDS[:30])
    theirs = [bench.llm.decode("x", token, i) for i, token in enumerate(IDS[:30]) if i]
    np.testing.assert_array_equal(ours[1:], np.stack(theirs))


@pytest.mark.clause("DB-STEP-1")
def test_rank_three_here_and_two_from_the_executor(bench: Any) -> None:
    executor, handle, storage = bench.prefilled(IDS[:5])
    blocks = handle.block_table().physical_blocks
    bench.decode.init_kv_cache("rank", kv_of_blocks(storage, blocks, 3, 5), 5)
    token = bench.compute.tensor_factory().from_ids([IDS[5]])
    decoded = asyncio.run(executor.decode(DecodeInput.new(token, handle)))
    assert decoded.logits.shape() == (1, 97)
    assert bench.decode.decode_step(IDS[5], 5, "rank").shape() == (1, 1, 97)


class Sparse(KernelOps):
    """Rotary positions and attention without in-place writes; everything else is left to TensorOps."""

    def __init__(self, kernels: KernelOps, *, position: bool = True, attention: bool = True) -> None:
        self._kernels = kernels
        self._has_position, self._has_attention = position, attention

    def backend_name(self) -> str:
        return "sparse"

    def position_ops(self) -> Any:
        return self._kernels.position_ops() if self._has_position else None

    def attention_ops(self) -> Any:
        attention = self._kernels.attention_ops()

        class NoWrites(AttentionOps):
            def attention(self, q: Any, k: Any, v: Any, params: Any) -> Any:
                assert attention is not None
                return attention.attention(q, k, v, params)

        return NoWrites() if self._has_attention else None


@pytest.mark.clause("DB-BACKEND-1", "DB-CACHE-2")
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_backend_with_few_kernels(
    tiny_llama: Any, backend: str, monkeypatch: pytest.MonkeyPatch, make_bench: Any, judge: Any
) -> None:
    tiny = tiny_llama(1, num_kv_heads=1, attention_bias=True, mlp_bias=True)
    bench = make_bench(tiny, backend)
    kernels = bench.compute.kernel_ops()
    assert kernels is not None
    monkeypatch.setattr(bench.compute, "kernel_ops", lambda: Sparse(kernels))
    bench.decode = TransformerDecodeBackend(bench.weights, bench.compute)
    bench.decode.init_kv_cache("s", bench.no_kv(), 0)
    exact, bound = judge(tiny, IDS[:70])
    assert np.abs(bench.steps("s", IDS[:70]) - exact).max() <= bound


@pytest.mark.clause("DB-BACKEND-1")
def test_a_backend_without_the_necessary_kernels(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, make_bench: Any
) -> None:
    bench = make_bench(tiny_llama(7))
    kernels = bench.compute.kernel_ops()
    assert kernels is not None
    for lacking, kind in (
        (Sparse(kernels, position=False), "rotary"),
        (Sparse(kernels, attention=False), "attention"),
        (None, "rotary"),
    ):
        monkeypatch.setattr(bench.compute, "kernel_ops", lambda lacking=lacking: lacking)
        with pytest.raises(UnsupportedError, match=f"'numpy' offers no {kind} kernels"):
            TransformerDecodeBackend(bench.weights, bench.compute)
