"""A fingerprint is of every bit and its place, and of nothing else."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import state_of
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.sharding import make_mesh
from kdjax.storage.fingerprint import fingerprint, fingerprints

PLAIN = jnp.arange(16.0).reshape(8, 2)
CHANGES = {
    "a bit": PLAIN.at[3, 1].set(np.nextafter(np.float32(7), np.float32(8))),
    "a sign of zero": PLAIN.at[0, 0].set(-0.0),
    "two rows exchanged": PLAIN[jnp.array([1, 0, *range(2, 8)])],
    "two values exchanged": PLAIN.at[0, 0].set(15).at[7, 1].set(0),
    "all signs": -PLAIN,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_bit_and_its_place(change):
    """What is changed is named, and nothing else is."""
    before = fingerprints({"a": PLAIN, "b": PLAIN})
    after = fingerprints({"a": CHANGES[change], "b": PLAIN})
    assert [name for name in before if before[name] != after[name]] == ["['a']"]


def test_every_single_bit():
    """Any of the 512 bits of an array gives another value than all others."""
    raw = np.asarray(PLAIN).view(np.uint32)
    found = {fingerprint(raw)}
    for at, bit in itertools.product(np.ndindex(raw.shape), range(32)):
        flipped = raw.copy()
        flipped[at] ^= np.uint32(1 << bit)
        found.add(fingerprint(flipped))
    assert len(found) == 513


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "bfloat16", "float16", "int32"])
def test_dtypes(dtype):
    """Every width, and scalars."""
    ones, zeros, last = (
        jnp.ones((3, 2), dtype),
        jnp.zeros((3, 2), dtype),
        jnp.eye(3, 2, dtype=dtype),
    )
    values = fingerprints([ones, zeros, last, ones[0, 0], zeros[0, 0]])
    assert len(set(values.values())) == 5


def test_names_shapes_and_dtypes_are_of_a_whole():
    """The same bits under another name, shape or dtype are another tree."""
    others = [{"b": PLAIN}, {"a": PLAIN.reshape(4, 4)}, {"a": PLAIN.view(jnp.int32)}, {"a": -PLAIN}]
    assert len({fingerprint({"a": PLAIN}), *map(fingerprint, others)}) == 5


def test_no_mesh_changes_it():
    """1, 2, 4 and 8 devices, rows or columns dealt, a mesh or none: the same values."""
    params = state_of(1).params
    wanted = fingerprints(jax.device_get(params))
    for devices in (1, 2, 4, 8):
        assert fingerprints(state_of(1, devices).params) == wanted
    for spec in (("fsdp", "tensor"), (None, ("tensor", "fsdp"))):
        place = NamedSharding(make_mesh(8, 4, 2), PartitionSpec(*spec))
        dealt = fingerprints({"embed": jax.device_put(params["embed"], place)})
        assert dealt.items() <= wanted.items()
