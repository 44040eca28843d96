"""Optimisation passes over the IR; every one proves that it keeps what the graph computes."""

from ferrum_ref.builder.passes.cleanup import CommonSubexpressionElimination, DeadNodeElimination
from ferrum_ref.builder.passes.folding import ConstantFolding, NormScaleFolding, ScaleFolding
from ferrum_ref.builder.passes.fusion import ResidualNormFusion, RotaryFusion, SiblingLinearFusion, SwigluFusion
from ferrum_ref.builder.passes.pipeline import apply_passes, default_passes, in_dependency_order
from ferrum_ref.builder.passes.rewrite import GraphPass, GraphSize, measure

__all__ = [
    "CommonSubexpressionElimination",
    "ConstantFolding",
    "DeadNodeElimination",
    "GraphPass",
    "GraphSize",
    "NormScaleFolding",
    "ResidualNormFusion",
    "RotaryFusion",
    "ScaleFolding",
    "SiblingLinearFusion",
    "SwigluFusion",
    "apply_passes",
    "default_passes",
    "in_dependency_order",
    "measure",
]
