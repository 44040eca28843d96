"""The order in which passes run, and an executor built by a pipeline of one's own."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_ref.builder.passes import (
    CommonSubexpressionElimination,
    RotaryFusion,
    SiblingLinearFusion,
    default_passes,
    in_dependency_order,
)
from ferrum_ref.errors import ConfigError, NotFoundError
from ferrum_ref.interfaces.model_builder import ModelIR, OptimizationPass, OptimizationResult, OptimizationStats


class Named(OptimizationPass):
    """A pass that notes that it ran, and renames the model."""

    def __init__(self, name: str, after: list[str], ran: list[str] | None = None, applies: bool = True) -> None:
        self._name, self._after, self._applies = name, after, applies
        self.ran = [] if ran is None else ran

    def name(self) -> str:
        return self._name

    def apply(self, definition: ModelIR) -> OptimizationResult:
        self.ran.append(self._name)
        return OptimizationResult(True, OptimizationStats(1, 2, 3, 1.5), ["done"])

    def is_applicable(self, definition: ModelIR) -> bool:
        return self._applies

    def dependencies(self) -> list[str]:
        return self._after


@pytest.mark.clause("MB-ORDER-2")
@given(data=st.data())
def test_dependencies_first_and_else_as_given(data: st.DataObject) -> None:
    names = [f"p{i}" for i in range(data.draw(st.integers(1, 7)))]
    after = {
        name: data.draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, name in enumerate(names)
    }
    given_order = data.draw(st.permutations(names))
    found = [each.name() for each in in_dependency_order([Named(name, after[name]) for name in given_order])]
    assert sorted(found) == sorted(names)
    place = {name: i for i, name in enumerate(found)}
    assert all(place[other] < place[name] for name in names for other in after[name])
    # Of all valid orders it is the one that prefers what was given earlier: compare with brute force.
    if len(names) <= 5:
        valid = [
            order
            for order in permutations(given_order)
            if all(order.index(other) < order.index(name) for name in names for other in after[name])
        ]
        assert tuple(found) == min(valid, key=lambda order: [given_order.index(name) for name in order])


@pytest.mark.clause("MB-ORDER-2")
def test_pipelines_that_cannot_run() -> None:
    with pytest.raises(ConfigError, match="a -> c -> b -> a"):
        in_dependency_order([Named("z", []), Named("a", ["c"]), Named("b", ["a"]), Named("c", ["z", "b"])])
    with pytest.raises(ConfigError, match="a -> a"):
        in_dependency_order([Named("a", ["a"])])
    with pytest.raises(NotFoundError, match="'moon'"):
        in_dependency_order([Named("a", ["moon"])])
    with pytest.raises(ConfigError, match="two passes called 'a'"):
        in_dependency_order([Named("a", []), Named("a", [])])
    with pytest.raises(NotFoundError, match="sibling-linear-fusion"):
        in_dependency_order([RotaryFusion()])
    turned = in_dependency_order([RotaryFusion(), CommonSubexpressionElimination(), SiblingLinearFusion()])
    assert [each.name() for each in turned][-1] == "rotary-fusion"
    assert in_dependency_order([]) == []


@pytest.mark.clause("MB-ORDER-2", "MB-ORDER-3")
def test_a_pipeline_of_ones_own(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    model = saved(1)
    ran: list[str] = []
    mine = [Named("b", ["a"], ran), Named("a", [], ran), Named("c", [], ran, applies=False)]
    executor = run(builder.build_with_optimization(model.config(), [*mine, *default_passes(3)], backend, loader))
    assert ran == ["a", "b"]
    results = executor.info().metadata["optimizations"]
    assert results["a"] == {
        "applied": True,
        "stats": {
            "parameters_eliminated": 1, "operations_eliminated": 2, "memory_saved": 3, "estimated_speedup": 1.5
        },
        "warnings": ["done"],
    }  # fmt: skip
    assert "c" not in results
    assert results["swiglu-fusion"]["stats"]["operations_eliminated"] == 3
    assert model.error(prompt_logits(executor, model.ids)) <= model.bound
    with pytest.raises(ConfigError, match="a -> b -> a"):
        run(
            builder.build_with_optimization(
                model.config(), [Named("a", ["b"], ran), Named("b", ["a"], ran)], backend, loader
            )
        )
    assert ran == ["a", "b"]


@pytest.mark.clause("MB-RUN-1", "MB-ORDER-1")
def test_level_2_by_hand_is_the_decoder(
    saved: Any, builder: Any, backend: Any, loader: Any, run: Any, prompt_logits: Any
) -> None:
    model = saved(1)
    graph = run(builder.build_with_optimization(model.config(), list(default_passes(2)), backend, loader))
    decoder = run(builder.build_model(model.config(), backend, loader))
    np.testing.assert_array_equal(prompt_logits(graph, model.ids), prompt_logits(decoder, model.ids))
    nothing = run(builder.build_with_optimization(model.config(), [], backend, loader))
    assert nothing._decoder.num_steps == 22 * 3 + 8
    assert graph._decoder.num_steps < nothing._decoder.num_steps
