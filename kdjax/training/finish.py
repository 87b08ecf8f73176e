"""The end of a run: the evaluation of its trained student, and the report in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdjax.base import Sampling, TrainState
from kdjax.config.schema import Config
from kdjax.grading.eval_report import EvalReport
from kdjax.report.folder import write_report
from kdjax.report.results import Cell, Row, to_json
from kdjax.runtime import files, processes
from kdjax.runtime.console import announce
from kdjax.storage import run_folder
from kdjax.storage.restore import measured
from kdjax.storage.retention import best_step
from kdjax.training.cost import open_account, spent
from kdjax.training.evaluation import evaluate_params, evaluation_key
from kdjax.training.parts.build import Parts


def finish(parts: Parts, state: TrainState, seconds: float, folder: Path) -> EvalReport:
    """Evaluate the trained student and write the run's results."""
    name, metrics = run_folder.run_name(folder), run_folder.read_metrics(folder)
    flops = spent(open_account(parts), metrics)
    announce(f"{name}: evaluating on {parts.problems.test.size} test problems")
    result, records = evaluate_params(parts, parts.student.whole(state.params))
    result = result._replace(
        training_flops=sum(flops.values()), flops_by_part=flops, training_seconds=seconds
    )
    if processes.is_first():
        _write_results(parts.config, folder, Row(name, result, metrics, records))
    return result


def _write_results(config: Config, folder: Path, row: Row) -> None:
    run_folder.write_evaluation(folder, evaluation_key(config), to_json(row.report), row.samples)
    cells, about = [Cell(row.name, [row])], about_run(folder)
    about |= _best_checkpoint(config, folder)
    write_report(folder, f"Run {row.name}", cells, about)


def _best_checkpoint(config: Config, folder: Path) -> dict[str, str]:
    best = config.checkpoints.best
    found = best_step(measured(folder / "checkpoints"), best) if best else None
    return {"best checkpoint": f"step {found[0]}: {best} {found[1]:.4g}"} if found else {}


def about_run(folder: Path) -> dict[str, Any]:
    """The method, settings and versions of a run, for its page."""
    config = files.read_json(folder / run_folder.CONFIG)
    method = {
        name: config[name]
        for name in ("prefix", "token_loss", "objective", "reduction", "steps", "batch_size")
    }
    if config.get("turns"):
        method["turns"] = config["turns"]
    return {
        **method,
        "rollouts": str(Sampling(**config["sampling"])),
        "seed": config["seed"],
        **files.read_json(folder / run_folder.VERSIONS),
    }
