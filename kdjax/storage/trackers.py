"""TensorBoard and W&B beside a run: in threads that training neither waits for nor ends by."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.errors import ConfigError

SECONDS_TO_CLOSE = 30.0
"""What the last records may take to be written and sent."""
SECONDS_BETWEEN_FLUSHES = 30.0


Say = Callable[[str], None]
"""Tells the user a line."""


class Tracker(NamedTuple):
    """write(step, {name: number}) shows a record, close() ends it."""

    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def open_trackers(
    folder: Path, from_step: int, wandb_project: str | None, say: Say
) -> list[Tracker]:
    """TensorBoard for the run of a folder and, where a project is named, W&B, of the steps after
    `from_step`; each as `beside` makes it. Errors: ConfigError where W&B is not installed."""
    opened = {"TensorBoard": lambda: _open_tensorboard(folder / "tensorboard", from_step)}
    if wandb_project is not None:
        wandb = _import_wandb()
        opened["W&B"] = lambda: _open_wandb(wandb, folder, wandb_project)
    return list(_opened(opened, say))


def _opened(makers: dict[str, Callable[[], Tracker]], say: Say) -> Iterator[Tracker]:
    for name, make in makers.items():
        try:
            yield beside(make(), name, say)
        except Exception as error:  # each library has kinds of its own
            say(f"{name} can't be started ({_why(error)}); training goes on without it")


def beside(
    tracker: Tracker, name: str, say: Say, seconds_to_close: float = SECONDS_TO_CLOSE
) -> Tracker:
    """A tracker that may fail and may hang -> one that does neither: its records go through a
    thread. A failure is said, and the last; what is not done in time when it is closed is left.

    >>> tracker = beside(Tracker(lambda step, numbers: print(numbers), lambda: None), "a", print)
    >>> tracker.write(1, {"loss": 0.5}), tracker.close()
    {'loss': 0.5}
    (None, None)
    """
    records: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            while (record := records.get()) is not None:
                tracker.write(*record)
            tracker.close()
        except Exception as error:
            say(f"{name} ends here ({_why(error)}); training goes on without it")

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()

    def write(step: int, numbers: dict[str, float]) -> None:
        if thread.is_alive():
            records.put((step, numbers))

    def close() -> None:
        records.put(None)
        thread.join(seconds_to_close)
        if thread.is_alive():
            say(f"{name} did not end within {seconds_to_close:g} s; it may lack records")

    return Tracker(write, close)


def _why(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _open_tensorboard(folder: Path, from_step: int) -> Tracker:
    """An event file. SummaryWriter is not used: a full disk ends its thread, and whoever writes to
    it then waits for ever."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder.mkdir(parents=True, exist_ok=True)
    events, flushed = EventsWriter(str(folder / "events")), 0.0
    begin = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=from_step + 1, session_log=begin))  # drops what is beyond

    def write(step: int, numbers: dict[str, float]) -> None:
        nonlocal flushed
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        events.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
        if time.monotonic() - flushed > SECONDS_BETWEEN_FLUSHES:
            events.flush()
            flushed = time.monotonic()

    return Tracker(write, events.close)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "wandb_project is set, but wandb is not installed: pip install wandb"
        ) from None
    return wandb


def _open_wandb(wandb: Any, folder: Path, project: str) -> Tracker:
    run = wandb.init(project=project, name=folder.name, dir=str(folder), resume="allow")
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)
