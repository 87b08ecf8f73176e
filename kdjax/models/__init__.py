"""Models, loaded and created: `load(name) -> (Model, params)` for every checkpoint.

>>> model, params = load("kdjax:student")
>>> model.config.hidden_size
64
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax.base import Model, Params, random_key
from kdjax.errors import DataError
from kdjax.models.decoder import build
from kdjax.models.hf.config import to_fields
from kdjax.models.hf.hub import is_hub_name, snapshot
from kdjax.models.hf.identity import identity
from kdjax.models.hf.shards import write_folder
from kdjax.models.hf.stored import read_config
from kdjax.models.hf.weights import not_finite, read_head, read_params
from kdjax.models.parameters import (
    abstract_params,
    init_params,
    logical_axes,
    narrow,
    parameter_count,
    unstacked,
    unstacked_axes,
)
from kdjax.models.quantized import Hold, int8
from kdjax.models.shape import DecoderConfig, RopeScaling, context_tokens
from kdjax.runtime.console import announce

EMBEDDED = Path(__file__).parent / "assets"
EMBEDDED_PREFIX = "kdjax:"


def find(name: str | Path, weights: bool = True) -> Path:
    """The folder of a name: a path, a shipped model such as `kdjax:teacher` (docs/embedded.md lists
    them), or, where there is no such path, a hub's `org/model` or `org/model@revision`, whose
    weights are not downloaded if none are asked for.

    Errors: DataError saying what was looked for, and where.
    """
    text = str(name)
    folder = (
        EMBEDDED / text.removeprefix(EMBEDDED_PREFIX)
        if text.startswith(EMBEDDED_PREFIX)
        else Path(text)
    )
    if folder.is_dir():
        return folder
    if is_hub_name(text):
        return snapshot(text, weights)
    shipped = sorted(EMBEDDED_PREFIX + p.name for p in EMBEDDED.glob("*") if p.is_dir())
    raise DataError(
        f"no model folder {folder}; give a local Hugging Face folder, a hub name (org/model or"
        f" org/model@revision) or one of {shipped}"
    )


def load(
    name: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    params_dtype: DTypeLike = jnp.float32,
    hold: Hold | None = None,
    **how: Any,
) -> tuple[Model, Params]:
    """A model as pure functions, and its parameters.

    Args:
        name: as in `find`.
        mesh: parameters are sharded over it by the rules of sharding.py (replicated where fsdp =
            tensor = 1).
        dtype: what it computes in.
        params_dtype: that of its kernels and tables; norms and biases are never narrower than
            float32, as a student's masters are not.
        hold: how parameters are stored on devices, such as `int8` (models/quantized.py).
        how: further arguments of `build` (impl, remat, ...).

    Errors: DataError naming what is wrong in the folder.
    """
    folder = find(name)
    config = read_config(folder)
    model = build(config, dtype, mesh=mesh, **how)
    params = read_params(folder, config, params_dtype, mesh, hold)
    if bad := not_finite(params):
        announce(
            f"warning: {name}: {len(bad)} of its arrays hold numbers that are not finite ({bad[0]}"
            f"{', ...' if bad[1:] else ''}); what it says means nothing: fetch or save it anew"
        )
    return model, params


def create(
    folder: str | Path, config: DecoderConfig, tokenizer_folder: str | Path, seed: int
) -> None:
    """Write a new folder with random weights, so that a model to train from scratch is loaded like
    any other."""
    made = jax.jit(init_params, static_argnums=0)(config, random_key(seed))
    write_folder(Path(folder), made, Path(tokenizer_folder), fields=to_fields(config))


__all__ = [
    "DecoderConfig",
    "Hold",
    "RopeScaling",
    "abstract_params",
    "build",
    "context_tokens",
    "create",
    "find",
    "identity",
    "int8",
    "load",
    "logical_axes",
    "narrow",
    "parameter_count",
    "read_config",
    "read_head",
    "unstacked",
    "unstacked_axes",
    "write_folder",
]
