"""Parameters of a test that are left for a release, beside those that every run has."""

from __future__ import annotations

import pytest


def by_default(values, *kept):
    """The values as parameters of a test; all but those that are `kept` wait for --all."""
    if unknown := [value for value in kept if value not in values]:
        raise ValueError(f"{unknown} are none of {list(values)}")
    return [value if value in kept else _for_release(value) for value in values]


def _for_release(value):
    return pytest.param(*_arguments(value), marks=pytest.mark.release)


def _arguments(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
