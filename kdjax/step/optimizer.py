"""The optimizer in one named chain: clip and AdamW with a schedule, which a guard skips where the
numbers are not finite, and outermost the entropy gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.errors import ConfigError
from kdjax.step.gate import FIXED_HORIZON, GateState


def make_optimizer(
    *,
    learning_rate: float,
    steps: int,
    warmup_fraction: float = 0.05,
    final_fraction: float = 0.02,
    clip_norm: float = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.95,
    gate: optax.GradientTransformationExtraArgs = FIXED_HORIZON,
    average: optax.GradientTransformationExtraArgs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm and AdamW, guarded (`skip_not_finite`), and the entropy gate; the rate
    warms up linearly, then falls by a cosine.

    Args:
        learning_rate: its peak, above 0.
        steps: updates of the whole run.
        warmup_fraction: share of them in which the rate rises, in [0, 1).
        final_fraction: share of the peak at the end; 1 is a constant rate (the paper's).
        clip_norm: largest global norm of a gradient.
        weight_decay, b2: as in AdamW; no weight decay by default.
        gate: of the length curriculum (`entropy_gate`).
        average: keeps one of the parameters (`exponential_average`).

    >>> optimizer = make_optimizer(learning_rate=1e-3, steps=10)
    >>> list(optimizer.init({}))
    ['guard', 'gate']
    """
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate must be above 0, got {learning_rate}")
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup_fraction < 1:
        raise ConfigError(f"warmup_fraction must be in [0, 1), got {warmup_fraction}")
    if not 0 <= final_fraction <= 1:
        raise ConfigError(f"final_fraction must be in [0, 1], got {final_fraction}")
    if not clip_norm > 0:
        raise ConfigError(f"clip_norm must be above 0, got {clip_norm}")
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}")
    if not 0 <= b2 < 1:
        raise ConfigError(f"b2 must be in [0, 1), got {b2}")
    warmup = round(warmup_fraction * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(
                learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1)
            ),
            optax.cosine_decay_schedule(
                learning_rate, max(steps - warmup, 1), alpha=final_fraction
            ),
        ],
        boundaries=[warmup],
    )
    update = optax.named_chain(
        ("clip", optax.clip_by_global_norm(clip_norm)),
        ("adamw", optax.adamw(schedule, b2=b2, weight_decay=weight_decay)),
    )
    outermost = () if average is None else (("average", average),)
    return optax.named_chain(("guard", skip_not_finite(update)), ("gate", gate), *outermost)


class GuardState(NamedTuple):
    """Updates that were skipped: since one was made, and in all; and the state of what is
    guarded."""

    in_a_row: jax.Array
    total: jax.Array
    inner: Any


def skip_not_finite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, but where the loss (its update's keyword `loss`) or the gradient's global norm is
    not finite: there no bit of parameters and of inner's state changes, and the skip is counted.

    A skipped update is -0.0, as x + -0.0 = x for every x; optax.apply_if_finite adds 0.0, which
    makes 0.0 of -0.0, and makes the update once too many were skipped.

    >>> guarded = skip_not_finite(optax.sgd(1.0))
    >>> update, state = guarded.update(jnp.float32(jnp.nan), guarded.init(jnp.float32(3.0)))
    >>> float(update), int(state.in_a_row)
    (-0.0, 1)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> GuardState:
        return GuardState(jnp.int32(0), jnp.int32(0), inner.init(params))

    def update(updates, state, params=None, *, loss=0.0, **extra):
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(updates))
        made, after = inner.update(updates, state.inner, params, **extra)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state.inner)
        in_a_row = jnp.where(finite, 0, state.in_a_row + 1)
        made = jax.tree.map(lambda u: jnp.where(finite, u, -0.0), made)
        return made, GuardState(in_a_row, state.total + ~finite, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def gate_state(opt_state: Any) -> GateState:
    """The curriculum's state inside the optimizer's."""
    return opt_state["gate"]


def guard_state(opt_state: Any) -> GuardState:
    """What was skipped, inside the optimizer's state."""
    return opt_state["guard"]


SKIPPED = "skipped_in_a_row"


def decision(opt_state: Any) -> dict[str, jax.Array]:
    """What the guard decided of the update that gave this state, as a metric: how many were skipped
    since one was made, this one among them, and 0 where it was made; {} where there is no guard."""
    if not isinstance(opt_state, dict) or "guard" not in opt_state:
        return {}
    return {SKIPPED: guard_state(opt_state).in_a_row.astype(jnp.float32)}
