"""A backend of the judge's own: any decoder written over the contracts runs in float64 on it.

    tensor     arrays as they are stored, or in the arithmetic of the run
    ops        primitive and fused operations, each the oracle's kernel in that arithmetic
    backend    the ComputeBackend

It is no product backend: it is slow, knows one element type, and exists to be compared with.  Clauses: PA-WIDE-1..4.
"""
