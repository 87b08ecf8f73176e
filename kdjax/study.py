"""Many runs -> one comparison: each cell its own run folder, then a table and a page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from kdjax import report
from kdjax.base import ConfigError
from kdjax.config import Config, Study, as_dict, differences
from kdjax.evaluate import from_json, to_json
from kdjax.page import Row, render_page, table
from kdjax.parts import build, evaluate_params
from kdjax.progress import announce
from kdjax.train import about_run, train


def run_study(study: Study) -> list[Row]:
    """Run what is not finished yet (cells are resumed or reused), and write the study's page."""
    if not study.cells:
        raise ConfigError("the study has no cells; get_study() must name at least one config")
    folder = Path(study.folder)
    first = next(iter(study.cells.values()))
    rows = [_reference("start", first, folder)]
    if first.teacher is not None:
        teacher = dataclasses.replace(first, student=first.teacher)
        rows.append(_reference("teacher", teacher, folder))
    for name, config in study.cells.items():
        rows.append(_cell(name, dataclasses.replace(config, run=str(folder / name))))
    about = about_run(folder / next(iter(study.cells)))
    shared = {k: v for k, v in about.items() if k not in ("prefix", "token_loss")}
    report.write_text(folder / report.PAGE, render_page(f"Study {folder.name}", rows, shared))
    header, cells = table(rows)
    report.write_json(
        folder / "table.json", [dict(zip(header, line, strict=True)) for line in cells]
    )
    return rows


def _cell(name: str, config: Config) -> Row:
    folder = Path(config.run)
    if not _finished(folder, config):
        train(config)  # resumes, or evaluates anew, or says what differs
    result = from_json(report.read_json(folder / report.EVALUATION))
    return Row(name, result, report.read_metrics(folder), report.read_samples(folder))


def _finished(folder: Path, config: Config) -> bool:
    if not (folder / report.EVALUATION).exists():
        return False
    saved, asked = report.read_json(folder / report.CONFIG), as_dict(config)
    return not differences({**saved, "run": ""}, {**asked, "run": ""})


def _reference(name: str, config: Config, folder: Path) -> Row:
    """A model as it is, evaluated like the cells."""
    place = folder / "references" / name
    parts = build(config)
    key = {
        "identities": parts.identities,
        "evaluation": dataclasses.asdict(config.evaluation),
        "seed": config.seed,
    }
    key = json.loads(json.dumps(key))
    saved = place / report.EVALUATION
    if not saved.exists() or report.read_json(saved)["settings"] != key:
        announce(f"{name}: evaluating {config.student}")
        result, records = evaluate_params(parts, parts.initial_params)
        report.write_samples(place, records)
        report.write_json(saved, {"settings": key, "report": to_json(result)})
    return Row(name, from_json(report.read_json(saved)["report"]), [], report.read_samples(place))
