"""Config files and field overrides, typed and checked: every mistake is one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import runpy
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

from kdjax.config.schema import Config, Study
from kdjax.config.shipped import find
from kdjax.config.validation import validate, validate_study
from kdjax.errors import ConfigError, Stopped, first_line, raised_in
from kdjax.runtime import processes

T = TypeVar("T")

RETURNS: dict[str, type] = {"get_config": Config, "get_study": Study}


def load_file(path: str, function: str) -> Any:
    """What get_config() or get_study() of a Python file returns, by its path or its name
    (`shipped.find`); it can import what lies beside it, as a script can. Errors: ConfigError."""
    path = str(find(path))
    if (beside := str(Path(path).parent.resolve())) not in sys.path:
        sys.path.append(beside)  # last: nothing of ours or of libraries is another's there
    names = _run_theirs(path, lambda: runpy.run_path(path))
    if function not in names:
        other = next((command for command, f in COMMANDS.items() if f in names), None)
        raise ConfigError(
            f"{path} has no {function}(); it must return a kdjax.{RETURNS[function].__name__}"
            + (f" (it has {COMMANDS[other]}(): kdjax {other} {path})" if other else "")
        )
    value = _run_theirs(path, names[function])
    if not isinstance(value, RETURNS[function]):
        raise ConfigError(
            f"{path}: {function}() must return a kdjax.{RETURNS[function].__name__}, got {value!r}"
        )
    check: Callable = validate_study if isinstance(value, Study) else validate
    return check(value)


COMMANDS = {"train": "get_config", "study": "get_study"}
"""The command of a file that has one of these functions."""


def _run_theirs(path: str, function: Callable) -> Any:
    """function(), a config file's. Errors: ConfigError naming where in the file it raised."""
    try:
        return function()
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        said = _with_nearest_field(first_line(error))
        raise ConfigError(f"{raised_in(error) or path}: {said}") from error


def override(config: T, arguments: list[str], program: str) -> T:
    """The dataclass with `--field VALUE` overrides applied; a Config is validated too.

    Errors: ConfigError.
    """
    known = set(field_names(type(config)))
    for argument in arguments:
        name = argument.split("=", 1)[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name != "help" and name not in known:
            raise ConfigError(f"unknown field {name}{_nearest(name, known)}")
    if "--help" in arguments or "-h" in arguments:
        _parse(config, arguments, program)  # prints and exits
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            config = _parse(config, arguments, program)
    except Stopped:
        raise
    except SystemExit as error:
        raise ConfigError(_one_line(output.getvalue())) from error
    if isinstance(config, Config):
        validate(config)
    return config


SHORT = {
    "--benchmark": "--evaluation.name",
    "--n": "--evaluation.samples",
    "--k": "--evaluation.k",
    "--temperatures": "--evaluation.temperatures",
}
"""What `kdjax evaluate` also takes."""
PARTED = ("--evaluation.k", "--evaluation.temperatures")
"""Those whose values may be parted by commas."""


def evaluation_fields(arguments: list[str]) -> list[str]:
    """Arguments of `kdjax evaluate` with the long forms in place of the SHORT ones.

    >>> evaluation_fields(["--n", "32", "--k=1,8", "--temperatures", "0.6"])[2:]
    ['--evaluation.k', '1', '8', '--evaluation.temperatures', '0.6']
    """
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in SHORT:
            found += [SHORT[name], value] if equals else [SHORT[name]]
        else:
            found.append(argument)
    for name in PARTED:
        if name in found:
            at = found.index(name) + 1
            found[at : at + 1] = [one for text in found[at : at + 1] for one in text.split(",")]
    return found


def join_processes(command: str, arguments: list[str]) -> list[str]:
    """The arguments without the flags of a run of several processes, once this one has joined the
    others: --distributed (found as JAX finds them: Slurm, Cloud TPU, GKE), or --coordinator
    HOST:PORT --processes N --process I.

    Errors: ConfigError for flags that can't be, and for several tasks of a Slurm step that would
    each do the whole of a run; those of processes.start.
    """
    flags, rest = _process_flags(arguments)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if not flags and tasks > 1 and command == "train":
        raise ConfigError(
            f"this is one of {tasks} tasks of a Slurm step, each of which would train the whole"
            " run; add --distributed, or start one task"
        )
    if not flags:
        return rest
    if command not in ("train", "evaluate", "rollouts"):
        raise ConfigError(f"kdjax {command} is of one process; leave out {', '.join(flags)}")
    if flags.keys() != {"--distributed"} and not _names_processes(flags):
        raise ConfigError(
            "several processes are --distributed, or --coordinator HOST:PORT --processes N"
            f" --process I, got {' '.join(f'{n} {v}'.strip() for n, v in flags.items())}"
        )
    numbers = [int(flags[name]) for name in ("--processes", "--process") if name in flags]
    processes.start(flags.get("--coordinator"), *numbers)
    return rest


def _names_processes(flags: dict[str, str]) -> bool:
    if flags.keys() != {"--coordinator", "--processes", "--process"}:
        return False
    host, _, port = flags["--coordinator"].rpartition(":")
    numbers = [port, flags["--processes"], flags["--process"]]
    if not host or not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        return False
    where, count, which = (int(number) for number in numbers)
    return 0 < where < 2**16 and which < count


def _process_flags(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    rest, waiting = [], iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name == "--distributed":
            found[name] = ""
        elif name in ("--coordinator", "--processes", "--process"):
            found[name] = value if equals else next(waiting, "")
        else:
            rest.append(argument)
    return found, rest


def field_names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every field of a config dataclass, nested ones by dotted names."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from field_names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _parse(config: T, arguments: list[str], program: str) -> T:
    plain = (tyro.conf.FlagConversionOff,)
    return tyro.cli(type(config), default=config, args=arguments, prog=program, config=plain)


ALSO_CALLED = {
    "lr": "optimizer.learning_rate",
    "length": "curriculum.lengths",
    "max_length": "curriculum.lengths",
    "batch": "batch_size",
    "gradient_accumulation_steps": "micro_batches",
}
"""Fields by the names that other trainers give them."""


def _nearest(name: str, known: set[str]) -> str:
    leaf = {k.rpartition(".")[2]: k for k in known}
    called = ALSO_CALLED.get(name.rpartition(".")[2])
    near = [called] if called in known else difflib.get_close_matches(name, known, n=1)
    near = near or difflib.get_close_matches(name, leaf, n=1)
    return (
        f"; did you mean {leaf.get(near[0], near[0])}?" if near else "; see --help for the fields"
    )


def _with_nearest_field(message: str) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    return (
        f"unknown field {unknown[1]}{_nearest(unknown[1], set(field_names(Config)))}"
        if unknown
        else message
    )


def _one_line(boxed: str) -> str:
    """The message of a box on one line, without its pointers to the help."""
    words = re.sub(r"[│╭╮╰╯┌┐└┘•]+", " ", boxed)
    parts = [" ".join(part.split()) for part in re.split(r"[-─]{3,}", words)]
    said = [
        part
        for part in parts
        if part and not part.startswith(("Argument helptext", "For full helptext"))
    ]
    return ": ".join(said) or "the overrides can't be read"
