"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss",
    "forward_kl": "KL(t|s)",
    "reverse_kl": "KL(s|t)",
    "student_entropy": "entropy",
    "response_length": "length",
}


class Progress(NamedTuple):
    """advance(step): a step is done. show(metrics): the newest numbers, where the keys of SHOWN are known."""

    advance: Callable[[int], None]
    show: Callable[[dict[str, float]], None]


@contextlib.contextmanager
def training_progress(name: str, steps: int, first: int = 0) -> Iterator[Progress]:
    """Progress of steps first .. steps, with ETA, tokens/s, loss, both KLs, entropy and length."""
    console = Console()
    if not console.is_terminal:
        yield _plain_lines(console, name, steps, first)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    ]
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps, completed=first, numbers="")
        rate = _token_rate()
        yield Progress(
            lambda step: bar.update(task, completed=step),
            lambda metrics: bar.update(task, numbers=_numbers(metrics, rate(metrics))),
        )


def _plain_lines(console: Console, name: str, steps: int, first: int) -> Progress:
    began, rate, done = time.perf_counter(), _token_rate(), [first]
    printed = [0.0]

    def advance(step: int) -> None:
        done[0] = step

    def show(metrics: dict[str, float]) -> None:
        tokens_a_second, now = rate(metrics), time.perf_counter()
        if now - printed[0] < 5 and done[0] + 1 < steps:
            return
        printed[0] = now
        left = (now - began) / max(done[0] + 1 - first, 1) * (steps - done[0] - 1)
        line = f"{name}: step {done[0] + 1}/{steps}, {left:.0f} s left, {_numbers(metrics, tokens_a_second)}"
        console.print(line, highlight=False, soft_wrap=True)

    return Progress(advance, show)


def _token_rate() -> Callable[[dict[str, float]], float]:
    """Response tokens a second between two calls, from the newest step's count (an estimate for the steps between)."""
    last: list[tuple[float, float]] = []

    def rate(metrics: dict[str, float]) -> float:
        now, step = time.perf_counter(), metrics.get("step", 0.0)
        earlier = last[-1] if last else (now, step)
        last[:] = [(now, step)]
        elapsed = now - earlier[0]
        return (step - earlier[1]) * metrics["response_tokens"] / elapsed if elapsed > 0 else 0.0

    return rate


def _numbers(metrics: dict[str, float], tokens_a_second: float) -> str:
    shown = [f"{label} {metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics]
    return ", ".join([f"{tokens_a_second:,.0f} tokens/s", *shown])
