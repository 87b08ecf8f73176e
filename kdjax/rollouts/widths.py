"""Length buckets: a batch is as wide as its longest row needs, in few widths, so few programs."""

from __future__ import annotations

import itertools

import jax
import numpy as np

from kdjax.base import Rollout
from kdjax.errors import ConfigError

WHOLE = 256
"""Rows up to this width are not trimmed: another program costs more than their padding."""


def ladder(widest: int) -> tuple[int, ...]:
    """The widths of rows that are at most `widest` wide: 256 times 1, 1.5, 2, 3, 4, 6, ...

    They grow by about sqrt(2), and all but the last are multiples of 128, as kernels want them.

    >>> ladder(2000)
    (256, 384, 512, 768, 1024, 1536, 2000)
    """
    rungs = (WHOLE * 2**n * halves // 2 for n in itertools.count() for halves in (2, 3))
    return (*itertools.takewhile(lambda width: width < widest, rungs), widest)


def bucket(length: int, widest: int) -> int:
    """The smallest width of the ladder that holds `length` tokens.

    Errors: ConfigError where not even the widest does.

    >>> bucket(300, 4096), bucket(10, 200)
    (384, 200)
    """
    if length > widest:
        raise ConfigError(
            f"bucket: a row of {length} tokens is longer than the widest of {widest};"
            " give the width of the longest prompt plus the longest response"
        )
    return next(width for width in ladder(widest) if width >= length)


def longest(rollout: Rollout) -> tuple[int, int]:
    """Tokens of the longest row, prompt and response, and of the longest that the teacher reads
    apart (0: it reads these). The host waits for the rollout."""
    own = np.asarray(rollout.prompt_length_b) + np.asarray(rollout.response_length_b)
    apart = rollout.teacher_rows
    return int(own.max()), 0 if apart is None else 1 + int(np.asarray(apart.slot_bt).max())


def trim(rollout: Rollout, at_least: tuple[int, int] = (0, 0)) -> Rollout:
    """A rollout trimmed to the bucket of its longest row, or of `at_least` tokens (as `longest`);
    its response axis to no more than that.

    Only padding is removed, so losses and gradients don't change; there are at most len(ladder(S))
    widths, and so programs. Errors: ConfigError where a row is longer than its tokens.
    """
    widest = tuple(map(max, longest(rollout), at_least))
    width, apart = bucket(widest[0], rollout.tokens_bs.shape[1]), rollout.teacher_rows
    cut = jax.tree.map(lambda x: x[:, :width] if np.ndim(x) > 1 else x, rollout)
    if apart is None:
        return cut
    theirs = apart.tokens_bs[:, : bucket(max(widest[1], 1), apart.tokens_bs.shape[1])]
    return cut._replace(teacher_rows=cut.teacher_rows._replace(tokens_bs=theirs))
