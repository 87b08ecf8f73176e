"""Checkpoint files <-> parameters: safetensors only, all that is wrong reported together."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import DataError, Params, StorageError
from kdjax.models.config import DecoderConfig
from kdjax.models.qwen3 import LAYER_NAMES

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
    shapes = expected_shapes(config)
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {tensors[name].shape}, the config wants {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise DataError(f"{folder}: weights and config.json disagree: {'; '.join(problems[:20])}")
    layers: Params = {}
    for name, path in LAYER_NAMES.items():
        stack = [tensors[f"model.layers.{i}.{name}"] for i in range(config.num_hidden_layers)]
        layers[path[0]] = {path[1]: jnp.asarray(np.stack([_turned(w, path) for w in stack]))}
    params = {
        "embed": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "norm": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        params["head"] = tensors["lm_head.weight"]
    return jax.tree.map(jnp.asarray, params)


def write_folder(folder: Path, params: Params, source: Path) -> None:
    """A Hugging Face folder: these parameters, with config and tokenizer of the folder `source`.

    Written beside its final place and renamed, so a folder is whole or absent.
    Errors: StorageError.
    """
    from safetensors.numpy import save

    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise StorageError(
            f"{folder} exists and is not empty; choose another folder, nothing was overwritten"
        )
    config = json.loads((source / "config.json").read_text())
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        content = save(dict(_named(params)), metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).write_bytes(content)  # save_file would make it private to the user
        (partial / "config.json").write_text(
            json.dumps({**config, "dtype": "float32"}, indent=2) + "\n"
        )
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
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


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape, of every tensor that a folder with this config holds."""
    d, q = config.hidden_size, config.num_attention_heads * config.head_dim
    k, m = config.num_key_value_heads * config.head_dim, config.intermediate_size
    layer = {
        "q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q), "gate_proj": (m, d),
        "up_proj": (m, d), "down_proj": (d, m), "attention_norm": (d,), "mlp_norm": (d,),
        "q_norm": (config.head_dim,), "k_norm": (config.head_dim,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": layer[path[0]] for name, path in LAYER_NAMES.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def _named(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    yield "model.embed_tokens.weight", np.asarray(params["embed"], np.float32)
    yield "model.norm.weight", np.asarray(params["norm"], np.float32)
    if "head" in params:
        yield "lm_head.weight", np.asarray(params["head"], np.float32)
    for name, path in LAYER_NAMES.items():
        for i, weight in enumerate(np.asarray(params["layers"][path[0]][path[1]], np.float32)):
            yield f"model.layers.{i}.{name}", _turned(weight, path)


def _turned(weight: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    return np.ascontiguousarray(weight.T) if path[-1] == "kernel" else weight


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
