"""Losses, what is minimised at a token: divergences, objectives, compositions and reductions.

At the foot of a file stand its tables: what a config, the command line and `kdjax.NAME` know of it.
In a table of MAKERS are functions that make one of the kind, or compose one of others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

HOMES = (
    "kl", "divergences", "objectives", "grpo", "combinators", "composition", "reductions",
    "selection",
)  # fmt: skip
"""The files that have tables, in the order in which help shows their names."""

TABLES = (
    "TOKEN_LOSSES", "TOKEN_LOSS_MAKERS", "OBJECTIVES", "OBJECTIVE_MAKERS", "REDUCTIONS",
    "REDUCTION_MAKERS", "GROUP_ADVANTAGES", "SCHEDULES",
)  # fmt: skip
"""The tables that a file may have, each a tuple of functions."""


def named(*tables: str) -> dict[str, Callable]:
    """The functions in these tables of all files, by name.

    >>> list(named("TOKEN_LOSSES"))
    ['forward_kl', 'reverse_kl', 'total_variation']
    """
    homes = [importlib.import_module(f"{__name__}.{home}") for home in HOMES]
    found = (f for table in tables for home in homes for f in getattr(home, table, ()))
    return {function.__name__: function for function in found}
