"""The mathematics: pure functions on ndarrays, each with its equation. Import the module you need.

Every kernel takes float64 arrays too and then works in float64 throughout: the same function is its own oracle.
"""
