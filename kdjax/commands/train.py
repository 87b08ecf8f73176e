"""`kdjax train`: train the run of a config, or resume it."""

from __future__ import annotations

from pathlib import Path

from kdjax.commands.arguments import first, option
from kdjax.errors import ConfigError


def run(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override

    path, rest = first(args, "kdjax train CONFIG")
    profiled = profile_steps(rest)
    config = override(load_file(path, "get_config"), rest, f"kdjax train {path}")
    from kdjax.report.results import Row
    from kdjax.report.text import print_table
    from kdjax.runtime.console import announce
    from kdjax.training.loop import train

    result = train(config, profiled)
    print_table([Row(Path(config.run).name, result, [], [])])
    announce(f"report: {Path(config.run) / 'report.html'}")


PROFILED_STEPS = 5


def profile_steps(rest: list[str]) -> int:
    """Take `--profile [STEPS]` out of the arguments: PROFILED_STEPS unless said, 0 without it."""
    rest[:] = [
        f"--profile={PROFILED_STEPS}" if arg == "--profile" and then.startswith("-") else arg
        for arg, then in zip(rest, [*rest[1:], "-"], strict=False)
    ]
    steps = option(rest, "--profile") or "0"
    if not steps.isdecimal():
        raise ConfigError(f"--profile takes a number of steps, got {steps}")
    return int(steps)
