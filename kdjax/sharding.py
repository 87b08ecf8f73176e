"""Meshes and shardings: every mesh axis name of the project stands here.

Training is data-parallel: a batch's rows are dealt over the data axis, parameters are replicated.
The tensor axis deals the rows of LM heads in the loss.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.base import ConfigError

DATA, TENSOR = "data", "tensor"

T = TypeVar("T")


def make_mesh(devices: int | None = None, tensor: int = 1) -> Mesh:
    """A mesh of the first `devices` local devices (by default all): data axis x tensor axis.

    >>> make_mesh(1).axis_names
    ('data', 'tensor')
    """
    local = jax.local_devices()
    count = len(local) if devices is None else devices
    if not 1 <= count <= len(local):
        raise ConfigError(f"devices must be in 1..{len(local)} (the local devices), got {count}")
    if tensor < 1 or count % tensor:
        raise ConfigError(f"tensor must divide the {count} devices, got {tensor}")
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(
        (count // tensor, tensor), (DATA, TENSOR), axis_types=auto, devices=local[:count]
    )


def data_size(mesh: Mesh) -> int:
    """Over how many devices a batch's rows are dealt."""
    return mesh.shape[DATA]


def vocabulary_axis(mesh: Mesh | None) -> str | None:
    """The mesh axis that the rows of LM heads are dealt over, if there is one."""
    return TENSOR if mesh is not None and mesh.shape.get(TENSOR, 1) > 1 else None


def whole_rows(logits: jax.Array, axis: str | None) -> jax.Array:
    """Inside `shard_map`: a piece of all rows [c, V / n] -> the whole of some rows [c / n, V]."""
    if axis is None:
        return logits
    return jax.lax.all_to_all(logits, axis, split_axis=0, concat_axis=1, tiled=True)


def own_rows(x: jax.Array, axis: str | None) -> jax.Array:
    """The tokens of [c, ...] that `whole_rows` gives this device."""
    if axis is None:
        return x
    rows = x.shape[0] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * rows, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def collect_rows(values: jax.Array, axis: str | None) -> jax.Array:
    """The inverse of `own_rows`: each device's tokens -> all tokens on each.

    Every device differentiates the same function of all tokens, so each takes its own tokens'
    cotangent; the default rule would sum it over the devices.
    """
    return values if axis is None else jax.lax.all_gather(values, axis, tiled=True)


collect_rows.defvjp(
    lambda values, axis: (collect_rows(values, axis), None),
    lambda axis, _, cotangent: (own_rows(cotangent, axis),),
)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and optimizer state: the whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def shard_batch(tree: T, mesh: Mesh) -> T:
    """Deal the rows of every array over the data axis; ConfigError if they don't divide."""
    rows = {np.shape(x)[0] for x in jax.tree.leaves(tree)}
    if any(n % data_size(mesh) for n in rows):
        raise ConfigError(
            f"a batch of {sorted(rows)} rows can't be dealt over {data_size(mesh)} devices;"
            f" make it a multiple of {data_size(mesh)}"
        )
    return jax.device_put(tree, batch_spec(mesh))
