"""What kdjax is compared with: the loss head dense and in checkpointed chunks, decoding with layers
under scan, rollouts in static batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import PLAIN, Batch, Key, Model, Params
from kdjax.models.decoder import layer_function
from kdjax.models.layers.context import Next, Settings
from kdjax.models.shape import layer_kinds
from kdjax.numerics import gather_last, project
from kdjax.rollouts.decoding import Prompts, decoder

# --- the loss head --------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a loss head reads of N tokens: states [N, D], heads [V, D], targets and weights [N]."""

    hidden: Any
    weight_vd: Any
    teacher_hidden: Any
    teacher_weight_vd: Any
    targets: Any
    weights: Any


def forward(logq: jax.Array, logp: jax.Array) -> jax.Array:
    """KL(teacher || student), from the definition; with its arguments swapped, reverse KL."""
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def dense(loss: Callable, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Autodiff of a loss of log-probabilities on whole logits: (total, statistics).

    Logits are float32 (float64 for float64 inputs), the statistics those of the loss head.
    """
    logq = _log_probs(inputs.hidden, inputs.weight_vd)
    logp = jax.lax.stop_gradient(_log_probs(inputs.teacher_hidden, inputs.teacher_weight_vd))
    statistics = {
        "forward_kl": forward(logq, logp),
        "reverse_kl": forward(logp, logq),
        "student_entropy": -jnp.sum(jnp.exp(logq) * logq, -1),
        "teacher_entropy": -jnp.sum(jnp.exp(logp) * logp, -1),
        "student_logp": gather_last(logq, inputs.targets),
        "teacher_logp": gather_last(logp, inputs.targets),
        "top1_agreement": (logq.argmax(-1) == logp.argmax(-1)).astype(logq.dtype),
        "teacher_top1": (inputs.targets == logp.argmax(-1)).astype(logq.dtype),
    }
    kept = {name: jnp.where(inputs.weights > 0, x, 0.0) for name, x in statistics.items()}
    return jnp.sum(inputs.weights * loss(logq, logp)), jax.lax.stop_gradient(kept)


def _log_probs(states: jax.Array, weight_vd: jax.Array) -> jax.Array:
    wide = jnp.promote_types(states.dtype, jnp.float32)
    logits = jnp.einsum("nd,vd->nv", states, weight_vd, preferred_element_type=wide)
    return jax.nn.log_softmax(logits, axis=-1)


def checkpointed(loss: Callable, chunk: int, inputs: Inputs):
    """`dense` in a scan over chunks under `jax.checkpoint`: logits are formed again in backward."""
    by_token = ("hidden", "teacher_hidden", "targets", "weights")
    pieces = {name: getattr(inputs, name) for name in by_token}
    pieces = {name: x.reshape(-1, chunk, *x.shape[1:]) for name, x in pieces.items()}
    body = jax.checkpoint(lambda piece: dense(loss, inputs._replace(**piece)))
    totals, statistics = jax.lax.map(body, pieces)
    return jnp.sum(totals), jax.tree.map(jnp.ravel, statistics)


def sampled_token(inputs: Inputs) -> tuple[jax.Array, None]:
    """Cross-entropy to the sampled token on whole student logits: what distillation without the
    vocabulary costs."""
    logq = _log_probs(inputs.hidden, inputs.weight_vd)
    return -jnp.sum(inputs.weights * gather_last(logq, inputs.targets)), None


# --- decoding -------------------------------------------------------------------------------------

STEPS = 16  # tokens between two looks of the host, in static batches


def scanned_decode(
    model: Model, params: Params, rows: int, slots: int, steps: int
) -> tuple[Callable[[Any], Any], Any]:
    """(decode, its first argument): greedy tokens at the end of the window, as a function of
    decode's own result, (next token [B], keys and values, tokens [B, steps]). Our own layers, but
    under `scan`, which takes and gives the whole cache, [layers, batch, kv heads, slots, head dim].
    """
    config, head, dtype = model.config, model.head(params), params["embed"].dtype
    run = layer_function(Settings(config, dtype), layer_kinds(config)[0])
    starts = jnp.zeros(rows, jnp.int32)

    def one(carry, number):
        token, cache = carry
        at = slots - steps - 1 + number

        def layer(x, pieces):
            own, kept = pieces
            return run(own, x, Next(jnp.full((rows, 1), at), at, starts, kept))

        stack = params["layers"]["0"]  # a model whose layers are all alike
        x, cache = jax.lax.scan(layer, params["embed"][token][:, None], (stack, cache))
        wide = x[:, 0].astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + config.rms_norm_eps)
        normed = (wide * scale * params["norm"][None]).astype(dtype)
        token = jnp.argmax(project(normed, head), axis=-1).astype(jnp.int32)
        return (token, cache), token

    @jax.jit
    def decode(state):
        (token, cache), tokens = jax.lax.scan(one, state[:2], jnp.arange(steps))
        return token, cache, tokens.T

    cache = jax.tree.map(lambda *layers: jnp.stack(layers), *model.init_cache(rows, slots))
    return decode, (starts, cache, jnp.zeros((rows, steps), jnp.int32))


def static_batches(
    model: Model,
    params: Params,
    batch: Batch,
    key: Key,
    limit: int,
    stop_ids: Sequence[int],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, limit], lengths): `size` rows at a time, each until the last of them has stopped,
    in a cache of the full length. Our own decode step: the schedule alone differs."""
    programs, stops = decoder(model, PLAIN), np.asarray(stop_ids)
    prompts, lengths_b, row_b = map(
        np.asarray, (batch.prompt_bp, batch.prompt_length_b, batch.row_b)
    )
    width, padded = prompts.shape[1], -(-limit // STEPS) * STEPS
    tokens = np.zeros((len(prompts), padded), np.int32)
    for own in (slice(first, first + size) for first in range(0, len(prompts), size)):
        pieces = Prompts(prompts[own], lengths_b[own], np.arange(size, dtype=np.int32), row_b[own])
        state = programs.empty(params, size, width + padded)
        state = programs.prefill(params, state, pieces, np.int32(0), width)
        for at in range(0, padded, STEPS):
            now = np.int32(width + at), np.int32(at)
            state, drawn = programs.decode(params, state, key, *now, STEPS)
            tokens[own, at : at + STEPS] = drawn.token_b
            if np.isin(tokens[own, : at + STEPS], stops).any(axis=1).all():
                break
    tokens = tokens[:, :limit]
    ends = np.isin(tokens, stops)
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, limit)
    return np.where(np.arange(limit)[None] < lengths[:, None], tokens, 0), lengths
