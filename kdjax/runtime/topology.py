"""Devices that are not here: their compilers answer whether a program compiles, and what it holds.

The compilers come with the extra `aot` (libtpu and the CUDA plugin, neither needs its device).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from kdjax.errors import ConfigError

TARGETS = ("h100", "h100:8", "h200", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


class Chip(NamedTuple):
    """What its maker publishes of a chip: memory, dense bfloat16 FLOP/s, bytes/s of its memory and
    of all its links to other chips (one way)."""

    memory_gib: float
    tflops: float
    memory_gbps: float
    link_gbps: float


CHIPS = {
    "TPU v5 lite": Chip(15.75, 197, 819, 200),  # v5e; 15.75 of 16 GiB are a program's
    "TPU v6 lite": Chip(31.25, 918, 1640, 448),  # v6e
    "TPU v5": Chip(95.0, 459, 2765, 600),  # v5p
    "NVIDIA H100 80GB HBM3": Chip(79.1, 989, 3350, 450),
    "NVIDIA H200": Chip(139.8, 989, 4800, 450),
}
"""By the kind that a device says it is. From the vendors' data sheets, not measured."""


def chip(device: jax.Device) -> Chip | None:
    """The published figures of a device's kind, if they are known here."""
    return CHIPS.get(device.device_kind)


def memory_bytes(device: jax.Device) -> float | None:
    """Memory of an accelerator: what it says itself, else what is published; None for a CPU."""
    if device.platform == "cpu":
        return None
    try:
        stated = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is not here
        stated = None
    published = chip(device)
    return stated or (published.memory_gib * 2**30 if published else None)


def devices(target: str) -> list[jax.Device]:
    """Devices to compile for: `here`, `h100`, `h100:8` (of one machine), `h200`, or a TPU topology
    such as `v5e:4x4`.

    Errors: ConfigError where the target's compiler is not installed, or does not know the target.

    >>> devices("here") == jax.devices()
    True
    """
    if target in ("here", "local"):
        return jax.devices()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud machine is asked about its chips
    gpu = re.fullmatch(r"(h100|h200)(?::(\d+))?", target)
    if not gpu and not re.fullmatch(r"\w+:\d+(x\d+)+", target):
        raise ConfigError(
            f"can't compile for {target}, an unknown target; with kdjax[aot] there are"
            f" {', '.join(TARGETS)} and any other TPU topology"
        )
    try:
        if gpu:
            described = (Path(__file__).parent / "targets" / f"{gpu[1]}.txtpb").read_text(
                encoding="utf-8"
            )
            facts = "\n".join(line for line in described.splitlines() if not line.startswith("#"))
            found = topologies.get_topology_desc(
                platform="cuda", target_config=facts, topology=f"1x1x{gpu[2] or 1}"
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except Exception as error:
        raise ConfigError(
            f"can't compile for {target} here ({str(error).splitlines()[0][:120]});"
            f' install "kdjax[aot]" in an environment of its own; targets: {", ".join(TARGETS)}'
            " and any other TPU topology"
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
