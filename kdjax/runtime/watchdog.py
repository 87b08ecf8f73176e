"""A thread that notices a step which takes far too long, and says where the process stands.

A peer that hangs in Python is never noticed by JAX, whose heartbeat is another thread's: with a
limit the process ends, and its peers notice that.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from kdjax.runtime.compiling import compilations
from kdjax.runtime.output import say

EXIT_CODE = 124
TIMES, ENOUGH, RECENT = 10, 5, 50  # times the median of the recent waits, once there are enough
LEAST_SECONDS = 5.0  # what is over sooner is not worth a word
SECONDS_TO_DUMP = 10.0


class Watch(NamedTuple):
    """begins(step): a step begins. done(): the device has done all that were begun; what is written
    of them comes next. rests(): something without a limit begins, until a step does. looks(): looks
    at the clock, as the thread does."""

    begins: Callable[[int], None]
    done: Callable[[], None]
    rests: Callable[[], None]
    looks: Callable[[], None]


class Wait(NamedTuple):
    """Steps that were begun since the device was last known to be done: it runs behind the host."""

    steps: int
    newest: int
    began: float
    compiled: int


def most_seconds(paces: Sequence[float], steps: int) -> float | None:
    """After how long `steps` steps are far too slow, beside the seconds a step of earlier ones;
    None while there are too few.

    >>> most_seconds([1.0, 1.0, 2.0, 1.0, 9.0], 2)
    20.0
    """
    if len(paces) < ENOUGH:
        return None
    return max(LEAST_SECONDS, TIMES * statistics.median(paces) * steps)


def open_watch(
    report: Callable[[str], None],
    end: Callable[[str], None],
    *,
    limit_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    compilations: Callable[[], int] = lambda: 0,
) -> Watch:
    """A watch that reports once a step that takes TIMES the median a step, and ends what takes
    longer than the limit.

    Args:
        report, end: called with a line that says what was noticed.
        limit_seconds: the longest that a step may take, or what is written after it; None for no
            limit.
        clock: seconds, rising.
        compilations: how many there were so far; a step in which there was one neither counts for
            the median nor is reported, as a new length compiles.
    """
    paces: collections.deque[float] = collections.deque(maxlen=RECENT)
    lock, wait, reported = threading.Lock(), None, False
    newest, sign = 0, None  # the newest step, and when it was last seen to go on

    def begins(step: int) -> None:
        nonlocal wait, newest, sign
        with lock:
            newest, sign = step, clock()
            if wait is None:
                wait = Wait(1, step, sign, compilations())
            else:
                wait = wait._replace(steps=wait.steps + 1, newest=step)

    def done() -> None:
        nonlocal wait, reported, sign
        with lock:
            if wait is not None and compilations() == wait.compiled:
                paces.append((clock() - wait.began) / wait.steps)
            wait, reported, sign = None, False, clock()

    def rests() -> None:
        nonlocal sign
        with lock:
            sign = None

    def looks() -> None:
        nonlocal reported
        with lock:
            seen, now, last = wait, clock(), sign
            line = None
            if seen is not None and not reported and compilations() == seen.compiled:
                line = _slow(paces, seen, now)
            reported = reported or line is not None
        if line is not None:
            report(line)
        if limit_seconds is not None and last is not None and now - last > limit_seconds:
            end(
                f"step {newest} takes longer than faults.step_limit_seconds {limit_seconds:g};"
                " the same command resumes from the last checkpoint"
            )

    return Watch(begins, done, rests, looks)


def _slow(paces: Sequence[float], seen: Wait, now: float) -> str | None:
    most = most_seconds(paces, seen.steps)
    if most is None or now - seen.began <= most:
        return None
    return (
        f"step {seen.newest} takes over {now - seen.began:.0f} s, more than {TIMES} times"
        f" the {statistics.median(paces):.2g} s of the steps before"
    )


@contextlib.contextmanager
def watchdog(
    folder: Path, limit_seconds: float | None, every_seconds: float = 1.0
) -> Iterator[Watch]:
    """A `Watch` whose thread looks every so many seconds. What all threads are doing goes to
    stacks_P.txt of the folder, P the number of the process."""
    file = folder / f"stacks_{jax.process_index()}.txt"

    def report(line: str) -> None:
        say(f"{line}; where every thread stands: {_dump(file, line)}")

    def end(line: str) -> None:
        say(f"{line}; where every thread stands: {_dump(file, line)}")
        os._exit(EXIT_CODE)  # nothing that hangs can be waited for

    over = threading.Event()
    with _counted() as count:
        watch = open_watch(report, end, limit_seconds=limit_seconds, compilations=count)

        def look() -> None:
            while not over.wait(min(every_seconds, limit_seconds or every_seconds)):
                watch.looks()

        thread = threading.Thread(target=look, name="watchdog", daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            over.set()
            thread.join()


def _dump(file: Path, line: str) -> str:
    """Append the stacks of all threads; where they are, or why not. A disk that hangs is not waited
    for: by then it may be why."""
    said = f"not written within {SECONDS_TO_DUMP:g} s"

    def write() -> None:
        nonlocal said
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
                out.write("\n")
            said = str(file)
        except OSError as error:
            said = f"not written ({error})"

    thread = threading.Thread(target=write, name="stacks", daemon=True)
    thread.start()
    thread.join(SECONDS_TO_DUMP)
    return said


@contextlib.contextmanager
def _counted() -> Iterator[Callable[[], int]]:
    """How often JAX has traced, lowered or compiled since."""
    count = 0

    def compiled(seconds: float) -> None:
        nonlocal count
        count += 1

    with compilations(compiled):
        yield lambda: count
