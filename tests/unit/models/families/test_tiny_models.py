"""The judge itself: its float64 is float64, its prompts decide clearly, and it is not deaf."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

DOUBLE_NOISE = 1e-11  # float64 summation in another order


def double_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps))


@pytest.mark.clause("LM-JUDGE-1")
def test_float64_logits_are_float64_throughout(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers with its norm and its attention's softmax written out again without conversions."""
    from transformers.models.llama import modeling_llama as llama

    tiny = tiny_model(transformers.LlamaConfig, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = tiny.make().double()
    for module in model.modules():
        if isinstance(module, llama.LlamaRMSNorm):
            weight, eps = module.weight, module.variance_epsilon
            monkeypatch.setattr(module, "forward", lambda x, w=weight, e=eps: double_rms_norm(x, w, e))
    model.set_attn_implementation("sdpa")  # computes in its inputs' type
    with torch.no_grad():
        independent = model(torch.tensor([tiny.text])).logits[0].numpy()
        naive = tiny.make().double()(torch.tensor([tiny.text])).logits[0].numpy()
    assert np.abs(independent - tiny.exact).max() < DOUBLE_NOISE
    assert np.abs(naive - tiny.exact).max() > 1000 * DOUBLE_NOISE  # what transformers' "float64" is worth


@pytest.mark.clause("LM-JUDGE-1")
def test_every_parameter_and_buffer_is_random(tiny_model: Any) -> None:
    tiny = tiny_model(
        transformers.DeepseekV3Config,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_hidden_layers=4,
    )
    for name, value in tiny.make().state_dict().items():
        assert value.float().std() > 0.01, name
    again = tiny.make().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in tiny.single.state_dict().items())


@pytest.mark.clause("LM-JUDGE-1")
def test_drafted_and_confirmed_tokens_are_those_of_one_forward_each(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_model(transformers.MistralConfig, sliding_window=9)
    assert tiny._greedy(tiny.ids, 0.0) == tiny._stepwise(tiny.ids, 0.0) == tiny.continuation
    drafts = tiny._draft(tiny.ids, 48)
    wrong = [*drafts[:5], (drafts[5] + 1) % 60, *drafts[6:]]
    monkeypatch.setattr(tiny, "_draft", lambda ids, count: wrong[-count:] if count > 40 else drafts[-count:])
    assert tiny._greedy(tiny.ids, 0.0) == tiny.continuation
    margin = float(np.median(np.diff(np.sort(tiny.exact[39:-1], axis=1)[:, -2:])))
    fewer = tiny._greedy(tiny.ids, margin)
    assert 0 < len(fewer) < 48 or not fewer
    assert fewer == tiny.continuation[: len(fewer)]


@pytest.mark.clause("LM-JUDGE-1")
def test_greedy_tokens_are_not_ties_and_vary(tiny_model: Any, judge: Any, logit_error: Any) -> None:
    tiny = tiny_model(transformers.LlamaConfig)
    last = tiny.exact[len(tiny.ids) - 1 : -1]
    assert last.argmax(axis=1).tolist() == tiny.continuation
    assert len(tiny.continuation) == 48
    assert len(set(tiny.continuation)) >= 5
    ordered = np.sort(last, axis=1)
    assert (ordered[:, -1] - ordered[:, -2]).min() > tiny.bound
    assert 0 < judge(tiny) <= 1
    other = tiny_model(transformers.LlamaConfig, seed=1)
    assert logit_error(tiny, other.path) > 1000 * tiny.bound
    with pytest.raises(AssertionError, match="logits are off by"):
        judge(tiny, other.path)
