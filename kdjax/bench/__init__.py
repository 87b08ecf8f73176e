"""`kdjax bench`: figures on the user's own machine, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import timeit
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.runtime import files
from kdjax.storage import run_folder


class Figure(NamedTuple):
    """One line of a bench: what was measured, what it came to, and what it should reach at most."""

    name: str
    value: float | None
    unit: str
    reach: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is within reach; None where nothing is to be reached, or measured."""
        return None if self.reach is None or self.value is None else self.value <= self.reach


def show_figures(figures: Iterator[Figure], sizes: Any, out: Path | None) -> None:
    """Print each figure as it is measured, then write all of them with their sizes and versions."""
    versions = run_folder.versions()
    print(
        f"{versions['devices']}, {versions['machine']}, jax {versions['jax']}, "
        f"commit {versions['git_commit']}; {sizes}"
    )
    rows = []
    for figure in figures:
        print(_line(figure), flush=True)
        rows.append({**figure._asdict(), "met": figure.met})
    if out is not None:
        files.write_json(
            out, {"versions": versions, "sizes": dataclasses.asdict(sizes), "figures": rows}
        )


def _line(figure: Figure) -> str:
    value = "not measured" if figure.value is None else f"{figure.value:.3g} {figure.unit}".strip()
    reach = "" if figure.reach is None else f"at most {figure.reach:.3g}"
    verdict = {True: "met", False: "NOT MET", None: ""}[figure.met]
    return f"{figure.name:48} {value:>14}  {reach:14} {verdict:8} {figure.note}".rstrip()


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run after a first, in turn, so that a busy minute hits all."""

    def seconds(run: Callable[[], Any]) -> float:
        return timeit.timeit(lambda: jax.block_until_ready(run()), number=1)

    rounds = [[seconds(run) for run in runs.values()] for _ in range(1 + repeats)]
    return dict(zip(runs, np.median(rounds[1:], axis=0).tolist(), strict=True))


def if_it_fits(run: Callable[[], Any]) -> Any:
    """What it returns, or None where the device's memory is too small."""
    try:
        return jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
