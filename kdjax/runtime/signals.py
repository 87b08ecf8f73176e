"""Told to stop: the step is finished and saved, and the exit code says that the same command
resumes.

    SIGTERM         during training: after the step, saved, exit code 85; elsewhere: at once, 85
    SIGINT, once    during training: as SIGTERM; elsewhere: at once, 130
    SIGINT, twice   at once, 130

Signals are taken over in the main thread alone, and given back. With several processes the notice
is JAX's own, which all of them get at the same step: its handler of SIGTERM is not Python's, and
one of Python's that is installed after `jax.distributed.initialize` would silently disable it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from kdjax.errors import PreemptedError

Asked = Callable[[int], bool]
"""asked(step), called once after every step: whether to save and stop there."""
Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """A SIGTERM ends the process with exit code 85, through its `finally` blocks: what was saved is
    what the same command goes on from. It is a SystemExit, which no `except Exception` takes for a
    fault."""

    def leave(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is ending is not ended again
        _say("stopped by SIGTERM; the same command goes on from what was saved")
        raise SystemExit(PreemptedError.exit_code)

    with _handling({signal.SIGTERM: leave}):
        yield


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Asked]:
    """What a loop asks after every step. Where it ended before it could be told, PreemptedError.

    >>> with stop_between_steps() as asked:
    ...     asked(1)
    False
    """
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        with _handling({signal.SIGINT: _first(lambda: os.kill(os.getpid(), signal.SIGTERM))}):
            yield reached_preemption_sync_point
        return
    told = threading.Event()
    with _handling({signal.SIGTERM: lambda *_: told.set(), signal.SIGINT: _first(told.set)}):
        yield lambda step: told.is_set()
    if told.is_set():
        raise PreemptedError("stopped after the last step; the same command goes on from there")


def _first(act: Callable[[], Any]) -> Handler:
    """A handler of SIGINT that acts on the first one, and interrupts at once on the second."""
    came = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if came.is_set():
            signal.default_int_handler(number, frame)
        came.set()
        _say("interrupted: the step is finished and saved first; once more stops at once")
        act()

    return handle


@contextlib.contextmanager
def _handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """In the main thread; another may not install handlers, and gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():  # None: it was not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(text: str) -> None:
    """On standard error, past every buffer: a handler may interrupt whoever is writing to one."""
    os.write(2, f"kdjax: {text}\n".encode())
