"""The sampler's levels: responses grow level by level in full batches, with a cache of their size.

All responses grow to a level's end before any grows further. A level's responses are equally long
when it begins, so that no row attends over more slots than it needs. Finished rows are gone, so
that batches are full: the rows that continue are collected from all batches, and prefilled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

STEPS = 16, 128
"""Tokens, at least and at most, between two checks of the host for rows that have stopped."""

FIRST = 64, 512
"""The first level's tokens, at least and at most; between them, a 16th of the limit."""


PREFILL_TOKENS = 8192
"""Tokens that a device prefills at a time, where a single prefix is not longer."""


class Level(NamedTuple):
    """Responses of `first` tokens grow to at most `last`; the host checks every `steps`."""

    first: int
    last: int
    steps: int

    @property
    def rounds(self) -> int:
        """Checks of the host until the end."""
        return -(-(self.last - self.first) // self.steps)

    def slots(self, width: int) -> int:
        """The slots of the cache, for prompts of up to `width` tokens."""
        return width + self.first + self.rounds * self.steps


def levels(max_new_tokens: int) -> tuple[Level, ...]:
    """The levels up to a limit; each ends at twice the tokens of the one before.

    >>> [(level.last, level.steps) for level in levels(4096)]
    [(256, 64), (512, 64), (1024, 128), (2048, 128), (4096, 128)]
    """
    bounds = [min(max_new_tokens, max(FIRST[0], min(FIRST[1], max_new_tokens // 16)))]
    while bounds[-1] < max_new_tokens:
        bounds.append(min(2 * bounds[-1], max_new_tokens))
    pairs = zip([0, *bounds], bounds, strict=False)
    return tuple(Level(first, last, _steps(last - first)) for first, last in pairs)


def _steps(span: int) -> int:
    return min(span, max(STEPS[0], min(STEPS[1], span // 4)))


def rounded_up(count: int, devices: int = 1) -> int:
    """The smallest power of two of rows a device that holds `count` rows.

    >>> rounded_up(5), rounded_up(5, 3)
    (8, 6)
    """
    return devices * 2 ** (-(-count // devices) - 1).bit_length()


def rows_decoded(count: int, whole: int, devices: int = 1) -> int:
    """The rows of a batch that decodes `count` of a draw's `whole` rows: a power of two a device,
    so that programs are few; or as many as the draw has, in steps of an eighth of one.

    >>> rows_decoded(20, 20), rows_decoded(11, 20), rows_decoded(18, 20), rows_decoded(9, 48)
    (20, 16, 20, 16)
    """
    own = -(-whole // devices)
    step = max(1, rounded_up(own) // 8)
    return min(rounded_up(count, devices), devices * step * -(-own // step))


def equal_pieces(rows: int, fits: Callable[[int], bool]) -> int:
    """The rows of the largest equal pieces that fit; of one row where none does.

    >>> equal_pieces(20, lambda n: n <= 4), equal_pieces(18, lambda n: n <= 4)
    (4, 3)
    """
    return next(n for n in range(rows, 0, -1) if rows % n == 0 and (n == 1 or fits(n)))


def rows_within(budget: float, bytes_a_row: float, most: int, devices: int = 1) -> int:
    """The largest power of two of rows a device, `most` in all, whose caches fit into the budget of
    each device; at least one row a device.

    >>> rows_within(1000, 100, 512)
    8
    """
    fit = max(1, min(int(budget // bytes_a_row), most // devices))
    return devices * 2 ** (fit.bit_length() - 1)


def prefill_rows(widest: int, tokens: float = PREFILL_TOKENS) -> int:
    """The number of prefixes of a width that a device prefills at a time, a power of two: of at
    most so many tokens and PREFILL_TOKENS.

    >>> prefill_rows(3000), prefill_rows(9000), prefill_rows(300, 1400.0)
    (2, 1, 4)
    """
    return 2 ** (max(1, int(min(PREFILL_TOKENS, tokens)) // widest).bit_length() - 1)


def bucket(longest: int, widest: int) -> int:
    """The smallest of widest, its half and its quarter that holds `longest` tokens.

    >>> bucket(30, 100), bucket(20, 100), bucket(51, 100)
    (50, 25, 100)
    """
    return next(w for w in (-(-widest // 4), -(-widest // 2), widest) if w >= longest)
