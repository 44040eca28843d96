"""Realistic bugs, each a variant of an honest kernel or a wrapper of an engine part; never part of a product.

The judge is good as far as it rejects them: `matrix` says which suite kills which.

Clauses: PA-GUARD-4, PA-MUTANT-1..5 (specs/parity.md).
"""
