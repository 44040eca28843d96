"""Bound of k arithmetic operations on an element.  Clause: PA-ELEMENTWISE-1."""

from __future__ import annotations

from ferrum_ref.parity.error_model import ErrorModel
from ferrum_ref.parity.units import Array


def elementwise_error(model: ErrorModel, num_operations: int, magnitude: Array) -> Array:
    """e = gamma_k * (sum of the terms' absolute values) + extra roundings of it. Pure.

    num_operations: arithmetic operations between the stored inputs and the result; magnitude (...): sum of abs terms.
    A product below the accumulator's normal range may be flushed, hence the last term.
    """
    error: Array = (model.gamma(num_operations) + model.extra) * magnitude
    return error + model.underflow


def quotient_error(model: ErrorModel, value: Array) -> Array:
    """e of y = a / b: tau_div |y|, and what a quotient below the accumulator's normal range may lose. Pure."""
    error: Array = (model.tau(model.algorithm.div_ulp) + model.extra) * abs(value)
    return error + model.flush
