"""The reader of a folder's weights: tensors -> parameters, block by block, in their final place.

A parameter is a buffer of its final dtype and sharding from the start. Slices of the file, in the
file's dtype, are transposed and converted on the device as they are written into it, so that the
host holds one block at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path as Folder
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from kdjax.base import Params
from kdjax.errors import DataError
from kdjax.models.hf.folder import StoredTensor, listed, shown
from kdjax.models.hf.stored import HEAD, check_depth, model_tensors
from kdjax.models.hf.tensors import Path, Place
from kdjax.models.hf.tensors import tensors as expected_tensors
from kdjax.models.parameters import abstract_params
from kdjax.models.quantized import Hold
from kdjax.models.shape import DecoderConfig
from kdjax.numerics import LMHead

BUFFER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Tensors that are computed from the config: Llama 2's files hold them, and nothing reads them."""

READABLE = ("BF16", "F16", "F32")
PIECE_BYTES = 128 << 20
"""A larger tensor is read in blocks, along an axis that is not sharded."""

Cut = tuple[slice, ...]


def read_params(
    folder: Folder,
    config: DecoderConfig,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    hold: Hold | None = None,
) -> Params:
    """The parameters of a folder, layers stacked on axis 0.

    Args:
        folder: of a model.
        config: its config.json.
        dtype: of the parameters.
        mesh: what they are sharded over, by the rules of sharding.py.
        hold: how each is stored once it is read (models/quantized.py); one parameter, of all
            layers, is in `dtype` at a time.

    Errors: DataError listing every missing, unexpected, misshapen or unreadable tensor.
    """
    places = _checked(model_tensors(folder, config.model_type), config, folder)

    def read(path, abstract: jax.ShapeDtypeStruct, final: Any) -> Any:
        names = tuple(p.key for p in path)
        weight = _filled(abstract, places[names])
        if hold is None or final == abstract:
            return weight
        convert = jax.jit(
            functools.partial(hold, names),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, final),
        )
        return jax.block_until_ready(convert(weight))  # freed before the next is made

    abstract = abstract_params(config, dtype, mesh)
    final = abstract if hold is None else abstract_params(config, dtype, mesh, hold=hold)
    return jax.tree_util.tree_map_with_path(read, abstract, final)


def not_finite(params: Params) -> list[str]:
    """The names of parameters that hold NaN or an infinity.

    >>> not_finite({"norm": jnp.array([1.0, jnp.nan]), "head": jnp.ones(2)})
    ['norm']
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    finite = jax.device_get(_are_finite([leaf for _, leaf in named]))
    paths = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named)
    return [path for path, good in zip(paths, finite, strict=True) if not good]


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def read_head(
    folder: Folder,
    config: DecoderConfig,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> LMHead:
    """The LM head alone of a folder, sharded as `read_params` shards it; no other tensor is read.

    Errors: as `read_params`.
    """
    places = _checked(model_tensors(folder, config.model_type), config, folder)
    name = "embed" if config.tie_word_embeddings else "head"
    abstract = abstract_params(config, dtype, mesh)[name]
    return LMHead(_filled(abstract, places[name,]))


def _checked(
    found: dict[str, StoredTensor], config: DecoderConfig, folder: Folder
) -> dict[Path, list[tuple[Place, StoredTensor]]]:
    """The tensors that fill each parameter, once names, shapes and dtypes are the config's."""
    found = {name: tensor for name, tensor in found.items() if not BUFFER.fullmatch(name)}
    if config.tie_word_embeddings:  # some exporters write the tied head a second time
        found.pop(HEAD, None)
    check_depth(config, len(found), folder)
    places = expected_tensors(config)
    problems = [f"missing {name}" for name in places if name not in found]
    problems += [f"unexpected {shown(name)}" for name in found if name not in places]
    filling: dict[Path, list[tuple[Place, StoredTensor]]] = {}
    for name in places.keys() & found.keys():
        place, tensor = places[name], found[name]
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != place.shape:
            problems.append(f"{name} has shape {shape}, the config wants {place.shape}")
        if dtype not in READABLE:
            problems.append(f"{name} is {dtype}, readable are {', '.join(READABLE)}")
        filling.setdefault(place.path, []).append((place, tensor))
    if problems:
        raise DataError(f"{folder}: weights and config.json disagree: {listed(problems)}")
    return filling


def _filled(abstract: jax.ShapeDtypeStruct, places: list[tuple[Place, StoredTensor]]) -> jax.Array:
    buffer = jnp.zeros(abstract.shape, abstract.dtype, device=abstract.sharding)
    for place, tensor in places:
        sharding = _file_sharding(abstract, place)
        axis, cuts = _cuts(tensor, place.shape, sharding)
        write = _writer(abstract.sharding, place.turned, axis)
        for cut in cuts:
            piece = _piece(tensor, cut, sharding)
            at = np.array([*place.at, cut[axis].start], np.int32)
            # waiting keeps one piece in memory, not all that are queued
            buffer = jax.block_until_ready(write(buffer, piece, at))
    return buffer


def _file_sharding(abstract: jax.ShapeDtypeStruct, place: Place) -> NamedSharding | None:
    """The sharding of one tensor in the file's layout, so that each device reads its own shard.

    Layers and experts are not sharded; a kernel's axes are transposed in the file.
    """
    if abstract.sharding is None:
        return None
    spec = tuple(abstract.sharding.spec)
    spec = (*spec, *(None,) * (len(abstract.shape) - len(spec)))[len(place.at) :]
    return NamedSharding(
        abstract.sharding.mesh, PartitionSpec(*(spec[::-1] if place.turned else spec))
    )


def _cuts(
    tensor: StoredTensor, shape: tuple[int, ...], sharding: NamedSharding | None
) -> tuple[int, Iterator[Cut]]:
    """(axis, blocks along it): at most PIECE_BYTES each, where an axis is not sharded."""
    own = shape if sharding is None else sharding.shard_shape(shape)
    whole = [axis for axis, size in enumerate(shape) if own[axis] == size]
    axis = whole[0] if whole else 0
    width = 4 if tensor.get_dtype() == "F32" else 2
    line_bytes = width * int(np.prod(shape)) // shape[axis]
    step = max(1, PIECE_BYTES // line_bytes) if whole else shape[axis]

    def blocks() -> Iterator[Cut]:
        for start in range(0, shape[axis], step):
            block = slice(start, min(start + step, shape[axis]))
            yield tuple(block if a == axis else slice(0, n) for a, n in enumerate(shape))

    return axis, blocks()


def _piece(tensor: StoredTensor, cut: Cut, sharding: NamedSharding | None):
    """The numbers of a cut, in the file's dtype; with a sharding each device's shard alone is read,
    and once for all devices that hold the same."""
    if sharding is None:
        return tensor[cut]

    @functools.cache
    def read(bounds: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
        return tensor[
            tuple(
                slice(c.start + (a or 0), c.stop if b is None else c.start + b)
                for c, (a, b) in zip(cut, bounds, strict=True)
            )
        ]

    return jax.make_array_from_callback(
        tuple(c.stop - c.start for c in cut),
        sharding,
        lambda index: read(tuple((i.start, i.stop) for i in index or ())),
    )


@functools.lru_cache(maxsize=256)  # so that a program is compiled once a shape
def _writer(sharding: NamedSharding | None, turned: bool, axis: int):
    """write(buffer, piece, at): the buffer with a piece of a tensor in it, in place.

    at = [layer, expert, ..., where the piece begins along the tensor's `axis`]. All other starts
    are zeros that the compiler sees: a sharded axis needs no communication.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def write(buffer: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
        *lead, begin = at
        tail = [begin if a == axis else 0 for a in range(piece.ndim)]
        start = [*lead, *(tail[::-1] if turned else tail)]
        update = (piece.T if turned else piece).astype(buffer.dtype)[(None,) * len(lead)]
        # as bits: XLA on CPU would widen and round all of a bfloat16 buffer at every write
        bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
        old, new = (jax.lax.bitcast_convert_type(x, bits) for x in (buffer, update))
        written = jax.lax.dynamic_update_slice(old, new, start)
        return jax.lax.bitcast_convert_type(written, buffer.dtype)

    return write
