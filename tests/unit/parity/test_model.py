"""A whole decoder against its float64 run: the yardstick itself, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ferrum_ref.cli.parity_model import judge_decoder, reference_runs
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.models.rope_config import RopeSettings
from ferrum_ref.models.tensor_names import expected_tensors
from ferrum_ref.numpy_backend import make_backend
from ferrum_ref.parity.model import FLOOR_FACTOR, ModelVerdict, compared_points
from ferrum_ref.parity.model_report import model_as_json, model_lines, model_table
from ferrum_ref.parity.model_trace import Deviation, Trace
from ferrum_ref.parity.wide.arithmetic import Arithmetic

Array = np.ndarray[Any, Any]
CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


class Tensors:
    """Weights in memory, in the place of an opened checkpoint."""

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Array]) -> None:
        self.config, self.tensors = config, dict(tensors)

    def read(self, name: str, dtype: Any = np.float32, out: Array | None = None) -> Array:
        values = self.tensors[name].astype(dtype)
        if out is not None:
            out[...] = values
            return out
        return values


def random_weights(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(CONFIG):
        drawn = rng.standard_normal(shape) * (0.15 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        tensors[name] = drawn.astype(np.float32)
    tensors["model.embed_tokens.weight"] *= np.float32(4.0)
    return Tensors(CONFIG, tensors)


def verdict_on(decoded: Tensors, backend: ComputeBackend | None = None, num_generated: int = 6) -> ModelVerdict:
    """The judge holds the true weights, the decoder those of `decoded`."""
    chosen = backend or make_backend()
    decoder = Decoder(CONFIG, read_decoder_weights(decoded, chosen, num_threads=1), chosen)
    return judge_decoder(decoder, random_weights(), PROMPT, num_generated)


@pytest.mark.clause("PA-MODEL-1", "PA-MODEL-2", "PA-MODEL-3", "PA-MODEL-4", "PA-MODEL-5")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_an_honest_backend_stays_on_the_floor(name: str) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    from ferrum_ref.plugins import load_backend

    verdict = verdict_on(random_weights(), load_backend(name))
    assert verdict.passed, verdict.faults
    assert [point.name for point in verdict.layers] == [f"layers.{index}.hidden" for index in range(3)]
    assert all(0 < point.error <= FLOOR_FACTOR * point.floor for point in verdict.layers)
    assert verdict.greedy_prefix == verdict.num_generated == 6
    assert verdict.kl_max < 1e-9
    assert verdict.text_token_ids[: len(PROMPT)] == tuple(PROMPT)


@pytest.mark.clause("PA-MODEL-3")
@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "layers.1.qkv"),
        ("model.layers.1.self_attn.o_proj.weight", "layers.1.after_attention"),
        ("model.layers.2.mlp.up_proj.weight", "layers.2.gated"),
        ("model.layers.0.mlp.down_proj.weight", "layers.0.hidden"),
        ("model.layers.2.input_layernorm.weight", "layers.2.attention_norm"),
    ],
)
def test_the_first_place_that_goes_wrong_is_named(damaged: str, expected: str) -> None:
    """One row of one weight is off by a part in ten thousand: bits that only the third decimal of a logit shows."""
    weights = random_weights()
    weights.tensors[damaged][0] *= np.float32(1.0001)
    verdict = verdict_on(weights)
    assert verdict.first_outside == expected
    assert any(expected in fault for fault in verdict.faults)


@pytest.mark.clause("PA-MODEL-4", "PA-MODEL-5", "PA-REPORT-5")
def test_a_wrong_head_fails_by_its_logits_and_a_wrong_answer_by_its_tokens() -> None:
    weights = random_weights()
    weights.tensors["model.norm.weight"] = np.flip(weights.tensors["model.norm.weight"]).copy()
    verdict = verdict_on(weights)
    assert verdict.first_outside is None
    assert any("logits err by" in fault for fault in verdict.faults)
    rng = np.random.default_rng(5)
    weights.tensors["model.norm.weight"] = rng.standard_normal(CONFIG.hidden_size).astype(np.float32)
    verdict = verdict_on(weights)
    assert verdict.greedy_prefix < verdict.num_generated
    assert verdict.margin is not None
    assert verdict.margin > 0
    assert any("greedy tokens differ" in fault for fault in verdict.faults)
    text = "\n".join(model_lines(verdict))
    assert "FAILED: " in text
    assert "at the first difference float64 decides by" in text


@pytest.mark.clause("PA-REPORT-5", "PA-REPORT-4")
def test_the_report_names_first_worst_and_last_layer_and_is_json() -> None:
    import json

    verdict = verdict_on(random_weights())
    table = model_table(verdict, "a title")
    assert 2 <= table.row_count <= 3
    document = model_as_json(verdict)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["status"] == "passed"
    assert len(document["layers"]) == 3
    assert document["rows"] == {"compared": verdict.num_rows, "all": verdict.num_rows}
    assert "rows" not in " ".join(model_lines(verdict)).split("best token")[0]
    fewer = replace(verdict, num_compared_rows=2)
    assert f"compared: 2 of {verdict.num_rows} rows" in "\n".join(model_lines(fewer))
    assert any("nothing could be compared" in fault for fault in replace(verdict, num_compared_rows=0).faults)


@pytest.mark.clause("PA-MODEL-2")
def test_the_second_floor_run_adds_up_the_other_way_round() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((4, 300)).astype(np.float32), rng.standard_normal((5, 300)).astype(np.float32)
    forwards, backwards = Arithmetic(np.float32), Arithmetic(np.float32, reversed_sums=True)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    errors = [np.abs(one.linear(x, weight) - exact).max() for one in (forwards, backwards)]
    assert all(0 < error < 1e-4 for error in errors)
    assert (forwards.linear(x, weight) != backwards.linear(x, weight)).any()


@pytest.mark.clause("PA-MODEL-7")
def test_positions_whose_tables_depend_on_the_length_so_far_are_refused() -> None:
    rope = RopeSettings(rotary_dim=8, theta=1e4, kind="dynamic", factor=2.0, original_positions=12)
    grown = replace(CONFIG, rope=rope)
    weights = Tensors(grown, random_weights().tensors)
    backend = make_backend()
    decoder = Decoder(grown, read_decoder_weights(weights, backend, num_threads=1), backend)
    assert judge_decoder(decoder, weights, PROMPT, 4).passed
    with pytest.raises(UnsupportedError, match="13 tokens with rope_type 'dynamic'"):
        judge_decoder(decoder, weights, PROMPT, 5)


@pytest.mark.clause("PA-WIDE-3", "PA-WIDE-4")
def test_one_copy_of_the_weights_as_they_are_stored_serves_all_three_runs() -> None:
    weights = random_weights()
    runs = reference_runs(weights, 16)
    observed: list[dict[str, Array]] = []
    for run in (runs.wide, *runs.floors):
        seen: dict[str, Array] = {}
        run.observed(PROMPT, lambda name, tensor, seen=seen: seen.update({name: tensor.to_numpy()}))  # type: ignore[misc]
        observed.append(seen)
    assert [seen["layers.0.hidden"].dtype.name for seen in observed] == ["float64", "float32", "float32"]
    table = weights.tensors["model.embed_tokens.weight"][PROMPT]
    assert all((seen["embedding"] == table).all() for seen in observed)


def routed(exact: list[int], floor: list[int], got: list[int], far: float = 0.0) -> tuple[list[Any], int]:
    """Five rows through one router; from its row on, whoever goes to another expert is off by 1 and not by 1e-7."""
    name, values = "layers.0.router", {"embedding": np.ones((5, 2)), "layers.0.router": np.ones((5, 3))}
    values |= {"layers.0.routed": np.ones((5, 2)), "logits": np.ones((5, 2))}

    def deviation(chosen: list[int], at_router: float) -> Deviation:
        other = np.maximum.accumulate(np.array(chosen) != np.array(exact))
        squares = {point: np.where(other, 1.0, 1e-14) for point in values}
        squares["embedding"], squares[name] = np.full(5, 1e-14), np.full(5, 1e-14 + at_router)
        return Deviation(squares, {name: np.array(chosen)[:, None]}, np.ones((5, 2)))

    trace = Trace(values, {name: np.array(exact)[:, None]})
    return compared_points(trace, [deviation(floor, 0.0)], deviation(got, far))


@pytest.mark.clause("PA-MODEL-6")
def test_rows_that_float32_sends_to_other_experts_are_left_out() -> None:
    same = [0, 1, 2, 0, 1]
    assert routed(same, same, same)[1] == 5
    points, num_rows = routed(same, [0, 1, 2, 2, 1], same)  # the floor itself decides otherwise
    assert num_rows == 3
    assert points[-1].floor < 1e-6
    points, num_rows = routed(same, same, [0, 1, 0, 0, 1])  # the judged run does, from router logits on the floor
    assert num_rows == 2
    assert all(point.inside for point in points)


@pytest.mark.clause("PA-MODEL-6")
def test_another_expert_is_no_excuse_for_router_logits_off_the_floor() -> None:
    points, num_rows = routed([0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [0, 1, 0, 0, 1], far=1.0)
    assert num_rows == 5
    assert [point.name for point in points if not point.inside] == ["layers.0.router", "layers.0.routed", "logits"]
