"""Sampling: tokens with their log-probabilities, by this process or by an engine behind HTTP."""

from kdjax.sampler.choose import check_sampling
from kdjax.sampler.engine import check_url, open_engine
from kdjax.sampler.local import CACHE_BYTES, generate, open_sampler

__all__ = ["CACHE_BYTES", "check_sampling", "check_url", "generate", "open_engine", "open_sampler"]
