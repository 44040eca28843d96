"""Sampling for whole requests, over the contracts of `ferrum_ref.interfaces.sampler`."""

from ferrum_ref.sampling.multi import WithoutReplacementSampler
from ferrum_ref.sampling.request import RequestSampler
from ferrum_ref.sampling.rng import RequestRandom

__all__ = ["RequestRandom", "RequestSampler", "WithoutReplacementSampler"]
