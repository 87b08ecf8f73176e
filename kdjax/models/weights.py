"""Checkpoint files <-> parameters: safetensors only, all that is wrong reported together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kdjax.base import DataError, Params, StorageError
from kdjax.models.config import DecoderConfig, from_fields
from kdjax.models.families import tensors as expected_tensors

WEIGHTS_FILE = "model.safetensors"
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
IDENTITY_FILES = (
    "tokenizer_config.json",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    WEIGHTS_FILE,
)


def read_params(folder: Path, config: DecoderConfig) -> Params:
    """Parameters of a folder, float32.

    Errors: DataError listing every missing, unexpected or misshapen tensor.
    """
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    if config.tie_word_embeddings:  # some exporters write the tied head a second time
        tensors.pop("lm_head.weight", None)
    places = expected_tensors(config)
    problems = [f"missing {name}" for name in places if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in places]
    problems += [
        f"{name} has shape {tensors[name].shape}, the config wants {place.shape}"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    if problems:
        raise DataError(f"{folder}: weights and config.json disagree: {'; '.join(problems[:20])}")
    grouped: dict = {}
    for name, place in places.items():
        w = tensors[name].T if place.turned else tensors[name]
        grouped.setdefault(place.path, {})[place.at] = w
    params: Params = {}
    for path, pieces in grouped.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        lead = tuple(n + 1 for n in max(pieces))
        stacked = np.stack(list(pieces.values())) if lead else pieces[()]
        node[path[-1]] = jnp.asarray(stacked.reshape(*lead, *next(iter(pieces.values())).shape))
    return params


def write_folder(folder: Path, params: Params, source: Path) -> None:
    """A Hugging Face folder: these parameters, with config and tokenizer of the folder `source`.

    Errors: StorageError.
    """
    from safetensors.numpy import save

    with new_folder(folder) as partial:
        config = json.loads((source / "config.json").read_text())
        content = save(
            dict(_named(params, from_fields(config, str(source)))), metadata={"format": "pt"}
        )
        (partial / WEIGHTS_FILE).write_bytes(content)  # save_file would make it private to the user
        (partial / "config.json").write_text(
            json.dumps({**config, "dtype": "float32"}, indent=2) + "\n"
        )
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder`: beside its final place, and renamed at the end, so that
    a folder is whole or absent. Errors: StorageError, also where it exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise StorageError(
            f"{folder} exists and is not empty; choose another folder, nothing was overwritten"
        )
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise StorageError(f"can't write the model folder {folder}: {error}") from error


def identity(folder: Path) -> str:
    """sha256 (first 16 hex digits) of everything that decides what a model folder computes."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _named(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    for name, place in expected_tensors(config).items():
        node = params
        for key in place.path:
            node = node[key]
        weight = np.asarray(node[place.at] if place.at else node, np.float32)
        yield name, np.ascontiguousarray(weight.T) if place.turned else weight


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    if not path.is_file():
        raise DataError(
            f"{path.parent}: no {path.name}; kdjax reads safetensors in one file (no pickle)"
        )
    try:
        with safe_open(path, framework="flax") as file:  # "flax" reads bfloat16 too
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own kinds for every damage
        raise DataError(
            f"{path}: damaged or not safetensors ({error}); fetch the file again"
        ) from error
