"""The mesh: its sizes, what it replicates, and how rows are dealt."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kdjax.errors import ConfigError
from kdjax.sharding import (
    batch_spec,
    data_size,
    make_mesh,
    replicated,
    shard_batch,
    vocabulary_axis,
)


def test_eight_devices_are_forced():
    """The suite runs on eight CPU devices, or no sharding test would mean anything."""
    assert jax.local_device_count() == 8


@pytest.mark.parametrize("devices", [1, 2, 8, None])
@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_meshes_have_three_named_axes(devices, fsdp, tensor):
    """The first `devices` local devices (all by default) over data x fsdp x tensor, Auto."""
    size = devices or 8
    if size % (fsdp * tensor):
        with pytest.raises(ConfigError, match=f"must divide the {size} devices, got "):
            make_mesh(devices, fsdp=fsdp, tensor=tensor)
        return
    mesh = make_mesh(devices, fsdp=fsdp, tensor=tensor)
    assert dict(mesh.shape) == {"data": size // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
    assert data_size(mesh) == size // tensor
    assert vocabulary_axis(mesh) == (None if tensor == 1 else "tensor")
    assert mesh.devices.ravel().tolist() == jax.local_devices()[:size]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("devices", [0, -1, 9])
def test_a_mesh_that_cannot_be(devices):
    """A number of devices that there is not is a ConfigError that names the range."""
    with pytest.raises(ConfigError, match=rf"devices must be in 1\.\.8 .* got {devices}"):
        make_mesh(devices)


def test_rows_are_dealt_in_order():
    """Device i holds rows 2i and 2i + 1 of a batch of 16, of every array, values unchanged."""
    mesh = make_mesh(8)
    tree = {"a": np.arange(16), "b": np.arange(48.0, dtype=np.float32).reshape(16, 3)}
    dealt = shard_batch(tree, mesh)
    for name, array in dealt.items():
        assert array.sharding == batch_spec(mesh)
        np.testing.assert_array_equal(array, tree[name])
        for shard in array.addressable_shards:
            first = 2 * mesh.devices.ravel().tolist().index(shard.device)
            np.testing.assert_array_equal(shard.data, tree[name][first : first + 2])


def test_parameters_are_whole_on_every_device():
    """`replicated` puts the whole array on each of the 8 devices."""
    whole = np.arange(6.0, dtype=np.float32)
    placed = jax.device_put(whole, replicated(make_mesh(8)))
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole)


@pytest.mark.parametrize("rows", [1, 12, 20])
def test_rows_that_do_not_divide(rows):
    """A batch that can't be dealt evenly is a ConfigError naming its rows and the multiple."""
    with pytest.raises(ConfigError) as caught:
        shard_batch({"a": np.zeros((rows, 2))}, make_mesh(8))
    message = str(caught.value)
    assert f"[{rows}] rows can't be sharded over 8 devices" in message
    assert "make it a multiple of 8" in message
    assert "\n" not in message
