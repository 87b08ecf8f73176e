"""A trial of losses before they are compiled: shapes on abstract values, as a compiler sees them,
then values and gradients of a few tokens.

An error names the function, its file and its line. Of compositions the user's own functions are
tried alone (`composition.theirs`), since a combinator hides a wrong shape by broadcasting it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Objective, Reduction, Rollout, Scores, TokenLoss
from kdjax.errors import ConfigError, first_line, place_of, raised_in
from kdjax.losses.composition import at_progress, describe, schedules, theirs
from kdjax.losses.grpo import GroupAdvantage
from kdjax.losses.reductions import ranked_by, reads_scores

TOKENS = 3
"""Tokens of a trial: more than one, so that a sum over them is seen."""

AS_TOKEN_LOSS = "a token loss makes [...] of student_logp and teacher_logp, [..., V] each"
AS_OBJECTIVE = "it must map Scores [tokens] to [tokens], one by one"
AS_REDUCTION = (
    "a reduction makes weights [B, T] of mask [B, T], the rollout, and scores if it names them"
)
AS_ADVANTAGE = "advantages are finite, of the rewards' shape, and 0 in a group of equal rewards"

REMEDIES = {
    "TracerBoolConversionError": "; no value is known here: use jnp.where in place of if",
    "ConcretizationTypeError": "; no value is known here: keep arrays, without float() and int()",
    "TracerArrayConversionError": "; no value is known here: use jax.numpy in place of numpy",
}
"""What helps against errors of JAX, by their names."""


def try_token_loss(token_loss: TokenLoss, vocabulary: int, *, excludes: bool = False) -> None:
    """ConfigError where a function of the user's own in a token loss raises, makes another shape
    than one number a token, a number that is not finite or has no finite gradient, or a token's
    number from others'.

    Args:
        token_loss: the loss, or a composition of several.
        vocabulary: entries of a distribution.
        excludes: whether an entry may be excluded by both (-inf), as it is by stop policy merge.

    >>> try_token_loss(lambda student_logp, teacher_logp: -teacher_logp.sum(-1), 5)
    """
    given = _distributions(vocabulary, excludes)
    for loss in theirs(token_loss):
        made = _spelled(_tried("token_loss", loss, AS_TOKEN_LOSS, _made, loss, *given))
        if made != f"[{TOKENS}]":
            raise ConfigError(
                f"token_loss: {place_of(loss)} made {made}, not [{TOKENS}], of two"
                f" [{TOKENS}, {vocabulary}]; {AS_TOKEN_LOSS}"
            )
        _tried("token_loss", loss, AS_TOKEN_LOSS, _check_loss, loss, *given)


def _check_loss(loss: TokenLoss, student_logp: jax.Array, teacher_logp: jax.Array) -> None:
    """Errors: ConfigError for values or gradients that are not finite, or of several tokens."""
    gradient = jax.grad(lambda student: loss(student, teacher_logp).sum())
    whole = np.asarray(loss(student_logp, teacher_logp))
    excluded = np.isinf(student_logp).any()
    about = "an entry that both exclude (-inf)" if excluded else "two ordinary distributions"
    _check_finite("token_loss: {}: its value", loss, about, loss, student_logp, teacher_logp)
    _check_finite("token_loss: {}: its gradient", loss, about, gradient, student_logp)
    rows = [loss(student_logp[n : n + 1], teacher_logp[n : n + 1]) for n in range(TOKENS)]
    if not np.allclose(whole, np.concatenate(rows), rtol=1e-3, atol=1e-5):
        raise ConfigError(
            f"token_loss: {place_of(loss)}: its value at a token depends on other tokens, and"
            f" tokens come in chunks; {AS_TOKEN_LOSS}"
        )


def try_reduction(reduction: Reduction) -> None:
    """ConfigError where a reduction of the user's own raises, or makes no finite [B, T].

    >>> try_reduction(lambda mask, rollout: mask / mask.sum())
    """
    mask = np.array([[True, True, False], [True, True, True]])
    rows, tokens = mask.shape
    number = {"bs": (rows, 5), "bt": mask.shape, "b": (rows,)}
    fields: dict[str, Any] = {
        name: np.full(number[name.rpartition("_")[2]], 0.5, np.float32)
        for name in Rollout._fields
        if not name.startswith("teacher_")
    }
    for name in ("truncated_b", "not_scored_b", "signal_b"):
        fields[name] = np.array([True, False])
    for name in ("prompt_length_b", "response_length_b", "staleness_b", "draws_b"):
        fields[name] = np.array([2, 3], np.int32)
    fields["tokens_bs"] = np.ones((rows, 5), np.int32)
    known: dict[str, Any] = {
        name: jnp.full(mask.shape, 0.5) for name in Scores._fields if name not in ("mask", "parts")
    }
    drawn, scores = (
        jax.tree.map(jnp.asarray, Rollout(**fields)),
        Scores(mask=jnp.asarray(mask), **known),
    )
    weighing, quantities = ranked_by(reduction)
    for one in quantities:
        if schedules(one):
            raise ConfigError(
                f"reduction: {describe(one)} goes with training's progress, which no reduction"
                " knows; write a number in place of the schedule"
            )
    last = (scores,) if reads_scores(weighing) else ()
    calls = [
        (weighing, (jnp.asarray(mask), drawn, *last)),
        *((one, (scores,)) for one in quantities),
    ]
    for one, given in calls:
        for own in theirs(one):
            made = _tried("reduction", own, AS_REDUCTION, _made, own, *given)
            if made is None or made.shape != mask.shape:
                raise ConfigError(
                    f"reduction: {place_of(own)} made {_spelled(made)} of a mask"
                    f" [{rows}, {tokens}]; {AS_REDUCTION}"
                )
            _check_finite("reduction: {}: a weight", own, "an ordinary mask", own, *given)


def require_per_token(objective: Objective) -> None:
    """ConfigError unless an objective runs, and its value at a token is finite and depends on that
    token's scores alone.

    The loss head gives it packed tokens, [tokens], where neighbours may be of other sequences.
    """
    rng, now = np.random.default_rng(0), at_progress(objective, 0.5)
    names = [name for name in Scores._fields if name not in ("mask", "parts")]
    values: dict[str, Any] = {
        name: jnp.asarray(rng.uniform(0.1, 3.0, 5) * (-1 if "logp" in name else 1), jnp.float32)
        for name in names
    }
    scores = Scores(mask=jnp.ones(5, bool), **values)
    _tried("objective", objective, AS_OBJECTIVE, _check_objective, objective, now, scores)


def try_advantage(advantage: GroupAdvantage, group_size: int) -> None:
    """ConfigError where an advantage of the user's own raises, or is not finite and of its rewards'
    shape for a group with a reward and one without.

    >>> try_advantage(lambda reward_gs: reward_gs - reward_gs.mean(1, keepdims=True), 4)
    """
    if not theirs(advantage):
        return
    rewards = np.zeros((2, group_size))
    rewards[1, 0] = 1.0
    with np.errstate(all="ignore"):  # what comes of it is told in a line
        made = _tried("rl.advantage", advantage, AS_ADVANTAGE, _numbers, advantage, rewards.copy())
    if made.shape != rewards.shape or not np.isfinite(made).all():
        raise ConfigError(
            f"rl.advantage: {place_of(advantage)} made {made.tolist()} of rewards"
            f" {rewards.tolist()}; {AS_ADVANTAGE}"
        )


def _check_objective(objective: Objective, now: Objective, scores: Scores) -> None:
    made, tokens = _made(now, scores), scores.mask.shape
    if made is None or made.shape != tokens:
        raise ConfigError(
            f"objective: {_named(objective)} made {_spelled(made)}, not [{tokens[0]}], of Scores"
            f" [{tokens[0]}]; {AS_OBJECTIVE}"
        )
    whole = np.asarray(now(scores))
    _check_finite("objective: {}: its value", objective, "ordinary scores", now, scores)
    alone = [now(jax.tree.map(lambda x, i=i: x[i : i + 1], scores)) for i in range(*tokens)]
    if not np.allclose(whole, np.concatenate(alone)):
        raise ConfigError(
            f"objective: {_named(objective)}: its value at a token depends on other tokens;"
            f" {AS_OBJECTIVE}"
        )


def _named(function: Callable) -> str:
    """The functions of the user's own in a composition, or its text where there are none."""
    return ", ".join(map(place_of, theirs(function))) or describe(function)


def _check_finite(what: str, function: Callable, given: str, make: Callable, *args: Any) -> None:
    """Errors: ConfigError where what it makes of these arguments is not finite, naming the line
    where the first NaN arises, where one does."""
    made = np.asarray(make(*args))
    if np.isfinite(made).all():
        return
    place = _named(function)
    try:
        with jax.debug_nans(True), contextlib.redirect_stdout(None):  # it prints what it does
            make(*args)
    except FloatingPointError as error:
        place = raised_in(error) or place
    raise ConfigError(
        f"{what.format(place)} is {made[~np.isfinite(made)].flat[0]} for {given}; keep it finite"
        " (no log of 0, no 0 / 0; jax.numpy.where around the arguments, not the result)"
    )


def _tried(kind: str, function: Callable, wanted: str, call: Callable, *args: Any) -> Any:
    """call(*args), which runs the function. Errors: ConfigError naming where it raised."""
    try:
        return call(*args)
    except ConfigError:
        raise
    except Exception as error:
        remedy = REMEDIES.get(type(error).__name__, "")
        place = raised_in(error) or _named(function)
        raise ConfigError(f"{kind}: {place}: {first_line(error)}{remedy}; {wanted}") from error


def _made(function: Callable, *given: Any) -> jax.ShapeDtypeStruct | None:
    """What it makes of values that are not known; None of what is no array."""
    made = jax.eval_shape(function, *given)
    return made if isinstance(made, jax.ShapeDtypeStruct) else None


def _numbers(function: Callable, *given: Any) -> np.ndarray:
    """What it makes, as numbers. Errors: TypeError or ValueError of what is none."""
    return np.asarray(function(*given), np.float64)


def _spelled(made: jax.ShapeDtypeStruct | None) -> str:
    """Shape, and dtype where it is not of floats.

    >>> _spelled(jax.ShapeDtypeStruct((3, 2), jnp.int32))
    '[3, 2] int32'
    """
    if made is None:
        return "no array"
    dtype = "" if jnp.issubdtype(made.dtype, jnp.floating) else f" {made.dtype}"
    return f"[{', '.join(map(str, made.shape))}]{dtype}"


def _distributions(vocabulary: int, excludes: bool) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of student and teacher, [TOKENS, V]."""
    logits = np.random.default_rng(0).normal(scale=2.0, size=(2, TOKENS, vocabulary))
    if excludes:
        logits[..., -1] = -np.inf
    student, teacher = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return student, teacher
