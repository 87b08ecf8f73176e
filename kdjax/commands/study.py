"""`kdjax study`: train and compare the runs of a study."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kdjax.commands.arguments import first, option
from kdjax.errors import ConfigError


def run(args: list[str]) -> None:
    from kdjax.config.overrides import load_file

    path, rest = first(args, "kdjax study CONFIG")
    folder, jobs, only = (option(rest, name) for name in ("--folder", "--jobs", "--only"))
    if rest:
        raise ConfigError(
            "kdjax study takes --folder FOLDER, --jobs N and --only RUN, got"
            f" {' '.join(rest)}; cells are set in {path}"
        )
    if jobs is not None and not jobs.isdecimal():
        raise ConfigError(f"--jobs must be a number of runs at once, got {jobs}")
    study = load_file(path, "get_study")
    if folder is not None:
        study = dataclasses.replace(study, folder=folder)
    from kdjax.report.text import print_table
    from kdjax.report.verdicts import verdict_line
    from kdjax.study import find_piece, run_piece, run_study, side_by_side

    if only is not None:
        run_piece(find_piece(study, only))
        return
    command = f"kdjax study {' '.join(args)}"
    at_once = None if jobs is None else side_by_side(path, study.folder, int(jobs))
    cells, verdicts = run_study(study, at_once, command)
    one_seed = len(study.seeds) == 1
    print_table(
        [run._replace(name=cell.name) if one_seed else run for cell in cells for run in cell.runs]
    )
    for verdict in verdicts:
        print(verdict_line(verdict))
    print(f"report: {Path(study.folder) / 'report.html'}")
