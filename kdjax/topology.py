"""Devices that are not here: their compilers answer whether a program compiles, and what it holds.

The compilers come with the extra `aot` (libtpu and the CUDA plugin, neither needs its device).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from kdjax.base import ConfigError

TARGETS = ("h100", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def devices(target: str) -> list[jax.Device]:
    """Devices to compile for: `here`, `h100`, or a TPU topology such as `v5e:2x2`.

    Errors: ConfigError where the target's compiler is not installed, or does not know the target.

    >>> devices("here") == jax.devices()
    True
    """
    if target == "here":
        return jax.devices()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud machine is asked about its chips
    try:
        if target == "h100":
            described = (Path(__file__).parent / "targets" / "h100.txtpb").read_text()
            facts = "\n".join(line for line in described.splitlines() if not line.startswith("#"))
            found = topologies.get_topology_desc(
                platform="cuda", target_config=facts, topology="1x1x1"
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except Exception as error:
        raise ConfigError(
            f"can't compile for {target} here ({str(error).splitlines()[0][:120]});"
            f' install "kdjax[aot]" in an environment of its own; targets: {", ".join(TARGETS)}'
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compile without the persistent cache: it can't read back what was made for absent devices."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
