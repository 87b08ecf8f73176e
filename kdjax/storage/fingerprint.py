"""Fingerprints of arrays, 64 bits each: the same wherever they lie, another when any bit changes.

For telling arrays apart and noticing damage; no protection against forgery.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def fingerprints(tree: Any) -> dict[str, str]:
    """Path -> 16 hex digits of every array of a tree, which its bits decide and their order.

    Integers are added modulo 2^32, which is exact in any order: a mesh, a device count or a number
    of processes makes no difference. One jitted call; every process of a mesh must make it.

    >>> fingerprints({"a": jnp.arange(3.0)}) == fingerprints({"a": jnp.arange(3.0)[::-1]})
    False
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = np.asarray(_program(_everywhere(leaves))(leaves))
    names = map(jax.tree_util.keystr, paths)
    return {name: f"{one:08x}{two:08x}" for name, (one, two) in zip(names, sums, strict=True)}


def fingerprint(tree: Any) -> str:
    """16 hex digits of a whole tree: of names, shapes, dtypes and every bit.

    >>> fingerprint({"a": jnp.zeros(3)}) == fingerprint({"b": jnp.zeros(3)})
    False
    """
    digest = hashlib.sha256(repr([kinds(tree), fingerprints(tree)]).encode())
    return digest.hexdigest()[:16]


def kinds(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of every array, or of its ShapeDtypeStruct.

    >>> kinds({"a": jnp.zeros((3, 2))})
    {"['a']": 'float32[3, 2]'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _everywhere(leaves: tuple[Any, ...]) -> NamedSharding | None:
    """Where a result lies whole on every device that holds a piece of these; None for one device"""
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    return next((NamedSharding(mesh, PartitionSpec()) for mesh in meshes), None)


@functools.lru_cache(maxsize=16)
def _program(place: NamedSharding | None):
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=place)


def _sums(values: jax.Array) -> jax.Array:
    """Two sums modulo 2^32 over what every element's bits and place are mixed to: uint32 [2].

    Places are counted row by row, without a reshape, which would gather what is sharded; they
    repeat after 2^32 elements.
    """
    if values.dtype == jnp.bool_:
        values = values.astype(jnp.uint8)
    width = min(32, 8 * values.dtype.itemsize)  # 64 bits become two words along a last axis
    bits = lax.bitcast_convert_type(values, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    first = _mixed(bits ^ _mixed(place))
    return jnp.stack(
        [jnp.sum(first, dtype=jnp.uint32), jnp.sum(_mixed(first ^ bits), dtype=jnp.uint32)]
    )


def _mixed(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3: every bit of 32 decides on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
