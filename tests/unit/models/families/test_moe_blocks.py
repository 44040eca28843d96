"""The sparse feed-forward against transformers' own block in float64, and its routing against a second formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.models.matrix_reader import MatrixReader
from ferrum_ref.models.moe import MoeFeedForward, read_moe
from ferrum_ref.models.moe_config import MoeSettings, deepseek_moe, gpt_oss_moe, mixtral_moe, qwen3_moe
from ferrum_ref.models.moe_routing import route
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

HIDDEN, EXPERTS, INNER, ROWS = 24, 8, 20, 33


class Arrays:
    """A weight source over a dict."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read(self, name: str, dtype: Any = np.float32, out: Any = None) -> Any:
        values = self.tensors[name].astype(dtype)
        if out is None:
            return values
        out[...] = values
        return out


def canonical(state: dict[str, Any]) -> dict[str, Any]:
    """transformers' stacked experts, taken apart: gate over up, or (gpt-oss) interleaved and transposed."""
    tensors = {}
    for name, value in state.items():
        values = value.float().numpy()
        if name == "experts.gate_up_proj" and "experts.gate_up_proj_bias" in state:
            for index in range(EXPERTS):
                tensors[f"experts.{index}.gate_proj.weight"] = values[index, :, 0::2].T
                tensors[f"experts.{index}.up_proj.weight"] = values[index, :, 1::2].T
        elif name == "experts.gate_up_proj_bias":
            for index in range(EXPERTS):
                tensors[f"experts.{index}.gate_proj.bias"] = values[index, 0::2]
                tensors[f"experts.{index}.up_proj.bias"] = values[index, 1::2]
        elif name == "experts.down_proj_bias":
            tensors |= {f"experts.{index}.down_proj.bias": values[index] for index in range(EXPERTS)}
        elif name == "experts.gate_up_proj":
            for index in range(EXPERTS):
                tensors[f"experts.{index}.gate_proj.weight"] = values[index, :INNER]
                tensors[f"experts.{index}.up_proj.weight"] = values[index, INNER:]
        elif name == "experts.down_proj":
            turned = "experts.down_proj_bias" in state
            for index in range(EXPERTS):
                tensors[f"experts.{index}.down_proj.weight"] = values[index].T if turned else values[index]
        else:
            tensors[name.replace("router.", "gate.")] = values
    return tensors


def mixtral() -> tuple[Any, MoeSettings]:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

    config = transformers.MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    return Block(config), mixtral_moe(config.to_dict())


def qwen3(normalised: bool) -> tuple[Any, MoeSettings]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=normalised,
    )
    return Block(config), qwen3_moe(config.to_dict())


def deepseek(normalised: bool) -> tuple[Any, MoeSettings]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as Block

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        norm_topk_prob=normalised,
        routed_scaling_factor=1.7,
    )
    return Block(config), deepseek_moe(config.to_dict())


def gpt_oss() -> tuple[Any, MoeSettings]:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP as Block

    config = transformers.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=3,
        swiglu_limit=0.9,
        swiglu_alpha=1.3,
    )
    return Block(config), gpt_oss_moe(config.to_dict())


BLOCKS = {
    "mixtral": mixtral,
    "qwen3-moe": lambda: qwen3(False),
    "qwen3-moe, normalised": lambda: qwen3(True),
    "deepseek-v3": lambda: deepseek(True),
    "deepseek-v3, as scored": lambda: deepseek(False),
    "gpt-oss": gpt_oss,
}


@pytest.mark.clause("LM-MOE-1", "LM-MOE-4", "LM-MOE-5", "LM-MOE-6", "LM-MOE-7", "LM-MOE-8")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("backend_name", ["numpy", "torch"])
def test_sparse_feed_forward_equals_transformers_block(
    name: str, backend_name: str, stay_double: Any, randomised: Any
) -> None:
    torch.manual_seed(0)
    block, settings = BLOCKS[name]()
    block.config = getattr(block, "config", None)
    randomised(block, 3)
    if hasattr(block.experts, "config"):
        block.experts.config._experts_implementation = "eager"
    x = np.random.default_rng(1).standard_normal((ROWS, HIDDEN)).astype(np.float32)

    def run(double: bool) -> Any:
        with torch.no_grad():
            given_x = torch.from_numpy(x)[None]
            if not double:
                found = block(given_x)
            else:
                with stay_double():
                    found = block.double()(given_x.double())
        return (found[0] if isinstance(found, tuple) else found)[0].numpy()

    tensors = canonical(block.state_dict())
    own, exact = run(False), run(True)
    backend = load_backend(backend_name)
    source = Arrays(tensors)
    weights = read_moe(source, MatrixReader(source, backend, DataType.FP32), backend, "", settings)
    kernels = backend.kernel_ops()
    assert kernels is not None
    linear = kernels.linear_ops()
    assert linear is not None
    part = MoeFeedForward(backend, linear, settings, weights)
    seen: list[str] = []
    found = part(backend.tensor_factory().from_numpy(x), lambda name, _: seen.append(name)).to_numpy()
    assert np.abs(found - exact).max() <= 4 * np.abs(own - exact).max()
    assert seen == ["router", "routed", *(["shared"] if settings.shared_size else [])]
    assert part(backend.tensor_factory().from_numpy(x[:0]), lambda *_: None).shape() == (0, HIDDEN)


def settings_of(**changes: Any) -> MoeSettings:
    return MoeSettings(**{"num_experts": 8, "experts_per_token": 3, "feed_forward_size": 4, **changes})


@pytest.mark.clause("LM-MOE-2")
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lowest_experts(scoring: str) -> None:
    logits = np.array([[1.0, 2, 2, 0, 2, 2, 1, 2], [0.0] * 8])
    found = route(logits, settings_of(scoring=scoring))
    assert found.experts.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert np.allclose(found.weights, 1 / 3)
    groups = settings_of(scoring=scoring, num_groups=4, num_chosen_groups=2)
    assert route(logits[1:], groups).experts.tolist() == [[0, 1, 2]]


@pytest.mark.clause("LM-MOE-3")
def test_groups_are_ranked_by_their_two_best_and_the_correction_only_chooses() -> None:
    logits = np.log(
        np.array([[0.9, 0.1, 0.6, 0.6, 0.2, 0.3, 0.05, 0.05]])
        / (1 - np.array([[0.9, 0.1, 0.6, 0.6, 0.2, 0.3, 0.05, 0.05]]))
    )
    sigmoid = settings_of(scoring="sigmoid", num_groups=4, num_chosen_groups=1, experts_per_token=2)
    found = route(logits, sigmoid)
    assert found.experts.tolist() == [[2, 3]]  # 0.6 + 0.6 against 0.9 + 0.1
    assert found.weights == pytest.approx(np.array([[0.5, 0.5]]))
    found = route(logits, sigmoid, np.array([0, 0, 0, 0, 0, 1.0, 0, 0]))
    assert found.experts.tolist() == [[4, 5]]
    assert found.weights == pytest.approx(np.array([[0.4, 0.6]]))  # of the scores themselves
    negative = route(logits, settings_of(scoring="sigmoid", num_groups=4, num_chosen_groups=2), np.full(8, -5.0))
    assert set(negative.experts[0]) <= {0, 1, 2, 3}  # never a group that was not chosen, however low the ranks


@pytest.mark.clause("LM-MOE-2")
def test_a_row_with_a_nan_has_nan_weights_and_hurts_no_other() -> None:
    logits = np.zeros((2, 8))
    logits[0, 5] = np.nan
    for scoring in ("softmax", "sigmoid"):
        found = route(logits, settings_of(scoring=scoring))
        assert np.isnan(found.weights[0]).all()
        assert np.isfinite(found.weights[1]).all()


@pytest.mark.clause("LM-MOE-1", "LM-MOE-2", "LM-MOE-3")
@given(data=st.data())
def test_routing_equals_torch_topk(data: Any) -> None:
    """Away from ties, torch.topk over torch's softmax, as transformers writes it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top_k, rows = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    logits = rng.standard_normal((rows, 8)) * data.draw(st.sampled_from([0.1, 3.0, 50.0]))
    for normalised in (True, False):
        found = route(logits, settings_of(experts_per_token=top_k, normalised=normalised, scale=2.0))
        top, index = torch.topk(torch.softmax(torch.from_numpy(logits), -1), top_k)
        if normalised:
            top = top / top.sum(-1, keepdim=True)
        full = torch.zeros(rows, 8, dtype=torch.float64).scatter(1, index, 2 * top).numpy()
        mine = np.zeros((rows, 8))
        np.put_along_axis(mine, found.experts, found.weights, axis=1)
        np.testing.assert_allclose(mine, full, rtol=1e-12, atol=0)
        order = found.order()
        rows_of = [(int(row), expert) for expert, members in found.by_expert() for row in members]
        for row in range(rows):
            for slot in range(top_k):
                assert rows_of[order[row, slot]] == (row, found.experts[row, slot])
