"""The simulator runs the engine's own scheduler, KV-cache manager and step loop, and has none of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import ferrum_sim
import pytest
from ferrum_sim.engine import build_engine, inference_request
from ferrum_sim.settings import EngineSettings
from ferrum_sim.workload.request import SimRequest

from ferrum_ref.engine.step_loop import StepLoop
from ferrum_ref.errors import InvalidParameterError
from ferrum_ref.kv_cache.manager import PagedKvCacheManager
from ferrum_ref.scheduler.continuous_batch import ContinuousBatchScheduler
from ferrum_ref.types.sampling import Priority

SOURCES = sorted(Path(ferrum_sim.__file__).parent.rglob("*.py"))
MAY_IMPORT = {
    "ferrum_ref": {"ferrum_ref"},  # only `__version__`, for the command line
    "types": set(),
    "interfaces": set(),
    "errors": set(),
    "program": set(),  # the command line's frame
    "kv_cache": set(),
    "scheduler": set(),
    "engine": {"ferrum_ref.engine.plan", "ferrum_ref.engine.step_loop"},
}


@pytest.mark.clause("SI-ENGINE-1")
def test_the_parts_are_the_engines_own_classes() -> None:
    engine = build_engine(EngineSettings(64))
    assert type(engine.loop) is StepLoop
    assert type(engine.scheduler) is ContinuousBatchScheduler
    assert type(engine.kv_cache) is PagedKvCacheManager
    for kind in (StepLoop, ContinuousBatchScheduler, PagedKvCacheManager):
        assert kind.__module__.startswith("ferrum_ref.")


@pytest.mark.clause("SI-ENGINE-1")
def test_serving_builds_its_engine_from_the_same_classes() -> None:
    serving = pytest.importorskip("ferrum_ref.serving")
    for kind in (StepLoop, ContinuousBatchScheduler, PagedKvCacheManager):
        assert getattr(serving, kind.__name__) is kind


@pytest.mark.clause("SI-ENGINE-1")
def test_limits_reach_the_parts() -> None:
    settings = EngineSettings(64, 8, 512, 3, prefix_caching=False, policy="priority", max_waiting_requests=9)
    engine = build_engine(settings)
    assert (engine.kv_cache.num_blocks, engine.kv_cache.block_size) == (64, 8)
    assert engine.kv_cache.caches_prefixes is False
    assert (engine.loop.hint.max_tokens, engine.loop.hint.max_batch_size) == (512, 3)
    assert engine.scheduler.config().max_waiting_requests == 9
    assert engine.scheduler.policy.name == "priority"


@pytest.mark.clause("SI-ENGINE-1")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_module_decides_who_runs(source: Path) -> None:
    """No class derives from an engine part, and only the permitted rooms are imported."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}
            assert not any(word in base for base in bases for word in ("Scheduler", "KvCache", "StepLoop", "Policy"))
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] == "ferrum_ref":
                room = module.split(".")[1] if "." in module else "ferrum_ref"
                assert room in MAY_IMPORT, f"{source.name} imports {module}"
                assert not MAY_IMPORT[room] or module in MAY_IMPORT[room], f"{source.name} imports {module}"


@pytest.mark.clause("SI-ENGINE-1")
def test_requests_carry_what_the_workload_says() -> None:
    request = inference_request(SimRequest(4, 1.5, 7, 9, ((0, 7),), "high"))
    assert request.sampling_params.max_tokens == 9
    assert request.priority is Priority.High
    assert request.id.value.int == 5
    assert request.created_at.timestamp() == 1.5


@pytest.mark.clause("SI-ENGINE-1")
@pytest.mark.parametrize(
    "bad",
    [
        {"num_blocks": 0},
        {"block_size": 0},
        {"block_size": 2**20},
        {"num_blocks": 2**40},
        {"max_num_batched_tokens": 0},
        {"max_num_seqs": 0},
        {"max_waiting_requests": -1},
        {"policy": "lifo"},
    ],
)
def test_absurd_limits_are_refused(bad: dict[str, int | str]) -> None:
    with pytest.raises(InvalidParameterError, match="EngineSettings"):
        EngineSettings(**({"num_blocks": 8} | bad))  # type: ignore[arg-type]
