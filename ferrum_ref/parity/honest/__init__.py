"""Legitimate algorithms: different orders of summation, schedules and formulas that all keep their declaration.

Each is a function of `Inputs`, written apart from the kernels, in float32 with one rounding to the storage type; at
least four for every operation. The judge must never call one of them wrong, and mutants are made from them.
Clause: PA-GUARD-5 (specs/parity.md).
"""
