"""Many runs -> one comparison: each cell and seed its own run folder, then tables and a page.

FOLDER/NAME/seed_S      the run of a cell at a seed; in it, student, if others begin as that
FOLDER/references/NAME  the evaluations of the start and of the teachers
FOLDER/logs             what runs printed that ran beside others
FOLDER/report.html, results.md, table.csv, table.json
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from kdjax.config.as_json import as_dict
from kdjax.config.schema import Config, Lora, Study
from kdjax.config.teachers import teacher_models
from kdjax.errors import ConfigError, KdjaxError, PreemptedError, StorageError, ordinary
from kdjax.export import export
from kdjax.losses.combinators import weights
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.losses.objectives import divergence
from kdjax.report.compare import as_report
from kdjax.report.folder import write_report
from kdjax.report.results import Cell, Row, Verdict, charged, to_json
from kdjax.report.text import to_lines
from kdjax.report.verdicts import judge
from kdjax.runtime import files
from kdjax.runtime.console import announce
from kdjax.runtime.jobs import Failure, run_commands, slots
from kdjax.storage import run_folder
from kdjax.training.evaluation import evaluate_params, evaluation_key
from kdjax.training.finish import about_run
from kdjax.training.loop import train
from kdjax.training.parts.build import build
from kdjax.training.parts.roles import title

REFERENCES, LOGS, STUDENT = "references", "logs", "student"
RESULTS, TABLE, LINES = "results.md", "table.csv", "table.json"
RESERVED = (REFERENCES, LOGS, "start", "teacher")


class Piece(NamedTuple):
    """A part of a study that runs by itself: the run of a cell at a seed, or a reference."""

    name: str
    config: Config
    is_reference: bool = False
    depth: int = 0  # of the cells that it begins as, one after the other
    starts_others: bool = False


class CellError(KdjaxError):
    """Some runs of a study failed; the exit code is the largest of theirs."""

    def __init__(self, failures: dict[str, Failure]):
        first = max(failures, key=lambda name: failures[name].exit_code)
        others = [name for name in failures if name != first]
        more = f" ({', '.join(others)} failed too)" if others else ""
        super().__init__(
            f"{first}: {failures[first].message}{more}; what was finished is kept, and the same"
            " command goes on from there"
        )
        self.exit_code = failures[first].exit_code


Run = Callable[[Sequence[Piece]], dict[str, Failure]]
"""Runs the pieces of a study that are not finished, and says which failed."""


def run_study(
    study: Study, run: Run | None = None, command: str = "kdjax study"
) -> tuple[list[Cell], list[Verdict]]:
    """Run what is not finished yet (runs are resumed or reused), and write the study's report.

    Errors: CellError, after everything else was run, where a run failed; no report is written then.
    """
    began, folder = time.perf_counter(), Path(study.folder)
    todo = pieces(study)
    run_folder.remove_unfinished(folder, (run_folder.PAGE, RESULTS, TABLE, LINES))
    for depth in range(1 + max(piece.depth for piece in todo)):
        wave = [piece for piece in todo if piece.depth == depth and not _is_finished(piece)]
        failures = (run or one_by_one)(wave)
        if failures:
            raise CellError(failures)
    cells = _cells(study, todo)
    verdicts = judge(study.claims, cells)
    about = _about(todo) | {
        "seeds": ", ".join(map(str, study.seeds)),
        "command": command,
        "minutes of training": round(_training_seconds(cells) / 60, 1),
        "minutes of this call": round((time.perf_counter() - began) / 60, 1),
    }
    name = f"Study {folder.name}"
    write_report(folder, name, cells, about, verdicts, markdown=RESULTS, table=TABLE)
    files.write_json(folder / LINES, to_lines(cells))
    return cells, verdicts


def pieces(study: Study) -> list[Piece]:
    """Everything that a study runs: references, then the cells at the first seed, and so on.

    Errors: ConfigError for names, seeds and claims that can't be.
    """
    _check(study)
    folder = Path(study.folder)
    first = dataclasses.replace(next(iter(study.cells.values())), seed=study.seeds[0], lora=Lora())
    if first.trajectories is not None:  # they are of the cells
        first = dataclasses.replace(first, trajectories=None, prefix="student")
    models = {"start": first.student} | {title(t): m for t, m in teacher_models(first).items()}
    return [
        Piece(name, dataclasses.replace(first, student=model, run=str(_place(folder, name))), True)
        for name, model in models.items()
        if model is not None
    ] + [_piece(study, name, seed) for seed in study.seeds for name in study.cells]


def _piece(study: Study, name: str, seed: int) -> Piece:
    def run(name: str) -> Path:
        return Path(study.folder) / name / f"seed_{seed}"

    config = dataclasses.replace(study.cells[name], seed=seed, run=str(run(name)))
    parents = _parents(study, name)
    if parents:
        config = dataclasses.replace(config, student=str(run(parents[0]) / STUDENT))
    begun = name in study.starts.values()
    return Piece(f"{name}/seed_{seed}", config, depth=len(parents), starts_others=begun)


def _parents(study: Study, name: str) -> list[str]:
    """The cells that a cell begins as, the nearest first."""
    found: list[str] = []
    while name in study.starts:
        name = study.starts[name]
        if name in found or name not in study.cells:
            raise ConfigError(f"study starts: {name} is no cell, or begins as itself")
        found.append(name)
    return found


def find_piece(study: Study, name: str) -> Piece:
    """The piece of this name. Errors: ConfigError naming the nearest."""
    found = {piece.name: piece for piece in pieces(study)}
    if name not in found:
        seeds = [piece for piece in found if piece.startswith(f"{name}/")]
        near = seeds or difflib.get_close_matches(name, found, n=1) or list(found)[-1:]
        raise ConfigError(f"--only: the study has no run {name}; did you mean {near[0]}?")
    return found[name]


def one_by_one(todo: Sequence[Piece]) -> dict[str, Failure]:
    """Run pieces in this process. One that fails does not stop the others."""
    failures = {}
    for piece in todo:
        try:
            run_piece(piece)
        except PreemptedError:
            raise  # the others were told to stop as well
        except Exception as error:
            told = error if isinstance(error, KdjaxError) else ordinary(error)
            if told is None:
                raise
            failures[piece.name] = Failure(told.exit_code, str(told))
            announce(f"{piece.name}: failed, {told}")
    return failures


def side_by_side(config_file: str, folder: str, jobs: int) -> Run:
    """Run pieces as `kdjax study CONFIG --only PIECE`, each in a process of its own, `jobs` at
    once. Errors: ConfigError where devices don't allow it."""
    places = slots(jobs)
    start = [sys.executable, "-m", "kdjax", "study", config_file, "--folder", folder, "--only"]

    def run(todo: Sequence[Piece]) -> dict[str, Failure]:
        commands = {piece.name: [*start, piece.name] for piece in todo}
        return run_commands(commands, places, Path(folder) / LOGS)

    return run


def run_piece(piece: Piece) -> None:
    """Train and evaluate, or evaluate a reference like the cells; a finished piece is reused."""
    if _is_finished(piece):
        return
    if not piece.is_reference:
        train(piece.config)  # resumes, or evaluates anew, or says what differs
        if piece.starts_others:
            _export_student(Path(piece.config.run))
        return
    run_folder.remove_unfinished(Path(piece.config.run))
    announce(f"{piece.name}: evaluating {piece.config.student}")
    parts = build(piece.config)
    result, records = evaluate_params(parts, parts.student.trained)
    key = evaluation_key(piece.config)
    run_folder.write_evaluation(Path(piece.config.run), key, to_json(result), records)


def _export_student(run: Path) -> None:
    with run_folder.open_run_folder(run):
        if not (run / STUDENT).exists():
            export(run, run / STUDENT)


def _place(folder: Path, reference: str) -> Path:
    return folder / REFERENCES / quote(reference, safe=" ")


def _is_finished(piece: Piece) -> bool:
    run = Path(piece.config.run)
    if not (run / run_folder.EVALUATION).exists():  # what it begins as may not exist yet
        return False
    if piece.starts_others and not (run / STUDENT).exists():
        return False
    return (
        run_folder.read_evaluation(Path(piece.config.run), evaluation_key(piece.config)) is not None
    )


def _check(study: Study) -> None:
    if not study.cells:
        raise ConfigError("the study has no cells; get_study() must name at least one config")
    bad = [n for n in study.cells if not re.fullmatch(r"\w[\w.-]*", n) or n in RESERVED]
    if bad:
        raise ConfigError(f"study cells can't be named {bad}: use letters, digits, - and _")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"study seeds must be some, each once, got {study.seeds}")
    for name, config in study.cells.items():
        if config.seed != Config().seed:
            raise ConfigError(
                f"study cell {name} has seed {config.seed}; the study's seeds are {study.seeds}:"
                " leave the cell's out"
            )
    for claim in study.claims:
        _check_claim(study, claim)
    _check_folder(study)


def _check_folder(study: Study) -> None:
    if not study.folder.strip():
        raise ConfigError(f"the study's folder must be a folder's name, got {study.folder!r}")
    if (Path(study.folder) / run_folder.CONFIG).exists():
        raise StorageError(f"{study.folder} is the folder of a run; choose another --folder")
    place = Path(study.folder)
    found = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if found and not found & {REFERENCES, LOGS, *study.cells}:
        raise StorageError(
            f"{place} holds {sorted(found)[:3]} but no study; choose another --folder, nothing was"
            " overwritten"
        )


def _check_claim(study: Study, claim) -> None:
    named = (*claim.more, *claim.less)
    for name in named:
        if name not in study.cells and (name != "start" or claim.reading == "flops"):
            near = difflib.get_close_matches(name, study.cells, n=1, cutoff=0.0)
            raise ConfigError(
                f"claim {claim.name}: the study has no cell {name}; did you mean {near[0]}?"
            )
    if not claim.more or not claim.less:
        raise ConfigError(f"claim {claim.name} needs cells on both sides (more and less)")
    if claim.reading == "flops" and claim.metric != "avg":
        raise ConfigError(
            f"claim {claim.name}: only avg is read at equal FLOPs, got {claim.metric}"
        )
    if claim.reading == "steps":
        return
    untested = [n for n in named if not study.cells[n].evaluation.every_steps]
    if untested:
        raise ConfigError(
            f"claim {claim.name}: cell {untested[0]} is not tested during training; set its"
            " evaluation.every_steps"
        )


def _cells(study: Study, done: Sequence[Piece]) -> list[Cell]:
    """References, then the study's cells, each with its runs in the order of the seeds."""
    rows = {piece.name: _row(piece) for piece in done}
    for piece in sorted(done, key=lambda piece: piece.depth):  # what it began as comes before
        cell, _, seed = piece.name.rpartition("/")
        if not piece.is_reference and cell in study.starts:
            began = rows[f"{study.starts[cell]}/{seed}"]
            rows[piece.name] = charged(rows[piece.name], began)
    references = [Cell(p.name, [rows[p.name]]) for p in done if p.is_reference]
    weights = sweep(study)
    return references + [
        Cell(name, [rows[f"{name}/seed_{seed}"] for seed in study.seeds], weights.get(name))
        for name in study.cells
    ]


def sweep(study: Study) -> dict[str, float]:
    """The weight of forward KL of each cell of the study's mixing sweep: those that are alike but
    for it, one of them a mix; the most of them where there are several such sets."""
    weights = {name: _weight(config) for name, config in study.cells.items()}
    sets: dict[str, dict[str, float]] = {}
    for name, weight in weights.items():
        if weight is not None and name not in study.starts:
            rest = as_dict(dataclasses.replace(study.cells[name], token_loss=forward_kl))
            sets.setdefault(str(rest), {})[name] = weight
    mixed = [found for found in sets.values() if any(0 < weight < 1 for weight in found.values())]
    return max(mixed, key=len, default={})


def _weight(config: Config) -> float | None:
    """The weight of forward KL in the token loss, on student prefixes at one length; None where the
    loss is no mix of the two KLs."""
    plain = config.prefix == "student" and config.objective is divergence and not config.turns
    if not plain or len(config.curriculum.lengths) > 1:
        return None
    found = weights(config.token_loss)
    if found.keys() - {forward_kl, reverse_kl} or min(found.values()) < 0:
        return None
    return found.get(forward_kl, 0.0) if math.isclose(sum(found.values()), 1) else None


def _row(piece: Piece) -> Row:
    folder = Path(piece.config.run)
    fields = run_folder.read_evaluation(folder, evaluation_key(piece.config))
    assert fields is not None, f"{folder} was just evaluated"
    metrics = [] if piece.is_reference else run_folder.read_metrics(folder)
    found = as_report(fields, folder / run_folder.EVALUATION)
    return Row(piece.name, found, metrics, run_folder.read_samples(folder))


def _about(done: Sequence[Piece]) -> dict[str, Any]:
    """What all runs have in common, and every version that some of them were made with."""
    folders = [Path(piece.config.run) for piece in done if not piece.is_reference]
    abouts = [about_run(folder) for folder in folders]
    versions = files.read_json(folders[0] / run_folder.VERSIONS)
    values = {name: list(dict.fromkeys(str(x.get(name)) for x in abouts)) for name in abouts[0]}
    return {
        name: ", ".join(found)
        for name, found in values.items()
        if len(found) == 1 or name in versions
    }


def _training_seconds(cells: Sequence[Cell]) -> float:
    """Of all runs, each once."""

    def of(run: Row | None) -> float:
        return (run.report.training_seconds or 0.0) if run else 0.0

    return sum(of(run) - of(run.began) for cell in cells for run in cell.runs)
