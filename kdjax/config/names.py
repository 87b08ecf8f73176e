"""Every loss, objective and reduction that a config file or the command line can name: those of the
tables in `kdjax/losses/`, and the rewards."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeGuard

from kdjax.base import Objective, Reduction
from kdjax.errors import ConfigError
from kdjax.grading import rewards
from kdjax.losses import TABLES, named
from kdjax.losses.composition import Number, Schedule, composition_of, walk


class Names(NamedTuple):
    """What one kind of function is written with: names of functions, of what composes them, and of
    what these take besides, which is of another kind."""

    functions: dict[str, Callable]
    combinators: dict[str, Callable]
    inside: Mapping[str, Callable] = MappingProxyType({})

    def has(self, function: object) -> bool:
        """Whether a function is of this kind, by its name or by what composed it."""
        made_by = composition_of(function) if callable(function) else None
        if made_by is not None:
            return made_by.combinator in self.combinators.values()
        return function in self.functions.values()


TOKEN_LOSSES = Names(named("TOKEN_LOSSES"), named("TOKEN_LOSS_MAKERS"))
OBJECTIVES = Names(named("OBJECTIVES"), named("OBJECTIVE_MAKERS"))
REDUCTIONS = Names(
    named("REDUCTIONS"), named("REDUCTION_MAKERS"), named("OBJECTIVES", "OBJECTIVE_MAKERS")
)
GROUP_ADVANTAGES = Names(named("GROUP_ADVANTAGES"), {})
REWARDS = Names({reward.__name__: reward for reward in rewards.REWARDS}, {})
SCHEDULES = named("SCHEDULES")
KNOWN = named(*TABLES) | REWARDS.functions
LONGEST = 10_000
"""Characters of a function's text."""


def parse(text: str, names: Names) -> Callable:
    """The inverse of `composition.describe`: reads names, calls of combinators and schedules, and
    numbers; evaluates nothing else.

    >>> from kdjax.losses.composition import describe
    >>> describe(parse("mix(forward_kl, reverse_kl, weight=linear(0.9, 0.5))", TOKEN_LOSSES))
    'mix(forward_kl, reverse_kl, weight=linear(0.9, 0.5))'
    """

    known = {**names.inside, **names.functions}

    def build(node: ast.expr):
        match node:
            case ast.Name(id=name) if name in known:
                return known[name]
            case ast.Constant(value=number) if _is_number(number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=n)) if _is_number(n):
                return -n
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                function = {**names.inside, **names.combinators, **SCHEDULES}.get(name)
                if function is not None:
                    given = [(k.arg or "**", build(k.value)) for k in keywords]
                    return _call(function, [build(a) for a in args], given)
        raise ValueError(ast.unparse(node))

    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python about the text: it is refused here, or fine
            built = build(ast.parse(text.strip(), mode="eval").body)
        if callable(built) and names.has(built):
            return built
        reason = (
            "that ranks tokens; it is written inside one" if callable(built) else "that is a number"
        )
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = f"can't read {error}"
    raise ConfigError(
        f"{_short(repr(text))} is not one of these ({_short(reason)}): {sorted(names.functions)},"
        f" composed by {sorted(names.combinators)}"
    )


def require_named(function: Callable) -> None:
    """ConfigError where a function, or one that it is composed of, is of this package and in no
    table: a config that was written with it could not be read back."""
    for one in walk(function):
        composition = composition_of(one)
        made_by = one if composition is None else composition.combinator
        name, module = (getattr(made_by, about, "") for about in ("__name__", "__module__"))
        if module.split(".")[0] == "kdjax" and name not in KNOWN:
            raise ConfigError(f"{name} is in no table of {module}; add it to one at its foot")


def names_others(text: str) -> bool:
    """Whether a text that `describe` wrote may name functions from outside this package: those have
    their module before them, and what composes them may have any name.

    >>> names_others("mix(train.py.own, forward_kl, weight=0.5)"), names_others("hellinger")
    (True, False)
    """
    try:
        nodes = [*ast.walk(ast.parse(text.strip(), mode="eval"))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    others = [f for f in called if not (isinstance(f, ast.Name) and f.id in KNOWN)]
    return bool(others) or any(isinstance(node, ast.Attribute) for node in nodes)


def _is_number(value) -> TypeGuard[int | float]:
    """A finite int or float: what `describe` writes, and no bool."""
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) <= sys.float_info.max


def _call(function: Callable, positional: list, keyword: list[tuple[str, object]]):
    """The combinator's call, refused unless functions and numbers stand where each belongs."""
    if len(dict(keyword)) < len(keyword):
        raise TypeError(f"{function.__name__}: an argument is given twice")
    signature = inspect.signature(function, eval_str=True)
    bound = signature.bind(*positional, **dict(keyword))
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].annotation
        for one in value if isinstance(value, tuple) else (value,):
            if not _belongs(one, kind):
                raise TypeError(f"{function.__name__}: {name} must be {_wanted(kind)}")
    return function(*bound.args, **bound.kwargs)


def _belongs(value: object, kind: object) -> bool:
    if kind is int:
        return isinstance(value, int)
    if kind is float:
        return isinstance(value, int | float)
    if kind in (Number, Number | None):
        return isinstance(value, int | float | Schedule)
    if kind == Reduction:
        return REDUCTIONS.has(value)
    return callable(value) and not (kind == Objective and REDUCTIONS.has(value))


def _wanted(kind: object) -> str:
    words: dict[object, str] = {int: "a whole number", float: "a number"}
    words |= dict.fromkeys((Number, Number | None), "a number or a schedule")
    return words.get(kind, "a function")


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
