"""Many runs -> one comparison: each cell its own run folder, then a table and a page."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdjax import report
from kdjax.base import ConfigError, StorageError
from kdjax.config import Config, Lora, Study, teacher_models
from kdjax.evaluate import from_json, to_json
from kdjax.page import render_page
from kdjax.parts import build, evaluate_params, evaluation_key
from kdjax.progress import announce
from kdjax.results import Cell, Row
from kdjax.tables import table
from kdjax.teachers import title
from kdjax.train import about_run, train

RESERVED = ("references", "start", "teacher")


def run_study(study: Study) -> list[Row]:
    """Run what is not finished yet (cells are resumed or reused), and write the study's page."""
    folder = Path(study.folder)
    _check(study, folder)
    first = next(iter(study.cells.values()))
    rows = [_reference("start", first, folder)]
    for tag, model in teacher_models(first).items():
        if model is not None:
            rows.append(_reference(title(tag), dataclasses.replace(first, student=model), folder))
    for name, config in study.cells.items():
        rows.append(_cell(name, dataclasses.replace(config, run=str(folder / name))))
    abouts = [about_run(folder / name) for name in study.cells]
    shared = {k: v for k, v in abouts[0].items() if all(about[k] == v for about in abouts)}
    cells = [Cell(row.name, [row]) for row in rows]
    report.write_text(folder / report.PAGE, render_page(f"Study {folder.name}", cells, shared))
    header, lines = table(rows)
    report.write_json(folder / "table.json", [dict(zip(header, x, strict=True)) for x in lines])
    return rows


def _check(study: Study, folder: Path) -> None:
    if not study.cells:
        raise ConfigError("the study has no cells; get_study() must name at least one config")
    bad = [n for n in study.cells if not re.fullmatch(r"\w[\w.-]*", n) or n in RESERVED]
    if bad:
        raise ConfigError(f"study cells can't be named {bad}: use letters, digits, - and _")
    if (folder / report.CONFIG).exists():
        raise StorageError(f"{folder} is the folder of a run; choose another --folder")


def _cell(name: str, config: Config) -> Row:
    folder = Path(config.run)
    key = evaluation_key(config)
    if report.read_evaluation(folder, key) is None:
        train(config)  # resumes, or evaluates anew, or says what differs
    return _row(name, folder, key, report.read_metrics(folder))


def _reference(name: str, config: Config, folder: Path) -> Row:
    """A model as it is, evaluated like the cells."""
    config = dataclasses.replace(config, lora=Lora())
    if config.trajectories is not None:  # they are of the cells
        config = dataclasses.replace(config, trajectories=None, prefix="student")
    place, key = folder / "references" / quote(name, safe=" "), evaluation_key(config)
    if report.read_evaluation(place, key) is None:
        announce(f"{name}: evaluating {config.student}")
        parts = build(config)
        result, records = evaluate_params(parts, parts.initial_params)
        report.write_evaluation(place, key, to_json(result), records)
    return _row(name, place, key, [])


def _row(name: str, folder: Path, key: dict[str, Any], metrics: list[dict[str, float]]) -> Row:
    fields = report.read_evaluation(folder, key)
    assert fields is not None, f"{folder} was just evaluated"
    return Row(name, from_json(fields), metrics, report.read_samples(folder))
