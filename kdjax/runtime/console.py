"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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
    _console().print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def training_progress(name: str, steps: int, first: int = 0) -> Iterator[Show]:
    """From step `first` to `steps`: ETA, response tokens/s, loss, KLs, entropy, length; what does
    not fit into a line of the terminal is cut on the right."""
    numbers = _numbers(first)
    with _progress(name, "step", steps, first, 0.0) as told:

        def show(step: int, metrics: dict[str, float] | None) -> None:
            told(step, None if metrics is None else lambda: numbers(step, metrics))

        yield show


class Tally(NamedTuple):
    """What becomes of responses: drawn(ended, tokens) of the chunk at hand so far, scored(n) more
    of it, finished(n, tokens) it was, by now or in an earlier call."""

    drawn: Callable[[int, int], None]
    scored: Callable[[int], None]
    finished: Callable[[int, int], None]


@contextlib.contextmanager
def response_progress(name: str, responses: int) -> Iterator[Tally]:
    """How many of so many responses are drawn and scored, tokens, and those a second of this call;
    in lines, nothing of what is over in a few seconds."""
    began, found_tokens = time.perf_counter(), 0
    before, now = Counter[str](), Counter[str]()
    with _progress(name, "response", responses, 0, SECONDS_BETWEEN_LINES) as told:

        def tell() -> None:
            told((before + now)["drawn"], numbers)

        def numbers() -> str:
            sums = before + now
            rate = (sums["tokens"] - found_tokens) / max(time.perf_counter() - began, 1e-9)
            return f"{sums['scored']} scored, {sums['tokens']:,} tokens, {rate:,.0f} tokens/s"

        def drawn(ended: int, tokens: int) -> None:
            now.update(drawn=ended - now["drawn"], tokens=tokens - now["tokens"])
            tell()

        def scored(count: int) -> None:
            now.update(scored=count)
            tell()

        def finished(count: int, tokens: int) -> None:
            nonlocal found_tokens
            found_tokens += 0 if now["scored"] else tokens
            now.clear()
            before.update(drawn=count, scored=count, tokens=tokens)
            tell()

        yield Tally(drawn, scored, finished)


Told = Callable[[int, Callable[[], str] | None], None]
"""told(done, numbers): so many are done; makes the text of the numbers, if there are new ones."""


@contextlib.contextmanager
def _progress(name: str, unit: str, total: int, first: int, patience: float) -> Iterator[Told]:
    """A bar on a terminal; elsewhere lines, the first after the seconds of patience."""
    console = _console()
    if not console.is_terminal:
        yield _lines(console, f"{name}: {unit}", total, first, patience)
        return
    columns: list[ProgressColumn] = [
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        *([BarColumn(bar_width=16)] if console.width >= LEAST_WIDTH_OF_A_BAR else []),
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=30)
        ),
        TextColumn(
            "{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True, ratio=1)
        ),
    ]
    with Bar(*columns, console=console, expand=True) as bar:
        task = bar.add_task(name, total=total, completed=first, numbers="compiling")

        def told(done: int, numbers: Callable[[], str] | None) -> None:
            bar.update(task, completed=done)
            if numbers is not None:
                bar.update(task, numbers=numbers())

        yield told


def _console() -> Console:
    """Of several processes the first speaks. Text is what it is: a name in brackets is no style,
    and what the terminal's encoding does not have is printed as an escape, as it is on standard
    error, and does not end the run."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(quiet=not processes.is_first(), markup=False, emoji=False)


def _lines(console: Console, what: str, total: int, first: int, patience: float) -> Told:
    """Lines some seconds apart, and without patience one at the end."""
    began = time.perf_counter()
    printed = began + patience - SECONDS_BETWEEN_LINES

    def told(done: int, numbers: Callable[[], str] | None) -> None:
        nonlocal printed
        now = time.perf_counter()
        ends = done == total and patience == 0
        if numbers is None or (now - printed < SECONDS_BETWEEN_LINES and not ends):
            return
        printed = now
        left = f"{(now - began) / (done - first) * (total - done):.0f}" if done > first else "?"
        line = f"{what} {done}/{total}, {left} s left, {numbers()}"
        console.print(line, highlight=False, soft_wrap=True)

    return told


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
    console = _console()
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
