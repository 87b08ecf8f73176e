"""Sampling: tokens with their log-probabilities, by this process or by an engine behind HTTP."""

from kdjax.sampler.local import generate
from kdjax.sampler.samples import Sampler, Samples, Sampling

__all__ = ["Sampler", "Samples", "Sampling", "generate"]
