"""Composed functions: each knows its own text, and may go with training's progress.

Combinators make their results with `composed`, so that a config file, a checkpoint and the command
line speak of the same loss (`describe`, and `names.parse`, its inverse).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that goes with the progress of training: 0 at the first step, 1 after the last.

    Any number of a combinator may be one: `mix(forward_kl, reverse_kl, weight=linear(0.9, 0.1))`.
    """

    text: str
    ends: tuple[float, float]
    at: Callable[[jax.Array], jax.Array]

    def __str__(self) -> str:
        return self.text


if TYPE_CHECKING:
    Number = Any  # when a function computes with it, a schedule's is a number
else:
    Number = float | Schedule


def linear(start: float, end: float) -> Schedule:
    """start + (end - start) * progress.

    >>> float(linear(0.9, 0.1).at(0.5))
    0.5
    """
    text = f"linear({_spelled(start)}, {_spelled(end)})"
    return Schedule(text, (start, end), lambda progress: start + (end - start) * progress)


def switch(before: float, after: float, at: float) -> Schedule:
    """`before` until the share `at` of training is over, `after` from then on.

    >>> float(switch(1.0, 0.0, at=0.5).at(0.75))
    0.0
    """
    text = f"switch({_spelled(before)}, {_spelled(after)}, at={_spelled(at)})"
    return Schedule(text, (before, after), lambda progress: jnp.where(progress < at, before, after))


def require(name: str, number: Number, good: Callable[[float], bool], wanted: str) -> None:
    """ConfigError unless a combinator's number, or both ends of its schedule, are good.

    >>> require("mix: weight", linear(0, 1), lambda w: 0 <= w <= 1, "in [0, 1]")
    """
    if isinstance(number, jax.Array):  # a schedule that was checked, at some progress
        return
    ends = number.ends if isinstance(number, Schedule) else (number,)
    if not all(good(end) for end in ends):
        raise ConfigError(f"{name} must be {wanted}, got {number}")


class Composition(NamedTuple):
    """The call that made a function: combinator(*functions, *numbers, **named)."""

    combinator: Callable
    functions: tuple[Callable, ...]
    numbers: tuple[Any, ...]
    named: dict[str, Any]


def composed(
    function: Callable,
    combinator: Callable,
    *functions: Callable,
    numbers: tuple = (),
    **named: Any,
) -> Any:
    """The function, made to know how it was written. One with a schedule among its own numbers is
    not run before `at_progress`."""
    arguments = [
        *(describe(one) for one in functions),
        *(_spelled(n) for n in numbers),
        *(f"{name}={_spelled(n)}" for name, n in named.items()),
    ]
    text = f"{combinator.__name__}({', '.join(arguments)})"
    if any(isinstance(n, Schedule) for n in (*numbers, *named.values())):
        function = functools.partial(_unscheduled, text)
    made: Any = lambda *args: function(*args)  # noqa: E731  a name of its own, a function of many
    made.__name__ = made.__qualname__ = text
    made.composition = Composition(combinator, functions, numbers, named)
    return made


def composition_of(function: Callable) -> Composition | None:
    """The call that made a function, if a combinator did."""
    return getattr(function, "composition", None)


def at_progress(function: Any, progress: Any) -> Any:
    """The same composition with each schedule's number at this progress in [0, 1].

    >>> from kdjax.losses.combinators import mix
    >>> first, second = (lambda x: 2 * x), (lambda x: 4 * x)
    >>> float(at_progress(mix(first, second, weight=linear(1, 0)), 0.5)(1.0))
    3.0
    """
    composition = composition_of(function)
    if composition is None or not schedules(function):
        return function

    def now(number):
        return jnp.asarray(number.at(progress)) if isinstance(number, Schedule) else number

    combinator, functions, numbers, named = composition
    made = combinator(
        *(at_progress(one, progress) for one in functions),
        *map(now, numbers),
        **{name: now(number) for name, number in named.items()},
    )
    made.__name__ = made.__qualname__ = describe(function)  # as it was written
    return made


def schedules(function: Callable) -> dict[str, Schedule]:
    """Every schedule in a composition, by its text."""
    composition = composition_of(function)
    if composition is None:
        return {}
    _, functions, numbers, named = composition
    own = (n for n in (*numbers, *named.values()) if isinstance(n, Schedule))
    found = {schedule.text: schedule for schedule in own}
    return functools.reduce(lambda a, b: a | b, map(schedules, functions), found)


def walk(function: Callable) -> Iterator[Callable]:
    """A function and all that it is composed of, outermost first."""
    yield function
    composition = composition_of(function)
    for one in composition.functions if composition else ():
        yield from walk(one)


def theirs(function: Callable) -> list[Callable]:
    """The functions in a composition that are of no file of this package: the user's own.

    >>> from kdjax.losses.kl import forward_kl
    >>> theirs(forward_kl), theirs(print)
    ([], [<built-in function print>])
    """
    leaves = (one for one in walk(function) if composition_of(one) is None)
    return [one for one in leaves if not _is_ours(one)]


def _is_ours(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "?")).split(".")[0] == "kdjax"


def describe(function: Callable) -> str:
    """The text that a function is written as: its name, or the combinator call that made it; of a
    function outside this package, with its module.

    >>> from kdjax.losses.kl import forward_kl
    >>> describe(forward_kl)
    'forward_kl'
    """
    if isinstance(function, functools.partial):
        given = [repr(a) for a in function.args] + [
            f"{k}={v!r}" for k, v in function.keywords.items()
        ]
        return f"partial({', '.join([describe(function.func), *given])})"
    name = getattr(function, "__name__", type(function).__qualname__)
    own = _is_ours(function) or composition_of(function) is not None
    return name if own else f"{getattr(function, '__module__', '?')}.{name}"


def _unscheduled(text: str, *_):
    raise ConfigError(
        f"{text} goes with training's progress, which is not known here;"
        " give the step `steps`, or at_progress(loss, progress) a number in [0, 1]"
    )


def _spelled(number: Any) -> str:
    """A number as plain Python text, NumPy's included: what `names.parse` reads back."""
    if isinstance(number, Schedule):
        return number.text
    return repr(number.item() if isinstance(number, np.generic) else number)


SCHEDULES = (linear, switch)
