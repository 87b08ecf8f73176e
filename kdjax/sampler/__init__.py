"""Sampling: tokens with their log-probabilities, by this process or by an engine behind HTTP."""

from kdjax.sampler.choose import check_sampling
from kdjax.sampler.engine import open_engine
from kdjax.sampler.local import generate

__all__ = ["check_sampling", "generate", "open_engine"]
