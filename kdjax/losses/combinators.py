"""Combinators: functions that take losses and return a loss of the same kind.

They forward their arguments untouched, so the same ones serve both levels and nest: a `TokenLoss`
(vocabulary level) or an `Objective` (token level).

    mix(forward_kl, reverse_kl, weight=0.8)          a forward-heavy token loss
    add(divergence, scale(negative_log_likelihood, 0.1))    an objective with a little SFT in it

Every number may be a schedule over training (`kdjax.losses.composition`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Objective, Scores, TokenLoss
from kdjax.errors import ConfigError
from kdjax.losses import kl
from kdjax.losses.composition import (
    Number,
    at_progress,
    composed,
    composition_of,
    require,
)
from kdjax.numerics import log_probs

F = TypeVar("F", bound=Callable[..., jax.Array])


def mix(first: F, second: F, *, weight: Number) -> F:
    """weight * first + (1 - weight) * second, the weight on the first. Laws: mix(a, a, w) = a.

    KL mixing of arXiv 2605.16826: `mix(forward_kl, reverse_kl, weight=0.8)` is forward-heavy.
    (The paper's lambda multiplies the reverse term; here the weight is always the first's.)

    >>> same = mix(kl.forward_kl, kl.forward_kl, weight=0.3)
    >>> same.__name__
    'mix(forward_kl, forward_kl, weight=0.3)'
    """
    require("mix: weight", weight, lambda w: 0 <= w <= 1, "in [0, 1]")

    def mixed(*args):
        return weight * first(*args) + (1 - weight) * second(*args)

    return composed(mixed, mix, first, second, weight=weight)


def scale(loss: F, factor: Number) -> F:
    """factor * loss.

    >>> scale(kl.reverse_kl, 0.1).__name__
    'scale(reverse_kl, 0.1)'
    """
    return composed(lambda *args: factor * loss(*args), scale, loss, numbers=(factor,))


def add(first: F, *rest: F) -> F:
    """The sum of losses of one kind.

    >>> add(kl.forward_kl, kl.reverse_kl).__name__
    'add(forward_kl, reverse_kl)'
    """
    return composed(lambda *args: sum((f(*args) for f in rest), first(*args)), add, first, *rest)


def clip(loss: F, maximum: Number) -> F:
    """min(loss, maximum): a token above the bound keeps its value's bound and loses its gradient.

    >>> skewed = jnp.log(jnp.array([0.1, 0.9]))
    >>> float(clip(kl.forward_kl, 0.5)(skewed, skewed[::-1]))
    0.5
    """
    return composed(lambda *args: jnp.minimum(loss(*args), maximum), clip, loss, numbers=(maximum,))


def at_temperature(loss: TokenLoss, temperature: Number) -> TokenLoss:
    """The token loss between both distributions, each renormalised softmax(log p / temperature).

    No factor temperature**2 is put in front: for Hinton's, scale it by that.

    >>> at_temperature(kl.forward_kl, 2.0).__name__
    'at_temperature(forward_kl, 2.0)'
    """
    require("at_temperature: temperature", temperature, lambda t: t > 0, "above 0")

    def tempered(student_logp, teacher_logp):
        return loss(log_probs(student_logp, temperature), log_probs(teacher_logp, temperature))

    return composed(tempered, at_temperature, loss, numbers=(temperature,))


def runs_on(objective: Objective, *known: str) -> bool:
    """Whether an objective needs no more than these `Scores` beside the student's and the
    sampler's; others are None.

    >>> from kdjax.losses.objectives import divergence, negative_log_likelihood
    >>> runs_on(negative_log_likelihood), runs_on(divergence), runs_on(divergence, "divergence")
    (True, False, True)
    """
    one = jnp.ones(1)
    fields: dict[str, Any] = dict.fromkeys(known, one)
    try:
        jax.eval_shape(at_progress(objective, 0.5), Scores(one, one, one, one > 0, **fields))
    except (ConfigError, TypeError, AttributeError):  # what None does in an expression
        return False
    return True


def closed_form(token_loss: TokenLoss, temperature: float = 1.0) -> Callable | None:
    """The same composition over the closed forms of `compare`, or None if there is none.

    It takes at(temperature) -> Comparison and gives the loss at each token: combinators serve both
    levels, so a mix of KLs is the mix of their closed forms.

    >>> closed_form(mix(kl.forward_kl, kl.reverse_kl, weight=0.8)) is None
    False
    """
    if token_loss in (kl.forward_kl, kl.reverse_kl):
        name = token_loss.__name__
        return lambda at: getattr(at(temperature), name)
    composition = composition_of(token_loss)
    if composition is None:
        return None
    combinator, losses, numbers, named = composition
    if combinator is at_temperature:
        return closed_form(losses[0], temperature * numbers[0])
    if combinator not in POINTWISE:
        return None
    parts = [closed_form(loss, temperature) for loss in losses]
    return None if None in parts else combinator(*parts, *numbers, **named)


POINTWISE = (mix, scale, add, clip)
"""Combinators that look at the values of their losses alone."""


def terms(loss: Callable) -> list[Callable]:
    """What a loss is a weighted sum of: itself, unless it is a mix, a sum or a multiple.

    >>> [t.__name__ for t in terms(mix(kl.forward_kl, scale(kl.reverse_kl, 2), weight=0.8))]
    ['forward_kl', 'reverse_kl']
    """
    composition = composition_of(loss)
    if composition is None or composition.combinator not in SUMS:  # of one that has no hash, too
        return [loss]
    return list(weights(loss))


SUMS = (mix, add, scale)
"""The combinators whose result is a sum of terms."""


def weights(loss: Callable) -> dict[Callable, float]:
    """The terms of a loss, each with its factor in the sum; NaN where one goes with training.

    >>> nested = mix(kl.reverse_kl, mix(kl.forward_kl, kl.reverse_kl, weight=0.5), weight=0.25)
    >>> weights(nested)[kl.forward_kl]
    0.375
    """
    composition = composition_of(loss)
    if composition is None or composition.combinator not in SUMS:
        return {loss: 1.0}
    _, functions, numbers, named = composition
    if composition.combinator is mix:
        first = _known(named["weight"])
        factors = [first, 1 - first]
    else:
        factors = [_known(n) for n in numbers] or [1.0] * len(functions)
    found: dict[Callable, float] = {}
    for one, factor in zip(functions, factors, strict=True):
        for term, weight in weights(one).items():
            found[term] = found.get(term, 0.0) + factor * weight
    return found


def _known(number: Number) -> float:
    return float(number) if isinstance(number, int | float | np.number) else float("nan")


TOKEN_LOSS_MAKERS: tuple[Callable, ...] = (*POINTWISE, at_temperature)
OBJECTIVE_MAKERS: tuple[Callable, ...] = POINTWISE
