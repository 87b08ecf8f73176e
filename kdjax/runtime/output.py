"""Standard output and error of a process that goes on when nobody can read them any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


def say(text: str) -> None:
    """On standard error, past every buffer and by any thread: a handler of a signal may interrupt
    whoever is writing to one. Where it can't be written it is not said."""
    with contextlib.suppress(OSError):
        os.write(2, f"kdjax: {text}\n".encode(errors="backslashreplace"))


def unbroken() -> None:
    """Give Python's standard streams to `_Unbroken` files: a reader that has gone (`| head -n 1`),
    a terminal that was closed or a full disk is said once, and ends nothing. Streams that someone
    has put in their place are left alone."""
    for number in range(3):
        _open_where_closed(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _text(number, stream))


def _open_where_closed(number: int) -> None:
    """Otherwise the next file that is opened has the number, and gets what is printed."""
    try:
        os.fstat(number)
    except OSError:
        _silence(number)


def _text(number: int, like: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Unbroken(number, "w", closefd=False)),
        encoding=like.encoding if like else "utf-8",
        errors="backslashreplace",  # a locale without the letter is no reason to end either
        line_buffering=like.line_buffering if like else True,
        write_through=like.write_through if like else False,
    )


class _Unbroken(io.FileIO):
    """A file whose writes are lost, from the first on that fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _silence(self.fileno())
            if self.fileno() == 1:
                say(f"standard output can't be written ({error.strerror}); going on without it")
            return memoryview(data).nbytes


def _silence(number: int) -> None:
    """What is written to a file's number goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
