"""A student of its teacher's widths and fewer layers: where a distillation can begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import random_key
from kdjax.errors import ConfigError
from kdjax.models.config import from_fields
from kdjax.models.decoder import init_params
from kdjax.models.folder import open_tensors
from kdjax.models.shards import write_folder
from kdjax.models.stored import read_config
from kdjax.models.weights import read_params
from kdjax.runtime.files import json_object


def evenly_spaced(count: int, of: int) -> tuple[int, ...]:
    """So many of the layers 0 .. of - 1, the first and the last among them.

    >>> evenly_spaced(4, 30)
    (0, 10, 19, 29)
    """
    gaps = max(1, count - 1)
    return tuple((2 * i * (of - 1) + gaps) // (2 * gaps) for i in range(count))


def init_student(
    teacher: Path, out: Path, layers: int | Sequence[int], seed: int | None = None
) -> tuple[int, ...]:
    """Write a model folder of some of a teacher's layers, with its embeddings, norm, LM head and
    tokenizer, bit for bit (as DistilBERT began, arXiv 1910.01108); returns their indices.

    Args:
        teacher: a model folder.
        out: where to.
        layers: how many, by `evenly_spaced`, or their indices in rising order.
        seed: of fresh weights in place of the teacher's; the shapes are the same.

    Errors: ConfigError for layers that the teacher has not, DataError as `read_params`,
    StorageError where `out` is there or can't be written.
    """
    config = read_config(teacher)
    kept = _checked(layers, config.num_hidden_layers, teacher)
    fields = shortened(json_object(teacher, "config.json"), kept)
    fields["tie_word_embeddings"] = config.tie_word_embeddings  # which its weights decide
    stored = {tensor.get_dtype() for tensor in open_tensors(teacher).values()}
    dtype = jnp.bfloat16 if stored == {"BF16"} else jnp.float32
    if seed is None:
        params = read_params(teacher, config, dtype)
        params["layers"] = jax.tree.map(lambda w: w[np.array(kept)], params["layers"])
    else:
        short = from_fields(fields, str(out / "config.json"))
        params = jax.jit(init_params, static_argnums=0)(short, random_key(seed))
    write_folder(out, params, teacher, dtype, fields=fields)
    return kept


def shortened(fields: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A config.json of these layers alone.

    >>> shortened({"num_hidden_layers": 4, "max_window_layers": 2}, (0, 3))
    {'num_hidden_layers': 2, 'max_window_layers': 1}
    """
    short = fields | {"num_hidden_layers": len(kept)}
    if isinstance(kinds := fields.get("layer_types"), list):
        short["layer_types"] = [kinds[layer] for layer in kept if layer < len(kinds)]
    if isinstance(first := fields.get("max_window_layers"), int):
        short["max_window_layers"] = sum(layer < first for layer in kept)
    return short


def _checked(layers: int | Sequence[int], there: int, teacher: Path) -> tuple[int, ...]:
    if isinstance(layers, int):
        if not 1 <= layers <= there:
            raise ConfigError(
                f"--layers {layers}: {teacher} has {there} layers; a student has 1 to {there}"
            )
        return evenly_spaced(layers, there)
    kept = tuple(layers)
    if not kept or list(kept) != sorted({*kept}) or kept[0] < 0 or kept[-1] >= there:
        raise ConfigError(
            f"--layers {','.join(map(str, kept))}: layers of {teacher} are 0 to {there - 1}, each"
            " once, in rising order"
        )
    return kept
