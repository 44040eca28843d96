"""Which passes run, and in which order.  Clauses: MB-ORDER-1..3 (specs/model_builder.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_ref.builder.passes.cleanup import CommonSubexpressionElimination, DeadNodeElimination
from ferrum_ref.builder.passes.folding import ConstantFolding, NormScaleFolding, ScaleFolding
from ferrum_ref.builder.passes.fusion import ResidualNormFusion, RotaryFusion, SiblingLinearFusion, SwigluFusion
from ferrum_ref.builder.passes.rewrite import GraphPass
from ferrum_ref.errors import ConfigError, NotFoundError
from ferrum_ref.interfaces.model_builder import ModelIR, OptimizationPass, OptimizationResult


def default_passes(level: int) -> list[GraphPass]:
    """The passes of an optimisation level. Pure.  [MB-ORDER-1]

    0 none; 1 those that change no bit of a float32 result; 2 all that keep the parameters' values; 3 all.
    Raises ConfigError for another level.
    """
    if not 0 <= level <= 3:
        raise ConfigError(f"optimization_level: got {level}, expected 0, 1, 2 or 3")
    passes: list[GraphPass] = []
    if level >= 1:
        passes += [CommonSubexpressionElimination(), ConstantFolding()]
    if level >= 2:
        passes += [ScaleFolding(), SiblingLinearFusion(), RotaryFusion()]
    if level >= 1:
        passes += [SwigluFusion(), ResidualNormFusion()]
    if level >= 3:
        passes.append(NormScaleFolding())
    if level >= 1:
        passes.append(DeadNodeElimination())
    return passes


def in_dependency_order(pipeline: Sequence[OptimizationPass]) -> list[OptimizationPass]:
    """The passes, each after those it depends on, and otherwise as given. Pure.  [MB-ORDER-2]

    Raises ConfigError (two of one name, a cycle), NotFoundError (a dependency that is not in the pipeline).
    """
    by_name: dict[str, OptimizationPass] = {}
    for each in pipeline:
        if by_name.setdefault(each.name(), each) is not each:
            raise ConfigError(f"optimization pipeline: got two passes called {each.name()!r}, expected one of each")
    waiting = {name: list(dict.fromkeys(each.dependencies())) for name, each in by_name.items()}
    for name, needed in waiting.items():
        for other in needed:
            if other not in by_name:
                raise NotFoundError(f"optimization pipeline: {name!r} depends on {other!r}, which is not in it; add it")
    ordered: list[OptimizationPass] = []
    done: set[str] = set()
    while waiting:
        ready = next((name for name, needed in waiting.items() if done.issuperset(needed)), None)
        if ready is None:
            raise ConfigError(f"optimization pipeline: {' -> '.join(_cycle(waiting))}: passes depend on each other")
        del waiting[ready]
        done.add(ready)
        ordered.append(by_name[ready])
    return ordered


def apply_passes(definition: ModelIR, pipeline: Sequence[OptimizationPass]) -> dict[str, OptimizationResult]:
    """Run the passes that apply, in dependency order; results by name.  Mutates `definition`.  [MB-ORDER-3]"""
    results: dict[str, OptimizationResult] = {}
    for each in in_dependency_order(pipeline):
        if each.is_applicable(definition):
            results[each.name()] = each.apply(definition)
    return results


def _cycle(waiting: dict[str, list[str]]) -> list[str]:
    """One cycle, from a name back to itself."""
    path: list[str] = []
    name = next(iter(waiting))
    while name not in path:
        path.append(name)
        name = next(other for other in waiting[name] if other in waiting)
    return [*path[path.index(name) :], name]
