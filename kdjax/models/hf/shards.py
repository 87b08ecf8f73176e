"""The writer of Hugging Face folders: safetensors in one file, or in shards with an index."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kdjax.base import Params
from kdjax.errors import DataError
from kdjax.models.hf.config import from_fields, text_fields
from kdjax.models.hf.folder import COPIED_FILES, INDEX_FILE
from kdjax.models.hf.stored import read_config
from kdjax.models.hf.tensors import Place, tensors
from kdjax.runtime.files import json_object, member, new_folder, one_line

SHARD_BYTES = 4 << 30
GENERATION_FILE = "generation_config.json"


def write_folder(
    folder: Path,
    params: Params,
    source: Path,
    dtype: DTypeLike = jnp.float32,
    shard_bytes: int = SHARD_BYTES,
    fields: dict[str, Any] | None = None,
    chat_template: str | None = None,
    untied: bool = False,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a Hugging Face folder: parameters with the config and tokenizer of another.

    It is written next to its final place and renamed, so a folder is complete or absent.

    Args:
        folder: where to.
        params: layers stacked on axis 0, sharded in any way: one tensor is gathered at a time, and
            the host holds one file's.
        source: the folder whose config and tokenizer are copied.
        dtype: that of the file.
        shard_bytes: of one file, unless one tensor is larger.
        fields: the config.json to write in place of that of `source`.
        chat_template: the text to write in place of that of `source`.
        untied: a head that is the embedding is written apart, as a head of its own.
        stop_ids: the ids to write as those that end a response, in place of those of `source`.

    Errors: StorageError; DataError where `source` is of another shape.
    """
    if fields is None:
        fields, config = text_fields(json_object(source, "config.json")), read_config(source)
        if config.tie_word_embeddings != fields.get("tie_word_embeddings", False):
            fields["tie_word_embeddings"] = config.tie_word_embeddings
    else:
        config = from_fields(fields, str(source))
    if untied and config.tie_word_embeddings:
        fields, params = (
            {**fields, "tie_word_embeddings": False},
            {**params, "head": params["embed"]},
        )
        config = dataclasses.replace(config, tie_word_embeddings=False)
    places = tensors(config)
    _check_paths(params, places, source)
    dtype = np.dtype(dtype)
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"} | {"dtype": dtype.name}
    with new_folder(folder) as partial:
        _write_json(partial / "config.json", fields)
        for name in COPIED_FILES:
            found = member(source, name)
            if found is not None:
                shutil.copyfile(found, partial / name)
        if chat_template is not None:
            (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        if stop_ids:
            generation = json_object(source, GENERATION_FILE) | {"eos_token_id": [*stop_ids]}
            _write_json(partial / GENERATION_FILE, generation)
        _write_weights(partial, params, places, dtype, shard_bytes)


def _check_paths(params: Params, places: dict[str, Place], source: Path) -> None:
    """Errors: DataError unless every parameter has a name in the checkpoint, and every name a
    parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    given = {tuple(p.key for p in path) for path, _ in leaves}
    wanted = {place.path for place in places.values()}
    if given != wanted:
        odd = sorted(".".join(path) for path in given ^ wanted)
        raise DataError(
            f"{source}: a checkpoint of its config.json has other parameters than those to write:"
            f" {', '.join(odd[:5])}; give the folder that they began as (adapters merged)"
        )


def _write_weights(
    folder: Path, params: Params, places: dict[str, Place], dtype: np.dtype, shard_bytes: int
) -> None:
    """The weight files of `write_folder`, each tensor from its place in the parameters."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    sizes = {name: int(np.prod(place.shape)) * dtype.itemsize for name, place in places.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        held = {name: _tensor(params, places[name], dtype) for name in names}
        try:
            save_file(held, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind for a full disk, too
            raise OSError(one_line(error)) from error
        shutil.copymode(folder / "config.json", folder / file)  # it makes files private to the user
    if len(plan.filename_to_tensors) > 1:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX_FILE, index)


def _tensor(params: Params, place: Place, dtype: np.dtype) -> np.ndarray:
    """One tensor on the host, in the file's layout."""
    node = params
    for key in place.path:
        node = node[key]
    weight = np.asarray(node[place.at] if place.at else node).astype(dtype, copy=False)
    return np.ascontiguousarray(weight.T) if place.turned else weight


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
