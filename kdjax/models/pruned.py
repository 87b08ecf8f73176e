"""A student of its teacher's widths and fewer layers: where a distillation can begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.base import random_key
from kdjax.errors import ConfigError
from kdjax.models.hf.config import from_fields, text_fields
from kdjax.models.hf.shards import write_folder
from kdjax.models.hf.stored import model_tensors, read_config
from kdjax.models.hf.weights import read_params
from kdjax.models.parameters import init_params, restacked, unstacked
from kdjax.models.shape import DecoderConfig, layer_kinds
from kdjax.runtime.console import announce
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
    tokenizer, number for number (as DistilBERT began, arXiv 1910.01108); returns their indices.

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
    fields = shortened(text_fields(json_object(teacher, "config.json")), config, kept)
    fields["tie_word_embeddings"] = config.tie_word_embeddings  # which its weights decide
    stored = {tensor.get_dtype() for tensor in model_tensors(teacher, config.model_type).values()}
    dtype = jnp.bfloat16 if stored == {"BF16"} else jnp.float32
    if stored - {"BF16", "F32"} or len(stored) > 1:
        announce(f"{teacher} holds {' and '.join(sorted(stored))}: the student is in float32")
    short = from_fields(fields, str(out / "config.json"))
    if seed is None:
        params = read_params(teacher, config, dtype)
        there = unstacked(params)["layers"]
        params["layers"] = restacked([there[n] for n in kept], short)
    else:
        params = jax.jit(init_params, static_argnums=0)(short, random_key(seed))
    write_folder(out, params, teacher, dtype, fields=fields)
    return kept


def shortened(fields: dict[str, Any], config: DecoderConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The config.json of these layers alone, from that of all and what is read from it.

    >>> config = DecoderConfig(10, 4, 8, 4, 2, 1, 2)
    >>> shortened({"num_hidden_layers": 4, "max_window_layers": 2}, config, (0, 3))
    {'num_hidden_layers': 2, 'max_window_layers': 1}
    """
    short, kinds = fields | {"num_hidden_layers": len(kept)}, layer_kinds(config)
    if "layer_types" in fields or config.layer_types:
        short["layer_types"] = [kinds[layer].mixer for layer in kept]
    if config.no_rope_layers or fields.get("no_rope_layers"):
        short["no_rope_layers"] = [int(kinds[layer].rope is not None) for layer in kept]
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
