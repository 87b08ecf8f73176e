"""Combinators: functions that take losses and return a loss of the same kind.

They forward their arguments untouched, so the same ones serve both levels and nest: a `TokenLoss`
(vocabulary level) or an `Objective` (token level).

    mix(forward_kl, reverse_kl, weight=0.8)          a forward-heavy token loss
    add(divergence, scale(negative_log_likelihood, 0.1))    an objective with a little SFT in it

A composed loss knows how it was written (`describe`), and what was written can be read back
(`parse`): that is how a config file, a checkpoint and the command line speak of the same loss.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import kl
from kdjax.base import ConfigError, Objective, Scores, TokenLoss, WeightedSum
from kdjax.numerics import log_probs

F = TypeVar("F", bound=Callable[..., jax.Array])


def mix(first: F, second: F, *, weight: float) -> F:
    """weight * first + (1 - weight) * second, the weight on the first. Laws: mix(a, a, w) = a.

    KL mixing of arXiv 2605.16826: `mix(forward_kl, reverse_kl, weight=0.8)` is forward-heavy.
    (The paper's lambda multiplies the reverse term; here the weight is always the first's.)

    >>> same = mix(kl.forward_kl, kl.forward_kl, weight=0.3)
    >>> describe(same)
    'mix(forward_kl, forward_kl, weight=0.3)'
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"mix: weight must be in [0, 1], got {weight}")

    def mixed(*args):
        return weight * first(*args) + (1 - weight) * second(*args)

    return _composed(mixed, mix, first, second, weight=weight)


def scale(loss: F, factor: float) -> F:
    """factor * loss.

    >>> describe(scale(kl.reverse_kl, 0.1))
    'scale(reverse_kl, 0.1)'
    """
    return _composed(lambda *args: factor * loss(*args), scale, loss, numbers=(factor,))


def add(first: F, *rest: F) -> F:
    """The sum of losses of one kind.

    >>> describe(add(kl.forward_kl, kl.reverse_kl))
    'add(forward_kl, reverse_kl)'
    """
    return _composed(lambda *args: sum((f(*args) for f in rest), first(*args)), add, first, *rest)


def clip(loss: F, maximum: float) -> F:
    """min(loss, maximum): a token above the bound keeps its value's bound and loses its gradient.

    >>> skewed = jnp.log(jnp.array([0.1, 0.9]))
    >>> float(clip(kl.forward_kl, 0.5)(skewed, skewed[::-1]))
    0.5
    """
    return _composed(
        lambda *args: jnp.minimum(loss(*args), maximum), clip, loss, numbers=(maximum,)
    )


def at_temperature(loss: TokenLoss, temperature: float) -> TokenLoss:
    """The token loss between both distributions, each renormalised softmax(log p / temperature).

    No factor temperature**2 is put in front: for Hinton's, scale it by that.

    >>> describe(at_temperature(kl.forward_kl, 2.0))
    'at_temperature(forward_kl, 2.0)'
    """
    if not temperature > 0:
        raise ConfigError(f"at_temperature: temperature must be above 0, got {temperature}")

    def tempered(student_logp, teacher_logp):
        return loss(log_probs(student_logp, temperature), log_probs(teacher_logp, temperature))

    return _composed(tempered, at_temperature, loss, numbers=(temperature,))


def divergence(scores: Scores) -> jax.Array:
    """The objective of distillation: the token loss itself, [B, T] in nats (arXiv 2605.16826)."""
    if scores.divergence is None:
        raise ConfigError(
            "divergence: there is no teacher to diverge from; set teacher, or use another objective"
        )
    return scores.divergence


def negative_log_likelihood(scores: Scores) -> jax.Array:
    """The objective of plain SFT: -log q(token), [B, T] in nats; forward KL to a one-hot target."""
    return -scores.student_logp


def importance(objective: Objective, maximum: float) -> Objective:
    """min(ratio, maximum) * objective, ratio = student(token) / sampler(token) as a constant: what
    was drawn by older weights, or from a cut or tempered distribution, weighs as if it were drawn
    from the student's own (truncated importance sampling, Ionides 2008).

    >>> describe(importance(divergence, 2.0))
    'importance(divergence, 2.0)'
    """
    if not maximum > 0:
        raise ConfigError(f"importance: maximum must be above 0, got {maximum}")

    def weighed(scores: Scores) -> jax.Array:
        ratio = jnp.exp(jax.lax.stop_gradient(scores.student_logp) - scores.sampler_logp)
        return jnp.minimum(ratio, maximum) * objective(scores)

    return _composed(weighed, importance, objective, numbers=(maximum,))


def require_per_token(objective: Objective) -> None:
    """ConfigError unless an objective's value at a token depends on that token's scores alone.

    The loss head gives it packed tokens, [tokens], where neighbours may be of other sequences.
    """
    rng = np.random.default_rng(0)
    names = [name for name in Scores._fields if name != "mask"]
    values = {
        name: jnp.asarray(rng.uniform(0.1, 3.0, 5) * (-1 if "logp" in name else 1), jnp.float32)
        for name in names
    }
    scores = Scores(mask=jnp.ones(5, bool), **values)
    try:
        whole = np.asarray(objective(scores))
        alone = [objective(jax.tree.map(lambda x, i=i: x[i : i + 1], scores)) for i in range(5)]
        per_token = whole.shape == (5,) and np.allclose(whole, np.concatenate(alone))
        reason = "its value at a token depends on other tokens, or is not finite"
    except ConfigError:
        raise
    except Exception as error:
        per_token, reason = False, f"it does not run ({type(error).__name__}: {error})"
    if not per_token:
        raise ConfigError(
            f"objective {describe(objective)}: {_short(reason)};"
            " it must map Scores [tokens] to [tokens], one by one"
        )


def sequence_mean(mask: jax.Array) -> jax.Array:
    """The paper's: the mean over sequences of each one's token mean. [B, T] -> [B, T]

    Rows without a trained token weigh nothing and are not counted.

    >>> sequence_mean(jnp.array([[True, True], [True, False], [False, False]])).tolist()
    [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]
    """
    length = jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.where(mask, 1.0 / jnp.maximum(length, 1), 0.0)


def token_mean(mask: jax.Array) -> jax.Array:
    """The mean over all trained tokens of the global batch. [B, T] -> [B, T]

    >>> token_mean(jnp.array([[True, True], [True, False]])).tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    return jnp.where(mask, 1.0, 0.0)


def reduce(loss_bt: jax.Array, mask_bt: jax.Array, weights_bt: jax.Array) -> WeightedSum:
    """sum of weights * loss over the mask, with the weights' sum: where masks meet a loss.

    It selects before it multiplies: NaN times 0 is NaN.

    >>> mask = jnp.array([[True, False]])
    >>> float(reduce(jnp.array([[2.0, jnp.nan]]), mask, token_mean(mask)).mean())
    2.0
    """
    return WeightedSum(jnp.sum(jnp.where(mask_bt, loss_bt, 0.0) * weights_bt), jnp.sum(weights_bt))


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
    composition: _Composition | None = getattr(token_loss, "composition", None)
    if composition is None:
        return None
    combinator, losses, numbers, named = composition
    if combinator is at_temperature:
        return closed_form(losses[0], temperature * numbers[0])
    parts = [closed_form(loss, temperature) for loss in losses]
    return None if None in parts else combinator(*parts, *numbers, **named)


COMBINATORS = {f.__name__: f for f in (mix, scale, add, clip, at_temperature, importance)}
TOKEN_LOSSES = {f.__name__: f for f in (kl.forward_kl, kl.reverse_kl)}
OBJECTIVES = {f.__name__: f for f in (divergence, negative_log_likelihood)}
REDUCTIONS = {f.__name__: f for f in (sequence_mean, token_mean)}


def describe(function: Callable) -> str:
    """The text that a function is written as: its name, or the combinator call that made it.

    >>> describe(kl.forward_kl)
    'forward_kl'
    """
    if isinstance(function, functools.partial):
        given = [repr(a) for a in function.args] + [
            f"{k}={v!r}" for k, v in function.keywords.items()
        ]
        return f"partial({', '.join([describe(function.func), *given])})"
    name = getattr(function, "__name__", type(function).__qualname__)
    known = {**TOKEN_LOSSES, **OBJECTIVES, **REDUCTIONS}.get(name) is function or "(" in name
    return name if known else f"{getattr(function, '__module__', '?')}.{name}"


def parse(text: str, names: dict[str, Callable]) -> Callable:
    """The inverse of `describe`: reads `names` and combinator calls, evaluates nothing else.

    >>> describe(parse("mix(forward_kl, reverse_kl, weight=0.8)", TOKEN_LOSSES))
    'mix(forward_kl, reverse_kl, weight=0.8)'
    """

    def build(node: ast.expr):
        match node:
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Constant(value=number) if _is_number(number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=n)) if _is_number(n):
                return -n
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if (
                name in COMBINATORS
            ):
                return _call(
                    COMBINATORS[name],
                    [build(a) for a in args],
                    [(k.arg or "**", build(k.value)) for k in keywords],
                )
        raise ValueError(ast.unparse(node))

    try:
        built = build(ast.parse(text.strip(), mode="eval").body)
        if callable(built):
            return built
        reason = "that is a number"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = f"can't read {error}"
    raise ConfigError(
        f"{_short(repr(text))} is not a loss ({_short(reason)}); "
        f"names: {sorted(names)}, combinators: {sorted(COMBINATORS)}"
    )


def _is_number(value) -> TypeGuard[int | float]:
    """A finite int or float: what `describe` writes, and no bool."""
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) <= sys.float_info.max


def _call(function: Callable, positional: list, keyword: list[tuple[str, object]]):
    """The combinator's call, refused unless losses and numbers stand where each belongs."""
    if len(dict(keyword)) < len(keyword):
        raise TypeError(f"{function.__name__}: an argument is given twice")
    signature = inspect.signature(function, eval_str=True)
    bound = signature.bind(*positional, **dict(keyword))
    for name, value in bound.arguments.items():
        wants_number = signature.parameters[name].annotation is float
        for one in value if isinstance(value, tuple) else (value,):
            if callable(one) == wants_number:
                wanted = "a number" if wants_number else "a loss"
                raise TypeError(f"{function.__name__}: {name} must be {wanted}")
    return function(*bound.args, **bound.kwargs)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _spelled(number) -> str:
    """A number as plain Python text, NumPy's included: what `parse` reads back."""
    return repr(number.item() if isinstance(number, np.generic) else number)


class _Composition(NamedTuple):
    combinator: Callable
    losses: tuple[Callable, ...]
    numbers: tuple
    named: dict[str, float]


def _composed(function, combinator: Callable, *losses: Callable, numbers: tuple = (), **named):
    """The function, made to know how it was written."""
    arguments = [
        *(describe(loss) for loss in losses),
        *(_spelled(n) for n in numbers),
        *(f"{name}={_spelled(n)}" for name, n in named.items()),
    ]
    function.__name__ = f"{combinator.__name__}({', '.join(arguments)})"
    function.__qualname__ = function.__name__
    function.composition = _Composition(combinator, losses, numbers, named)
    return function


__all__ = [
    "Objective", "TokenLoss", "add", "at_temperature", "clip", "describe", "divergence",
    "importance", "mix",
    "negative_log_likelihood", "parse", "reduce", "scale", "sequence_mean", "token_mean",
]  # fmt: skip
