"""Settings of JAX that programs are not made for, and of the C library's memory."""

from __future__ import annotations

import ctypes

import jax

from kdjax.errors import ConfigError

REFUSED = {
    "jax_enable_x64": "programs are of float32 or bfloat16 (dtype) and of 32-bit integers",
    "jax_debug_nans": "NaN stands for what was not measured; a loss of your own that makes NaN is"
    " named with its line before step 1, and an update that is not finite is skipped and told",
    "jax_debug_infs": "-inf is the log-probability of a token that can't be",
}
"""Settings that must be off, with why."""


def check_settings() -> None:
    """Errors: ConfigError naming a setting of JAX's with which no program would run, as the
    environment or a config file may make it.

    >>> check_settings()
    """
    for name, why in REFUSED.items():
        if getattr(jax.config, name):
            raise ConfigError(f"{name.upper()} is set; unset it: {why}")


def return_freed_memory() -> None:
    """Give the system back what this process has freed, where the C library is glibc, which keeps
    buffers of some MiB: a KV cache of thirty layers would otherwise stay for good (460 MiB of an
    evaluation of 135 M parameters)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
