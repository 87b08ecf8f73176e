"""`kdjax compare`: runs and evaluations, paired by problem."""

from __future__ import annotations

from pathlib import Path

from kdjax.commands.arguments import new_file, option
from kdjax.errors import ConfigError


def compare(args: list[str]) -> None:
    rest = list(args)
    out = option(rest, "--out")
    if len(rest) != 2 or any(not arg or arg.startswith("-") for arg in rest):
        raise ConfigError("usage: kdjax compare A B [--out FILE.json] (kdjax --help)")
    file = new_file(out)
    from kdjax.report import compare as paired
    from kdjax.runtime import files
    from kdjax.runtime.console import print_lines

    first, second = (paired.read_result(Path(each)) for each in rest)
    found = paired.compare(first, second, names=(rest[0], rest[1]))
    print_lines(*paired.table(found))
    print("A: {}, B: {}; B less A, paired by problem, 95 % interval over problems".format(*rest))
    if file is not None:
        files.write_json(file, paired.to_json(found))
