"""Every loss, objective and reduction that a config file or the command line can name."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

from kdjax.errors import ConfigError
from kdjax.grading import rewards
from kdjax.losses import combinators, composition, divergences, grpo, kl, objectives, reductions
from kdjax.losses.composition import Number, Schedule


class Names(NamedTuple):
    """What one kind of function is written with: names of functions, and of what composes them."""

    functions: dict[str, Callable]
    combinators: dict[str, Callable]


def _by_name(*functions: Callable) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}


_BOTH_LEVELS = (combinators.mix, combinators.scale, combinators.add, combinators.clip)

TOKEN_LOSSES = Names(
    _by_name(kl.forward_kl, kl.reverse_kl, divergences.total_variation),
    _by_name(
        *_BOTH_LEVELS,
        combinators.at_temperature,
        divergences.jensen_shannon,
        divergences.skew_forward_kl,
        divergences.skew_reverse_kl,
        divergences.alpha_divergence,
        divergences.adaptive_kl,
        divergences.token_wise_kl,
        divergences.at_top_k,
    ),
)
OBJECTIVES = Names(
    _by_name(
        objectives.divergence,
        objectives.negative_log_likelihood,
        objectives.forward_divergence,
        objectives.reverse_divergence,
        objectives.log_ratio,
        objectives.reference_log_ratio,
        grpo.group_advantage,
        grpo.negative_entropy,
    ),
    _by_name(
        *_BOTH_LEVELS,
        objectives.where_teacher_unsure,
        objectives.policy_gradient,
        objectives.power_difference,
        objectives.extrapolated,
        objectives.log_compressed,
        objectives.bounded,
        grpo.clipped_surrogate,
        grpo.importance,
    ),
)
REDUCTIONS = Names(
    _by_name(reductions.sequence_mean, reductions.token_mean),
    _by_name(
        reductions.first_tokens,
        reductions.most_uncertain,
        reductions.finished_only,
        reductions.paced,
    ),
)
GROUP_ADVANTAGES = Names(_by_name(grpo.standardized, grpo.centered, grpo.leave_one_out), {})
REWARDS = Names(_by_name(rewards.accuracy, rewards.math), {})
SCHEDULES = _by_name(composition.linear, composition.switch)
LONGEST = 10_000
"""Characters of a function's text."""


def parse(text: str, names: Names) -> Callable:
    """The inverse of `composition.describe`: reads names, calls of combinators and schedules, and
    numbers; evaluates nothing else.

    >>> from kdjax.losses.composition import describe
    >>> describe(parse("mix(forward_kl, reverse_kl, weight=linear(0.9, 0.5))", TOKEN_LOSSES))
    'mix(forward_kl, reverse_kl, weight=linear(0.9, 0.5))'
    """

    def build(node: ast.expr):
        match node:
            case ast.Name(id=name) if name in names.functions:
                return names.functions[name]
            case ast.Constant(value=number) if _is_number(number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=n)) if _is_number(n):
                return -n
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                function = (names.combinators | SCHEDULES).get(name)
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
        if callable(built):
            return built
        reason = "that is a number"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = f"can't read {error}"
    raise ConfigError(
        f"{_short(repr(text))} is not one of these ({_short(reason)}): {sorted(names.functions)},"
        f" composed by {sorted(names.combinators)}"
    )


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
    return callable(value)


def _wanted(kind: object) -> str:
    words: dict[object, str] = {int: "a whole number", float: "a number"}
    words |= dict.fromkeys((Number, Number | None), "a number or a schedule")
    return words.get(kind, "a function")


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
