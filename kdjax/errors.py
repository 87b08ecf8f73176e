"""Errors that a user can fix: each one clear line with the remedy, and an exit code."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
"""Environment variables whose values are not to be written anywhere."""


def without_secrets(text: str) -> str:
    """The text without the passwords of URLs, and with the names of `SECRETS` for their values.

    >>> without_secrets("looked at http://me:token@host")
    'looked at http://***@host'
    """
    text = re.sub(r"(:/+)[^\s/?#]*@", r"\1***@", text)  # a path has one slash where a URL has two
    for name in SECRETS:
        if len(secret := os.environ.get(name, "")) >= 8:  # a shorter one is a stand-in for none
            text = text.replace(secret, f"${name}")
    return text


class KdjaxError(Exception):
    """A mistake that the user can fix: one clear line with the remedy, and an exit code.

    The line is printable and at most 2,000 characters long whatever it quotes, and holds no secret.

    >>> print(DataError("no https://me:token@host/a\\nb"))
    no https://***@host/a\\nb
    """

    exit_code = 64

    def __init__(self, message: str):
        line = _shortened(without_secrets(message))
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        super().__init__(_shortened("".join(escaped)))


def _shortened(line: str) -> str:
    """Its begin and its end, where the remedy stands."""
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-490:]}"


def raised_in(error: BaseException | None) -> str:
    """Where a user's own code raised, 'FUNCTION (FILE:LINE)', outside functions 'FILE:LINE': the
    innermost frame of an error, or of what it came from, whose file is not of this package, of
    Python or installed; else ''.

    >>> raised_in(ValueError("never raised"))
    ''
    """
    while error is not None:
        for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
            code = frame.f_code
            if is_theirs(code.co_filename):
                place = f"{code.co_filename}:{line}"
                return place if code.co_name == "<module>" else f"{code.co_name} ({place})"
        error = error.__cause__ or error.__context__
    return ""


def is_theirs(file: str) -> bool:
    """Whether a file of code is the user's own."""
    path = os.path.abspath(file)
    installed = {"site-packages", "dist-packages"} & {*path.split(os.sep)}
    return not (installed or file.startswith("<") or path.startswith(NOT_THEIRS))


NOT_THEIRS = tuple(
    folder + os.sep
    for folder in (os.path.dirname(os.path.abspath(__file__)), sysconfig.get_path("stdlib"))
)


def place_of(function: Callable) -> str:
    """Where a function is written, as `raised_in` says it; its name alone where it has no file.

    >>> place_of(len)
    'len'
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    name = getattr(function, "__name__", type(function).__name__)
    code = getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def first_line(error: BaseException) -> str:
    """An error in a line: 'TypeError: why', one of this package by its text alone.

    >>> first_line(ValueError("no\\nmore"))
    'ValueError: no'
    """
    if isinstance(error, KdjaxError):
        return str(error)
    text = str(error).strip().partition("\n")[0].strip().rstrip(".")
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ConfigError(KdjaxError):
    """A wrong field, value or combination (exit code 64)."""

    exit_code = 64


class DataError(KdjaxError):
    """Data or a model folder that can't be used as it is (exit code 65)."""

    exit_code = 65


class RendezvousError(KdjaxError):
    """The processes of a run did not find each other: the same commands may (exit code 75)."""

    exit_code = 75


class BusyError(KdjaxError):
    """A folder that another process trains in (exit code 75): the same command works when that one
    has ended."""

    exit_code = 75


class PreemptedError(KdjaxError):
    """Training was told to stop, and has saved where it was: the same command resumes (exit code
    85)."""

    exit_code = 85


class DivergedError(KdjaxError):
    """Training produced numbers that are not finite (exit code 86)."""

    exit_code = 86


class StorageError(KdjaxError):
    """A file or folder that can't be read or written (exit code 74)."""

    exit_code = 74


class EngineError(KdjaxError):
    """An engine behind HTTP that can't be reached, refuses, or answers what can't be used (exit
    code 69)."""

    exit_code = 69


class Stopped(SystemExit):
    """The process was told to stop, and is on its way out (exit code 85): no `except Exception`
    takes it for a fault."""

    exit_code = PreemptedError.exit_code


class MachineError(KdjaxError):
    """What this machine lacks: memory, open files, processes, a device or a library (exit code
    71)."""

    exit_code = 71


LACKS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
NO_FILE = (ConnectionError, TimeoutError, ProcessLookupError, ChildProcessError, InterruptedError)
"""OSErrors that are of no file."""
NO_LIBRARY = re.compile(r"cannot open shared object|GLIBC\w*_[\d.]+'? not found|image not found")
TOO_LARGE = (
    "make batch_size, rollouts.rows or curriculum.lengths smaller or micro_batches larger, or take"
    " more devices; kdjax plan CONFIG says what fits"
)


def ordinary(error: BaseException | None) -> KdjaxError | None:
    """What an error that nothing has caught, or what it came from, says of the machine and its
    files, with its exit code: the one table of faults that are no bug; None for all others.

    >>> ordinary(OSError(errno.ENOSPC, "No space left on device", "runs/mine"))
    StorageError("can't read or write runs/mine: No space left on device")
    >>> ordinary(ZeroDivisionError())
    """
    while error is not None:
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError) or said.startswith("RESOURCE_EXHAUSTED"):
            return MachineError(f"out of memory ({said or 'MemoryError'}); {TOO_LARGE}")
        if said == "can't start new thread":
            return MachineError(f"{said}: this user's processes are too many (ulimit -u)")
        if _raised_in(error, "xla_bridge.py"):
            platforms = os.environ.get("JAX_PLATFORMS", "")
            return MachineError(f"JAX finds no device of JAX_PLATFORMS {platforms!r} ({said})")
        if NO_LIBRARY.search(said):
            return MachineError(f"{said}: install it, or what needs it anew")
        if isinstance(error, OSError) and error.errno in LACKS:
            return MachineError(
                f"{error.strerror}; end what else runs, or raise the limit (ulimit)"
            )
        if isinstance(error, OSError) and error.errno and not isinstance(error, NO_FILE):
            place = "what it needs" if error.filename is None else error.filename
            return StorageError(f"can't read or write {place}: {error.strerror}")
        error = error.__cause__
    return None


def of_user_code(error: BaseException) -> ConfigError | None:
    """The error, where a user's own code raised it (`raised_in`): also a `sys.exit` there, which
    would look like the end of the command."""
    where = raised_in(error)
    return ConfigError(f"{where}: {first_line(error)}") if where else None


def _raised_in(error: BaseException, file: str) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and os.path.basename(frames[-1].f_code.co_filename) == file
