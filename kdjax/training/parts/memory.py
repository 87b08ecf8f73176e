"""Memory on a device that is known from shapes, before a program is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax import models
from kdjax.base import Model, Params
from kdjax.config.engines import Rollouts
from kdjax.models.lora import join
from kdjax.rollouts.levels import levels, rows_decoded, rows_within
from kdjax.rollouts.sampler import row_bytes
from kdjax.sharding import TENSOR, data_size, rollout_mesh
from kdjax.training.parts.programs import Programs
from kdjax.training.parts.sampling import cache_bytes, shares_memory


def activation_bytes(programs: Programs, rows: int, length: int) -> float:
    """Bytes that the student's layers save for the backward pass of a micro-batch: the residuals
    that have its rows of so many tokens, sharded like them."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (programs.student.state.params, programs.student.frozen or {}),
    )

    def residuals(trained, frozen, tokens):
        hidden = programs.student.learner.hidden
        return jax.vjp(lambda t: hidden(join(frozen, t), tokens), trained)[1]

    kept = jax.eval_shape(residuals, *shapes, tokens)
    total = sum(
        np.prod(leaf.shape, dtype=float) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(kept)
        if (rows, length) in zip(leaf.shape, leaf.shape[1:], strict=False)
    )
    return total / data_size(programs.mesh)


def rows_at_once(
    model: Model, mesh: Mesh, rollouts: Rollouts, rows: int, prompt: int, response: int
) -> int:
    """Rows that a sampler decodes at a time at its longest level.

    Args:
        model: the sampler's.
        mesh: the model's.
        rollouts: the config's.
        rows: to draw.
        prompt, response: limits in tokens.
    """
    places, slots = rollout_mesh(mesh), levels(response)[-1].slots(prompt)
    budget, devices = cache_bytes(rollouts.cache_gib, mesh), data_size(places)
    most = rows_within(budget, row_bytes(model, slots, places), rollouts.rows, devices)
    return min(most, rows_decoded(rows, rows, devices))


def sampling_bytes(
    model: Model, params: Params, mesh: Mesh, dtype: DTypeLike, rows: int, slots: int, columns: int
) -> dict[str, float]:
    """What drawing keeps: the sampler's copy of the weights, where there is one, the KV cache, and
    two float32 numbers of each row and token of the vocabulary.

    Args:
        model: the sampler's.
        params: the model's, as shapes.
        mesh: the model's.
        dtype: of the copy.
        rows: decoded at a time.
        slots: of the cache.
        columns: of the vocabulary.
    """
    places = rollout_mesh(mesh)
    share = rows / data_size(places)
    copied = jax.eval_shape(lambda params: models.narrow(params, dtype), params)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(copied))
    return {
        "sampler's weights": weights
        / mesh.shape[TENSOR]
        * (not shares_memory(params, dtype, mesh)),
        "KV cache": share * row_bytes(model, slots, places),
        "logits": share * 8 * columns,
    }
