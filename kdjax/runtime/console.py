"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column
from rich.table import Table as Columns

from kdjax.runtime import processes

SHOWN = {
    "reward": "reward",
    "reward_signal": "groups with signal",
    "loss": "loss",
    "forward_kl": "KL(t|s)",
    "reverse_kl": "KL(s|t)",
    "student_entropy": "entropy",
    "response_length": "length",
}
SECONDS_BETWEEN_LINES = 5
LEAST_WIDTH_OF_A_BAR = 120  # columns; a narrow terminal has room for the numbers' first

Show = Callable[[int, dict[str, float] | None], None]
"""show(step, metrics): `step` steps are done; metrics, if there are new ones, as in SHOWN."""


@functools.cache
def announce(text: str) -> None:
    """Say what is being done, once, where it takes long enough to wonder; letter by letter."""
    _console().print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextlib.contextmanager
def training_progress(name: str, steps: int, first: int = 0) -> Iterator[Show]:
    """From step `first` to `steps`: ETA, response tokens/s, loss, KLs, entropy, length; what does
    not fit into a line of the terminal is cut on the right."""
    console = _console()
    if not console.is_terminal:
        yield _lines(console, name, steps, first)
        return
    columns: list[ProgressColumn] = [
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        *([BarColumn(bar_width=16)] if console.width >= LEAST_WIDTH_OF_A_BAR else []),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=30)),
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, ratio=1)),
    ]
    with Bar(*columns, console=console, expand=True) as bar:
        task = bar.add_task(name, total=steps, completed=first, numbers="compiling")
        numbers = _numbers(first)

        def show(step: int, metrics: dict[str, float] | None) -> None:
            bar.update(task, completed=step)
            if metrics is not None:
                bar.update(task, numbers=numbers(step, metrics))

        yield show


def _console() -> Console:
    """Of several processes the first speaks."""
    return Console(quiet=not processes.is_first())


def _lines(console: Console, name: str, steps: int, first: int) -> Show:
    numbers, began = _numbers(first), time.perf_counter()
    printed = began - SECONDS_BETWEEN_LINES

    def show(step: int, metrics: dict[str, float] | None) -> None:
        nonlocal printed
        now = time.perf_counter()
        if metrics is None or (now - printed < SECONDS_BETWEEN_LINES and step < steps):
            return
        printed = now
        left = (now - began) / (step - first) * (steps - step)
        line = f"{name}: step {step}/{steps}, {left:.0f} s left, {numbers(step, metrics)}"
        console.print(line, highlight=False, soft_wrap=True)

    return show


def _numbers(first: int) -> Callable[[int, dict[str, float]], str]:
    """The newest numbers as text; tokens/s since the last call, by the newest step's count."""
    last_time, last_step = time.perf_counter(), first

    def text(step: int, metrics: dict[str, float]) -> str:
        nonlocal last_time, last_step
        now = time.perf_counter()
        rate = (step - last_step) * metrics["response_tokens"] / max(now - last_time, 1e-9)
        last_time, last_step = now, step
        shown = [f"{label} {metrics[key]:.3g}" for key, label in SHOWN.items() if key in metrics]
        return ", ".join([f"{rate:,.0f} tokens/s", *shown])

    return text


WIDEST_TABLE = 150  # columns


def print_lines(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Lines of text in columns; the first is set left, the others right."""
    printed = Columns(box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(header):
        printed.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        printed.add_row(*line)
    console = Console(quiet=not processes.is_first())
    console.width = max(console.width, WIDEST_TABLE)  # a narrow terminal wraps, nothing is cut
    console.print(printed)


Table = tuple[list[str], list[list[str]]]
"""Header and lines, every line as long as the header."""


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["run", "x"], [["a|b", 1]]))
    | run | x |
    | --- | --- |
    | a/b | 1 |
    """
    rows = [header, ["---"] * len(header), *lines]
    texts = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in texts)
