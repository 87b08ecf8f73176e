"""The entropy-gated length curriculum: lengths rise only while the student's entropy holds.

arXiv 2605.16826: train at L_m, measure the student's mean per-token predictive entropy H_m on a
held-out set, rise to L_{m+1} only if H_m is at least the threshold, otherwise stay at the last
stable length.

The gate is an Optax transformation that returns the updates unchanged, so its state is saved and
restored with the rest of the optimizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.base import ConfigError


class GateState(NamedTuple):
    """Where the curriculum stands: index into the lengths, stopped or not, last measurement."""

    stage: jax.Array
    stopped: jax.Array
    measurements: jax.Array
    entropy_nats: jax.Array


def advance(
    state: GateState, entropy_nats: jax.Array, *, stages: int, threshold_nats: float
) -> GateState:
    """One decision. An entropy that is not finite means "not measured" and leaves the state alone.

    >>> start = GateState(jnp.int32(0), jnp.bool_(False), jnp.int32(0), jnp.float32(jnp.nan))
    >>> int(advance(start, jnp.float32(0.5), stages=3, threshold_nats=0.3).stage)
    1
    """
    measured = jnp.isfinite(entropy_nats)
    holds = entropy_nats >= threshold_nats
    last = state.stage >= stages - 1
    rises = measured & holds & ~state.stopped & ~last
    return GateState(
        stage=state.stage + rises.astype(jnp.int32),
        stopped=state.stopped | (measured & ~holds),
        measurements=state.measurements + measured.astype(jnp.int32),
        entropy_nats=jnp.where(measured, entropy_nats, state.entropy_nats),
    )


def entropy_gate(
    lengths: Sequence[int], entropy_threshold_nats: float
) -> optax.GradientTransformationExtraArgs:
    """A transformation that passes updates through and advances a `GateState`.

    Its `update` takes the keyword `heldout_entropy_nats`: the measured entropy, or NaN between
    measurements. Errors: ConfigError unless the lengths are positive and rise.

    >>> import optax
    >>> gate = entropy_gate((16, 32), 0.3)
    >>> _, state = gate.update({}, gate.init({}), heldout_entropy_nats=jnp.float32(0.4))
    >>> rollout_length(state, (16, 32))
    32
    """
    lengths = tuple(lengths)
    if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
        raise ConfigError(f"entropy_gate: lengths must be positive and rise, got {lengths}")

    def init(params) -> GateState:
        del params
        return GateState(jnp.int32(0), jnp.bool_(False), jnp.int32(0), jnp.float32(jnp.nan))

    def update(updates, state, params=None, *, heldout_entropy_nats=jnp.nan, **extra):
        del params, extra
        entropy = jnp.asarray(heldout_entropy_nats, jnp.float32)
        return updates, advance(
            state, entropy, stages=len(lengths), threshold_nats=entropy_threshold_nats
        )

    return optax.GradientTransformationExtraArgs(init, update)


def rollout_length(state: GateState, lengths: Sequence[int]) -> int:
    """The next rollout's length limit in tokens (a host value: one compile a stage)."""
    return lengths[int(state.stage)]
