"""Samplers of a run: the parameters that they read, and the devices and memory that they take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax import models
from kdjax.base import Model, Params, Sampler, Sampling
from kdjax.config.engines import Rollouts
from kdjax.rollouts.sampler import CACHE_BYTES, Drawn, open_sampler
from kdjax.runtime import topology
from kdjax.sharding import (
    on_own_devices,
    own_mesh,
    rollout_mesh,
    shardings,
)


def to_sampler(params: Params, dtype: DTypeLike, mesh: Mesh) -> Any:
    """A jitted convert(params) -> those that the model's sampler reads: unstacked, in `dtype`, on
    the `rollout_mesh` of `mesh`. params: shapes."""
    made = jax.eval_shape(models.unstacked, params)
    axes = models.unstacked_axes(params)
    places = shardings(rollout_mesh(mesh), made, axes)

    def convert(params: Params) -> Params:
        return models.unstacked(models.narrow(params, dtype))

    return jax.jit(convert, out_shardings=places)


def read_by_sampler(params: Params, dtype: DTypeLike, mesh: Mesh) -> Callable[[Params], Params]:
    """`to_sampler` with its result on this process's devices alone. All processes call the function
    together; each can then draw without the others."""
    if shares_memory(params, dtype, mesh):
        return functools.partial(_in_place, rollout_mesh(mesh))
    convert = to_sampler(params, dtype, mesh)
    return lambda params: on_own_devices(convert(params))


def shares_memory(params: Params, dtype: DTypeLike, mesh: Mesh) -> bool:
    """Whether `read_by_sampler` copies nothing: on a single CPU device, of parameters that have
    their dtypes already, a layer is the memory of its place in the stack."""
    made = jax.eval_shape(lambda params: models.narrow(params, dtype), params)
    same = [x.dtype for x in jax.tree.leaves(made)] == [x.dtype for x in jax.tree.leaves(params)]
    return same and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _in_place(mesh: Mesh, params: Params) -> Params:
    """Layers as views of NumPy's, whose memory JAX's arrays on a CPU share. Where a step is given
    the stacks to write in while these live, it is given a copy."""
    layers = models.unstacked(jax.tree.map(np.asarray, params))
    return jax.device_put(layers, shardings(mesh, layers, models.unstacked_axes(params)))


def sampler_mesh(mesh: Mesh) -> Mesh:
    """The mesh that draws this process's share of the rows of a batch on `mesh`."""
    return own_mesh(rollout_mesh(mesh))


def sampler_of(
    rollouts: Rollouts,
    mesh: Mesh,
    model: Model,
    sampling: Sampling,
    stop_ids: Sequence[int],
    vocabulary: int,
    drawn: Drawn = lambda ended, tokens: None,
) -> Sampler:
    """A model's sampler on the `sampler_mesh` of a mesh.

    Args:
        rollouts: the config's: rows at a time, and the cache's memory.
        mesh: the model's.
        model, sampling, stop_ids, vocabulary, drawn: as in `open_sampler`.
    """
    return open_sampler(
        model,
        stop_ids=stop_ids,
        sampling=sampling,
        vocabulary=vocabulary,
        mesh=sampler_mesh(mesh),
        rows=rollouts.rows,
        cache_bytes=cache_bytes(rollouts.cache_gib, mesh),
        drawn=drawn,
    )


def cache_bytes(cache_gib: float | None, mesh: Mesh) -> float:
    """The most bytes of each device that the KV cache may take."""
    if cache_gib is not None:
        return cache_gib * 2**30
    stated = topology.memory_bytes(mesh.devices.flat[0])
    return 0.25 * stated if stated else CACHE_BYTES
