"""Meshes and shardings: the one place of every mesh axis name.

A batch's rows are sharded over data and fsdp; parameters and optimizer state over fsdp (their
width) and tensor (heads, MLP columns, vocabulary rows). Models and heads name logical axes only;
RULES and `spec` map those to mesh axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from kdjax.errors import ConfigError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

BATCH, EMBED, HEADS, KV_HEADS, MLP, VOCAB = "batch", "embed", "heads", "kv_heads", "mlp", "vocab"
RULES: dict[str, tuple[str, ...]] = {
    BATCH: (DATA, FSDP),
    EMBED: (FSDP,),
    HEADS: (TENSOR,),
    KV_HEADS: (TENSOR,),
    MLP: (TENSOR,),
    VOCAB: (TENSOR,),
}
"""Logical axis -> the mesh axes that shard it."""

T = TypeVar("T")


def make_mesh(
    devices: int | Sequence[jax.Device] | None = None, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh (data, fsdp, tensor) of these devices; a number: of the first so many local devices;
    None: of all local devices.

    >>> make_mesh(1).axis_names
    ('data', 'fsdp', 'tensor')
    """
    if devices is None or isinstance(devices, int):
        local = jax.local_devices()
        count = len(local) if devices is None else devices
        if not 1 <= count <= len(local):
            raise ConfigError(
                f"devices must be in 1..{len(local)} (the local devices), got {count}"
            )
        chosen = local[:count]
    else:
        chosen = list(devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor), ("fsdp x tensor", fsdp * tensor)):
        if size < 1 or len(chosen) % size:
            raise ConfigError(f"{name} must divide the {len(chosen)} devices, got {size}")
    return jax.make_mesh(
        (len(chosen) // (fsdp * tensor), fsdp, tensor),
        (DATA, FSDP, TENSOR),
        axis_types=(AxisType.Auto,) * 3,
        devices=chosen,
    )


def rollout_mesh(mesh: Mesh) -> Mesh:
    """The same devices with fsdp folded into data: while decoding, weights are replicated or
    sharded over tensor, so that none is gathered again for each token."""
    devices = mesh.devices.reshape(-1, 1, mesh.shape[TENSOR])
    return Mesh(devices, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def owners(mesh: Mesh) -> int:
    """The number of processes that own the mesh's devices.

    >>> owners(make_mesh(1))
    1
    """
    return len({device.process_index for device in mesh.devices.flat})


def own_mesh(mesh: Mesh) -> Mesh:
    """The submesh of this process's devices, which draws this process's share of the rows; the mesh
    itself in a run of one process.

    Errors: ConfigError where the tensor axis spans devices of two processes.
    """
    if jax.process_count() == 1:
        return mesh
    groups = mesh.devices.reshape(-1, mesh.shape[TENSOR])
    whose = [{device.process_index for device in group} for group in groups]
    if any(len(processes) > 1 for processes in whose):
        raise ConfigError(
            f"layout.tensor {mesh.shape[TENSOR]} parts a model over the devices of several"
            f" processes, which draw apart; choose a divisor of {jax.local_device_count()}"
        )
    own = [g for g, who in zip(groups, whose, strict=True) if who == {jax.process_index()}]
    devices = np.stack(own).reshape(-1, 1, mesh.shape[TENSOR])
    return Mesh(devices, (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def on_own_devices(tree: T) -> T:
    """Arrays replicated over the data axis of a `rollout_mesh` -> the same on its `own_mesh`,
    without a copy."""
    if jax.process_count() == 1:
        return tree

    def local(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        place = NamedSharding(own_mesh(x.sharding.mesh), x.sharding.spec)  # type: ignore[arg-type]
        pieces = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, place, pieces)

    return jax.tree.map(local, tree)


def data_size(mesh: Mesh) -> int:
    """The number of devices that a batch's rows are sharded over."""
    return pieces(mesh, BATCH)


def pieces(mesh: Mesh | None, axis: str) -> int:
    """The number of shards of a logical axis by RULES, where they divide its size."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


def spec(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array by its logical axes: RULES, where the mesh has the axis and its
    size divides the dimension; other dimensions are not sharded.

    >>> tuple(spec(make_mesh(1), (8, 4), (BATCH, None)))
    (('data', 'fsdp'), None)
    """
    sharded: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(n for n in RULES.get(axis or "", ()) if n in mesh.shape)
        divides = size % math.prod(mesh.shape[n] for n in names) == 0
        sharded.append((names if len(names) > 1 else names[0]) if names and divides else None)
    return PartitionSpec(*sharded)


def shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """The sharding of every array of a tree, from a tree of its logical axes."""
    return jax.tree.map(lambda x, a: NamedSharding(mesh, spec(mesh, x.shape, a)), shapes, axes)


def constrain(mesh: Mesh | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """x, sharded by its logical axes; x itself without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, x.shape, axes)))


def gathered(
    mesh: Mesh | None, weight: jax.Array, dtype: DTypeLike, axes: Sequence[str | None]
) -> jax.Array:
    """A parameter as a layer uses it: cast to `dtype`, then gathered along its width (fsdp).

    The cast copy is what devices send; its gradient is scattered back to the parameter's shards.
    """
    if mesh is None or mesh.size == 1 or EMBED not in axes:
        return weight
    whole = tuple(None if axis == EMBED else axis for axis in axes)

    @jax.custom_vjp
    def gather(cast):
        return constrain(mesh, cast, *whole)

    gather.defvjp(lambda w: (gather(w), None), lambda _, g: (constrain(mesh, g, *axes),))
    return gather(weight.astype(dtype))


def lookup(
    mesh: Mesh | None, table_vd: jax.Array, tokens_bt: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Rows of an embedding table in `dtype`: [V, D], [B, T] -> [B, T, D].

    The table is not gathered: each device looks up its own columns of its own rows, and the rows
    found are exchanged. The gradient is summed in the table's dtype, not in `dtype`.
    """
    if mesh is None or mesh.size == 1:
        return table_vd[tokens_bt].astype(dtype)
    table_spec = spec(mesh, table_vd.shape, (VOCAB, EMBED))
    rows, columns = table_spec
    tokens_spec = spec(mesh, tokens_bt.shape, (BATCH, None))
    if columns is not None and tokens_spec[0] is None:  # nothing to exchange rows for
        columns, table_spec = None, PartitionSpec(rows, None)

    def local(table, tokens):
        if columns is not None:
            tokens = jax.lax.all_gather(tokens, columns, tiled=True)
        if rows is None:
            found = table[tokens].astype(dtype)
        else:
            here = tokens - jax.lax.axis_index(rows) * table.shape[0]
            own = (here >= 0) & (here < table.shape[0])
            found = jnp.where(own[..., None], table[jnp.where(own, here, 0)].astype(dtype), 0)
            found = jax.lax.psum(found, rows)
        if columns is None:
            return found
        return jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(table_spec, tokens_spec),
        out_specs=PartitionSpec(*tokens_spec, None),
    )(table_vd, tokens_bt)


def map_sharded(
    mesh: Mesh | None,
    function: Callable[..., T],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Any,
    *args: jax.Array,
    summed: str | None = None,
    check_vma: bool = True,
) -> T:
    """function(*args) on each device's shards (`jax.shard_map`), by logical axes.

    For what automatic sharding would gather: sorts, and kernels that are opaque to XLA.

    Args:
        mesh: None or one device: function(*args) itself.
        function: shards of args -> a shard of the result.
        in_axes: the logical axes of each of args.
        out_axes: those of the result; of several, a tuple of theirs.
        args: arrays, in full.
        summed: a logical axis: where it is sharded, results are added over its mesh axis.
        check_vma: False for kernels, which don't declare over which mesh axes their results vary.
    """
    if mesh is None or mesh.size == 1:
        return function(*args)
    in_specs = tuple(spec(mesh, x.shape, a) for x, a in zip(args, in_axes, strict=True))
    names = {name for s in in_specs for part in s if part for name in np.atleast_1d(part)}
    over = [n for n in RULES.get(summed or "", ()) if n in names]
    result = jax.eval_shape(function, *args)

    def local(*pieces):
        made = function(*pieces)
        return jax.lax.psum(made, tuple(over)) if over else made

    out_specs = jax.tree.map(lambda x, axes: spec(mesh, x.shape, axes), result, out_axes)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=check_vma,
    )(*args)


def vocabulary_axis(mesh: Mesh | None) -> str | None:
    """The mesh axis that the rows of LM heads are sharded over, if there is one."""
    return TENSOR if mesh is not None and mesh.shape.get(TENSOR, 1) > 1 else None


def collected_gradient(
    mesh: Mesh, shape: Sequence[int], axis: str | None
) -> tuple[Callable[[Any], Any], PartitionSpec]:
    """(a function that sums an LM head's gradient over all tokens inside `shard_map`, the
    PartitionSpec of the sum). Where the width is sharded over fsdp, each device gets its own
    columns of it.
    """
    columns = pieces(mesh, EMBED)
    if columns == 1 or shape[1] % columns:
        axes = rows_spec(mesh)[0]
        return lambda gradient: jax.lax.psum(gradient, axes), PartitionSpec(axis)

    def collect(gradient):
        own = jax.tree.map(
            lambda g: jax.lax.psum_scatter(g, FSDP, scatter_dimension=1, tiled=True), gradient
        )
        return jax.lax.psum(own, DATA)

    return collect, PartitionSpec(axis, FSDP)


def whole_rows(logits: jax.Array, axis: str | None) -> jax.Array:
    """Inside `shard_map`, an all-to-all: this device's columns of all rows [c, V / n] -> all
    columns of its own rows [c / n, V]."""
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
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def device_bytes(tree: Any, itemsize: int | None = None) -> float:
    """Bytes on one device of a tree of arrays, or of shapes with shardings; an itemsize replaces
    those of the dtypes.

    >>> device_bytes(jax.device_put(np.zeros((4, 2), np.float32), replicated(make_mesh(1))))
    32
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def head_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an LM head's weight [V, D]."""
    return NamedSharding(mesh, spec(mesh, shape, (VOCAB, EMBED)))


def batch_spec(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, rows_spec(mesh))


def rows_spec(mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of a leading axis of rows or tokens."""
    return PartitionSpec(tuple(axis for axis in RULES[BATCH] if axis in mesh.shape))


def shard_batch(tree: T, mesh: Mesh) -> T:
    """Shard the rows of every array over data and fsdp; each process gives its share of them
    (`processes.share`). Errors: ConfigError where they can't be sharded evenly."""
    rows = {owners(mesh) * np.shape(x)[0] for x in jax.tree.leaves(tree)}
    if any(n % data_size(mesh) for n in rows):
        raise ConfigError(
            f"a batch of {sorted(rows)} rows can't be sharded over {data_size(mesh)} devices;"
            f" make it a multiple of {data_size(mesh)}"
        )
    if owners(mesh) == 1:
        return jax.device_put(tree, batch_spec(mesh))
    place = batch_spec(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(place, np.asarray(x)), tree
    )


def rows_on_host(tree: T) -> T:
    """This process's own rows of sharded arrays, on the host; all of them in a run of one
    process."""

    def local(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

    return jax.tree.map(local, tree)


def micro_batched(x: jax.Array, pieces: int) -> jax.Array:
    """[B, ...] -> [pieces, B / pieces, ...], every micro-batch sharded over all of the batch's
    devices."""
    return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)


def whole_batch(x: jax.Array) -> jax.Array:
    """The inverse of `micro_batched`.

    >>> whole_batch(micro_batched(jnp.arange(6), 3)).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def pad_rows(rows: np.ndarray, mesh: Mesh, at_least: int = 1) -> np.ndarray:
    """The rows, the last one repeated until they can be sharded over the mesh."""
    wanted = -(-max(len(rows), at_least) // data_size(mesh)) * data_size(mesh)
    return np.concatenate([rows, np.full(wanted - len(rows), rows[-1])])
