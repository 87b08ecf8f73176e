"""Meshes and shardings: every mesh axis name of the project stands here.

Training is data-parallel over one named axis; a batch's rows are dealt over it and parameters are
replicated.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.base import ConfigError

DATA = "data"

T = TypeVar("T")


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` local devices (all of them by default) over the data axis.

    >>> make_mesh(1).axis_names
    ('data',)
    """
    local = jax.local_devices()
    count = len(local) if devices is None else devices
    if not 1 <= count <= len(local):
        raise ConfigError(f"devices must be in 1..{len(local)} (the local devices), got {count}")
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,), devices=local[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and optimizer state: the whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def shard_batch(tree: T, mesh: Mesh) -> T:
    """Deal the rows of every array over the data axis; ConfigError if they don't divide."""
    rows = {np.shape(x)[0] for x in jax.tree.leaves(tree)}
    if any(n % mesh.size for n in rows):
        raise ConfigError(
            f"a batch of {sorted(rows)} rows can't be dealt over {mesh.size} devices;"
            f" make it a multiple of {mesh.size}"
        )
    return jax.device_put(tree, batch_spec(mesh))
