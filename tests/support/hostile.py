"""What every test of hostile input demands, and how many examples it tries."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

from kdjax.errors import KdjaxError

SCALE = int(os.environ.get("KDJAX_FUZZ", "1"))
"""The release form (docs/reliability.md) tries so many times the examples of the suite."""


def examples(count: int) -> settings:
    """So many examples: always the same ones in the suite, others for each --hypothesis-seed in the
    release form."""
    return settings(
        max_examples=count * SCALE,
        derandomize=SCALE == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def one_line_or_nothing() -> Iterator[None]:
    """What happens inside goes well, or ends in one printable line of bounded length."""
    said = "nothing"
    try:
        yield
    except KdjaxError as error:
        said = str(error)
    assert said.isprintable()
    assert 0 < len(said) < 2100
