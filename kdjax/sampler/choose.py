"""Which token comes next: a distribution from logits, and one draw of it, on the device."""

from __future__ import annotations

from kdjax.base import ConfigError, Sampling


def check_sampling(sampling: Sampling, prefix: str = "") -> None:
    """Errors: ConfigError naming a value that no distribution has.

    >>> check_sampling(Sampling(top_p=0.9))
    """
    for name, good, wanted in (
        ("temperature", sampling.temperature >= 0, "at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("top_k", sampling.top_k >= 0, "at least 0 (0 is no limit)"),
        ("min_p", 0 <= sampling.min_p < 1, "in [0, 1)"),
    ):
        if not good:
            got = getattr(sampling, name)
            raise ConfigError(f"{prefix}{name} must be {wanted}, got {got}")
