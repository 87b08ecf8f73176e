"""Told to stop: the step is finished and saved, and the exit code says that the same command
resumes.

    SIGTERM, SIGHUP   during training: after the step, saved, exit code 85; elsewhere: at once, 85
    SIGINT, once      during training: as SIGTERM; elsewhere: at once, 130
    SIGINT, twice     at once, 130

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

from kdjax.errors import PreemptedError, Stopped
from kdjax.runtime.output import say

Asked = Callable[[int], bool]
"""asked(step), called once after every step: whether to save and stop there."""
Handler = Callable[[int, Any], None]

STOPS = (signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_OBEY = 2.0
"""After which a main thread that does not come back to Python (it compiles, or waits for a device)
is not waited for."""
SECONDS_TO_EXIT = 60.0
"""What threads and libraries may take when a command has come to its end."""


class _MainThread:
    """What the thread that ends a process knows of the main one."""

    between_steps = False  # a loop runs, which finishes its step
    interrupts = 0  # that it was sent
    leaves = threading.Event()  # it has heard, and is on its way out
    at_once = False  # and nothing that still runs is waited for


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """A SIGTERM ends the process with exit code 85 (`Stopped`), through its `finally` blocks: what
    was saved is what the same command goes on from. Where the main thread does not hear it in time
    the process ends without them."""

    def leave(number: int, frame: Any) -> None:
        if _MainThread.leaves.is_set():  # what is ending is not ended again
            return
        _MainThread.leaves.set()
        _MainThread.at_once = True
        say(_stopped(number))
        raise Stopped(Stopped.exit_code)

    handlers: dict[int, Handler] = dict.fromkeys(STOPS, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = _interrupt
    with _handling(handlers), _ended_in_time():
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

        def pass_on(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        with _looping({signal.SIGHUP: pass_on, signal.SIGINT: _first(pass_on)}):
            yield reached_preemption_sync_point
        return
    told = threading.Event()
    handlers: dict[int, Handler] = dict.fromkeys(STOPS, lambda *_: told.set())
    with _looping({**handlers, signal.SIGINT: _first(told.set)}):
        try:
            yield lambda step: told.is_set()
        finally:
            if told.is_set():  # its last save is waited for, whoever asks again
                _MainThread.leaves.set()
    if told.is_set():
        raise PreemptedError("stopped after the last step; the same command goes on from there")


def end_in_time(code: int) -> None:
    """From here on the process ends by itself, or after SECONDS_TO_EXIT with this code: Python
    waits for threads, libraries (W&B) for their servers and XLA for what it computes, for ever.
    Where it was told to stop at once it does so after SECONDS_TO_OBEY."""
    at_once = _MainThread.at_once

    def end() -> None:
        if not at_once:
            say(f"something did not end within {SECONDS_TO_EXIT:g} s, and is left")
        os._exit(code)

    timer = threading.Timer(SECONDS_TO_OBEY if at_once else SECONDS_TO_EXIT, end)
    timer.daemon = True
    timer.start()


def _first(act: Callable[[], Any]) -> Handler:
    """A handler of SIGINT that acts on the first one, and interrupts at once on the second."""
    came = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if came.is_set():
            _interrupt(number, frame)
        came.set()
        say("interrupted: the step is finished and saved first; once more stops at once")
        act()

    return handle


def _interrupt(number: int, frame: Any) -> None:
    _MainThread.leaves.set()
    _MainThread.at_once = True
    signal.default_int_handler(number, frame)


def _stopped(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; the same command goes on from what was saved, or begins anew"


@contextlib.contextmanager
def _looping(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """A loop that finishes its step first."""
    with _handling(handlers):
        _MainThread.between_steps, _MainThread.interrupts = True, 0
        try:
            yield
        finally:
            _MainThread.between_steps = False


@contextlib.contextmanager
def _handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """In the main thread; another may not install handlers, and gets no signals. A SIGHUP that is
    ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = dict(handlers)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        taken.pop(signal.SIGHUP, None)
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():  # None: it was not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    """A thread that hears signals as soon as they come, where Python's handlers wait until the main
    thread is back from whatever it calls, and ends the process for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    _MainThread.leaves.clear()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(heard,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _MainThread.leaves.set()
        os.close(tell)
        thread.join()
        os.close(heard)


def _listen(heard: int) -> None:
    while number := int.from_bytes(os.read(heard, 1)):
        _MainThread.interrupts += number == signal.SIGINT
        patient = _MainThread.between_steps
        if number == signal.SIGINT and (not patient or _MainThread.interrupts > 1):
            code, line = 130, "interrupted; the same command resumes from what was saved"
        elif number in STOPS and not patient:
            code, line = Stopped.exit_code, _stopped(number)
        else:
            continue
        if not _MainThread.leaves.wait(SECONDS_TO_OBEY):
            say(line)
            os._exit(code)
