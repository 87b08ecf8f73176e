"""Profiles of training steps: by the clock, and as a trace that Perfetto opens.

While steps are profiled the loop waits for the device after each part of a step, so that a part's
time is its own. What is computed is the same, to the bit.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import jax

from kdjax.errors import StorageError
from kdjax.runtime import files, processes
from kdjax.runtime.compiling import compilations
from kdjax.runtime.console import Table, announce, markdown_table, print_lines

TRACE, STEPS, TABLE = "trace.json.gz", "steps.json", "steps.md"
WARM_UP = 2  # steps, before those that are profiled: the first compile
COMPILING, OTHER = "compiling", "other"

P = ParamSpec("P")
T = TypeVar("T")


class Timed(Protocol):
    """timed(part, call, *args) is call(*args), whose time belongs to that part of a step. A call
    within a call belongs to its own part alone."""

    def __call__(
        self, part: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


class Profile(NamedTuple):
    """How a loop is profiled: steps(numbers, done) gives the numbers of its steps as they begin,
    and calls done() where the device has done all of them; timed as above, in a step."""

    steps: Callable[[range, Callable[[], None]], Iterable[int]]
    timed: Timed


def _untimed(part: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    return call(*args, **kwargs)


UNPROFILED = Profile(lambda numbers, done: numbers, _untimed)


class Step(NamedTuple):
    """A profiled step: the seconds that it took, and those of its parts, which sum to them."""

    number: int
    seconds: float
    parts: dict[str, float]


class Stopwatch(NamedTuple):
    """timed, as in a profile; lap(number) -> the step since the last lap; compiled(seconds): so
    long something was compiled until now. Other threads than that which opened it don't count."""

    timed: Timed
    lap: Callable[[int], Step]
    compiled: Callable[[float], None]


@contextlib.contextmanager
def profiling(folder: Path, steps: int) -> Iterator[Profile]:
    """A profile of so many steps (0: of none), after WARM_UP others. The first process of a run
    profiles itself. What it found is written when the steps are over, and printed at the end; that
    it can't be written ends no run."""
    if not steps or not processes.is_first():
        yield UNPROFILED
        return
    watch, found, over = open_stopwatch(), list[Step](), False

    def lapped(numbers: Iterable[int], done: Callable[[], None]) -> Iterator[int]:
        for number in numbers:
            watch.lap(number)  # what was between two steps is of neither
            with jax.profiler.StepTraceAnnotation("step", step_num=number + 1):
                yield number
            found.append(watch.lap(number + 1))
            done()

    def profiled(numbers: range, done: Callable[[], None]) -> Iterator[int]:
        nonlocal over
        yield from lapped(numbers[:WARM_UP], done)
        found.clear()
        if len(numbers) > WARM_UP:
            running.enter_context(_tracing(folder, found))
        yield from lapped(numbers[WARM_UP:][:steps], done)
        over = True
        running.close()
        yield from numbers[WARM_UP:][steps:]

    def timed(part: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return (_untimed if over else watch.timed)(part, call, *args, **kwargs)

    with contextlib.ExitStack() as running:
        running.enter_context(compilations(watch.compiled))
        yield Profile(profiled, timed)
    if found:
        print_lines(*table(found))
        opens = f"; https://ui.perfetto.dev opens its {TRACE}" if (folder / TRACE).exists() else ""
        announce(f"profile: {folder}{opens}")
    else:
        announce(f"nothing was profiled: --profile needs more than {WARM_UP} steps that are left")


def open_stopwatch(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """A stopwatch that runs."""
    thread, began = threading.get_ident(), clock()
    spent: dict[str, float] = defaultdict(float)
    inside: list[float] = []  # of each call that is open: the seconds of calls within it
    compilations: list[tuple[float, float]] = []  # (began, seconds), none within another

    def timed(part: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_ident() != thread:
            return call(*args, **kwargs)
        began = clock()
        inside.append(0.0)
        with jax.profiler.TraceAnnotation(part):
            result = jax.block_until_ready(call(*args, **kwargs))
        seconds = clock() - began
        spent[part] += seconds - inside.pop()
        _outside(seconds)
        return result

    def _outside(seconds: float) -> None:
        if inside:
            inside[-1] += seconds

    def compiled(seconds: float) -> None:
        if threading.get_ident() != thread:
            return
        began = clock() - seconds
        new = seconds
        while compilations and compilations[-1][0] >= began:  # within this one, and counted
            new -= compilations.pop()[1]
        compilations.append((began, seconds))
        spent[COMPILING] += new
        _outside(new)

    def lap(number: int) -> Step:
        nonlocal began
        now = clock()
        seconds, began = now - began, now
        step = Step(number, seconds, {**spent, OTHER: seconds - sum(spent.values())})
        spent.clear()
        compilations.clear()
        return step

    return Stopwatch(timed, lap, compiled)


def table(steps: Sequence[Step]) -> Table:
    """Of each part, the longest first: its milliseconds a step, its share of the time of all steps,
    and its milliseconds in the step where it took longest; in the last line the whole of a step.
    Parts of less than 0.05 % have no line.

    >>> table([Step(3, 0.5, {"rollout": 0.4, "other": 0.1})])[1][0]
    ['rollout', '400.0', '80.0', '400.0']
    """
    whole = sum(step.seconds for step in steps)

    def line(name: str, seconds: Sequence[float]) -> list[str]:
        shown = 1e3 * sum(seconds) / len(steps), 100 * sum(seconds) / whole, 1e3 * max(seconds)
        return [name, *(f"{number:.1f}" for number in shown)]

    spent = {
        part: [step.parts.get(part, 0.0) for step in steps]
        for part in dict.fromkeys(name for step in steps for name in step.parts)
    }
    parts = sorted(spent, key=lambda part: -sum(spent[part]))
    lines = [line(part, spent[part]) for part in parts if sum(spent[part]) >= 5e-4 * whole]
    numbers = f"steps {steps[0].number} to {steps[-1].number}"
    return (
        ["part of a step", "ms a step", "% of the time", "most, ms"],
        [*lines, line(numbers, [step.seconds for step in steps])],
    )


@contextlib.contextmanager
def _tracing(folder: Path, steps: Sequence[Step]) -> Iterator[None]:
    """Traces what is done meanwhile, and writes it with what the stopwatch said of the steps."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # each Python call would be an event, and slowed down by it
    traced = True
    try:
        jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
    except RuntimeError as error:  # another profiler of this process, or none that works here
        traced = False
        announce(f"JAX can't trace these steps ({error}); they are timed without a {TRACE}")
    try:
        yield
    finally:
        try:
            if traced:
                jax.profiler.stop_trace()
            for made in sorted(folder.glob("plugins/profile/*/perfetto_trace.json.gz")):
                made.replace(folder / TRACE)
            if steps:
                files.write_json(folder / STEPS, [step._asdict() for step in steps])
                files.write_text(folder / TABLE, markdown_table(*table(steps)) + "\n")
        except (OSError, RuntimeError, StorageError) as error:
            announce(f"the profile was not written to {folder} ({error}); training goes on")
