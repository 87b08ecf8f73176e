"""The optimizer: clip, AdamW with a schedule, the entropy gate outermost, in one named chain."""

from __future__ import annotations

from typing import Any

import optax

from kdjax.base import ConfigError
from kdjax.gate import FIXED_HORIZON, GateState


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
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, AdamW, gate; the rate warms up, then goes to final_fraction by cosine.

    final_fraction 1 is a constant rate (the paper's). Weight decay is off unless asked for. gate:
    the length curriculum's (`entropy_gate`).

    >>> optimizer = make_optimizer(learning_rate=1e-3, steps=10)
    >>> list(optimizer.init({}))
    ['clip', 'adamw', 'gate']
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
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(clip_norm)),
        ("adamw", optax.adamw(schedule, b2=b2, weight_decay=weight_decay)),
        ("gate", gate),
    )


def gate_state(opt_state: Any) -> GateState:
    """The curriculum's state inside the optimizer's."""
    return opt_state["gate"]
