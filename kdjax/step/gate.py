"""The entropy-gated length curriculum: lengths rise only while the student's entropy holds.

arXiv 2605.16826: train at L_m, measure the student's mean per-token predictive entropy H_m on a
held-out set, rise to L_{m+1} only if H_m is at least the threshold, otherwise stay at the last
stable length. What happens under the threshold is a policy, a function: `stop` (the paper's),
`hold` or `fall_back`.

The gate is an Optax transformation, so that its state is saved and restored with the optimizer's.
It returns the updates unchanged, except at the one step where `fall_back` restores parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax.base import Params
from kdjax.errors import ConfigError

DECISIONS = ("start", "rise", "last", "stop", "hold", "fall back", "stopped")
START, RISE, LAST, STOP, HOLD, FALL_BACK, STOPPED = range(len(DECISIONS))
"""The outcome of a measurement, an index into DECISIONS.

start: a relative threshold refers to it; nothing was decided. rise, last: it passed, and the
length rises, or was the last already. stop, hold, fall back: it failed, and the policy of that
name decided. stopped: the gate had stopped for good before.
"""
NOT_MEASURED = -1


class History(NamedTuple):
    """Every measurement in order, [capacity]; entries not used yet are -1 and NaN.

    step: updates before it; stage: index of the length it was measured at; entropy_nats; decision.
    """

    step: jax.Array
    stage: jax.Array
    entropy_nats: jax.Array
    decision: jax.Array


class GateState(NamedTuple):
    """The state of the curriculum.

    step: updates so far. stage: index into the lengths. stopped: for good. threshold_nats: NaN
    until a relative one is known. measurements: how many there were. stable: under `fall_back`
    alone, the parameters at the last measurement that passed (at first, the initial ones).
    """

    step: jax.Array
    stage: jax.Array
    stopped: jax.Array
    threshold_nats: jax.Array
    measurements: jax.Array
    history: History
    stable: Params | None = None


class Move(NamedTuple):
    """A policy's decision on an entropy under the threshold: the next stage, whether the gate stops
    there for good, and its index into DECISIONS."""

    stage: jax.Array
    stops: bool
    decision: int


Policy = Callable[[jax.Array], Move]
"""The stage at which an entropy was under the threshold -> what happens."""


def stop(stage: jax.Array) -> Move:
    """Stay at this length for good (the paper's)."""
    return Move(stage, True, STOP)


def hold(stage: jax.Array) -> Move:
    """Stay at this length until a later measurement passes."""
    return Move(stage, False, HOLD)


def fall_back(stage: jax.Array) -> Move:
    """Return for good to the previous length, and to the parameters of the last measurement that
    passed. The optimizer's moments stay as they are."""
    return Move(jnp.maximum(stage - 1, 0), True, FALL_BACK)


POLICIES: dict[str, Policy] = {"stop": stop, "hold": hold, "fall_back": fall_back}
"""The names that a config's `curriculum.policy` can have."""


def advance(
    state: GateState,
    entropy_nats: jax.Array,
    *,
    stages: int,
    policy: Policy = stop,
    threshold_share: float = 1.0,
) -> tuple[GateState, jax.Array]:
    """(the next state, the decision) of one measurement, for everything but the parameters.

    Args:
        state: before the measurement. Where its threshold is not known yet, this is the first one.
        entropy_nats: scalar; one that is not finite means "not measured" and changes nothing.
        stages: how many lengths there are.
        policy: decides on an entropy under the threshold.
        threshold_share: of the first measurement, becomes the threshold.

    Measurements beyond the history's capacity count, but are not recorded.

    >>> start = entropy_gate((16, 32), 0.3).init({})
    >>> state, decision = advance(start, jnp.float32(0.5), stages=2)
    >>> int(state.stage), DECISIONS[int(decision)]
    (1, 'rise')
    """
    measured = jnp.isfinite(entropy_nats)
    passes, last = entropy_nats >= state.threshold_nats, state.stage >= stages - 1
    move = policy(state.stage)
    decision = jnp.select(
        [~measured, state.stopped, jnp.isnan(state.threshold_nats), passes & last, passes],
        [NOT_MEASURED, STOPPED, START, LAST, RISE],
        move.decision,
    )
    fails, rises = decision == move.decision, decision == RISE
    entry = History(state.step, state.stage, entropy_nats, decision)
    # an index behind the end writes nothing
    place = jnp.where(measured, state.measurements, state.history.step.size)
    after = state._replace(
        stage=jnp.where(fails, move.stage, state.stage + rises),
        stopped=state.stopped | (fails & move.stops),
        threshold_nats=jnp.where(
            decision == START, threshold_share * entropy_nats, state.threshold_nats
        ),
        measurements=state.measurements + measured,
        history=jax.tree.map(
            lambda past, new: past.at[place].set(new, mode="drop"), state.history, entry
        ),
    )
    return after, decision


def entropy_gate(
    lengths: Sequence[int],
    entropy_threshold_nats: float | None = None,
    *,
    entropy_threshold_share: float | None = None,
    policy: Policy = stop,
    measurements: int = 64,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that advances a `GateState`; its `update` takes the keyword
    `heldout_entropy_nats`: the measured entropy, or NaN between measurements.

    Updates are returned unchanged. Where `fall_back` returns, they are stable - params instead, so
    that apply_updates gives the stable parameters, up to rounding. The copy of the parameters is in
    the state under this policy alone.

    Args:
        lengths: limits of a response in tokens, rising.
        entropy_threshold_nats: absolute; one length needs no threshold.
        entropy_threshold_share: or a share of the first entropy measured (in a run, before step 0).
        policy: decides on an entropy under the threshold.
        measurements: the capacity of the history.

    Errors: ConfigError unless the lengths are positive and rise, and there is one threshold.

    >>> gate = entropy_gate((16, 32), 0.3)
    >>> _, state = gate.update({}, gate.init({}), heldout_entropy_nats=jnp.float32(0.4))
    >>> rollout_length(state, (16, 32))
    32
    """
    lengths = tuple(lengths)
    _check(lengths, entropy_threshold_nats, entropy_threshold_share)
    stages, share = len(lengths), entropy_threshold_share
    returns = policy is fall_back and stages > 1
    threshold = float("nan") if share is not None else entropy_threshold_nats or 0.0

    def init(params: Params) -> GateState:
        empty = functools.partial(jnp.full, measurements)  # separate arrays: a step donates them
        return GateState(
            step=jnp.int32(0),
            stage=jnp.int32(0),
            stopped=jnp.bool_(False),
            threshold_nats=jnp.float32(threshold),
            measurements=jnp.int32(0),
            history=History(empty(-1), empty(-1), empty(jnp.nan), empty(-1)),
            stable=jax.tree.map(jnp.copy, params) if returns else None,
        )

    def update(updates, state, params=None, *, heldout_entropy_nats=jnp.nan, **extra):
        del extra
        entropy = jnp.asarray(heldout_entropy_nats, jnp.float32)
        after, decision = advance(
            state, entropy, stages=stages, policy=policy, threshold_share=share or 1.0
        )
        after = after._replace(step=state.step + 1)
        if not returns:
            return updates, after
        passed, back = (decision == RISE) | (decision == LAST), decision == FALL_BACK
        updates = jax.tree.map(
            lambda u, stable, p: jnp.where(back, stable - p, u), updates, state.stable, params
        )
        stable = jax.tree.map(lambda old, p: jnp.where(passed, p, old), state.stable, params)
        return updates, after._replace(stable=stable)

    return optax.GradientTransformationExtraArgs(init, update)


def rollout_length(state: GateState, lengths: Sequence[int]) -> int:
    """The next rollout's length limit in tokens (a host value: one compile a stage)."""
    return lengths[int(state.stage)]


def last_decision(state: GateState) -> int:
    """The newest measurement's index into DECISIONS (a host value); -1 before any."""
    return int(state.history.decision[state.measurements - 1])


def _check(lengths: tuple[int, ...], nats: float | None, share: float | None) -> None:
    if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
        raise ConfigError(f"entropy_gate: lengths must be positive and rise, got {lengths}")
    both, neither = None not in (nats, share), (nats, share) == (None, None)
    if both or (neither and len(lengths) > 1):
        raise ConfigError(
            "entropy_gate: set one of entropy_threshold_nats and entropy_threshold_share, got"
            f" {nats} and {share}"
        )
    if nats is not None and not 0 <= nats < float("inf"):
        raise ConfigError(f"entropy_gate: entropy_threshold_nats must be at least 0, got {nats}")
    if share is not None and not 0 < share < float("inf"):
        raise ConfigError(f"entropy_gate: entropy_threshold_share must be over 0, got {share}")


FIXED_HORIZON = entropy_gate((64,), measurements=1)
"""The gate of one length, of whatever tokens: nothing to decide."""
