"""`kdjax evaluate`: a model folder or a run on a benchmark."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdjax.commands.arguments import first, new_file, option
from kdjax.errors import ConfigError

if TYPE_CHECKING:
    from kdjax.config.schema import Config

BENCHMARK_TOKENS = (1024, 4096)
"""Limits of prompt and response of a model folder on a dataset by name, unless others are given."""


def run(args: list[str]) -> None:
    from kdjax.config.engines import Served
    from kdjax.config.overrides import evaluation_fields, override
    from kdjax.config.schema import Config, Data, Evaluation, Lora
    from kdjax.losses.objectives import negative_log_likelihood

    named = args[1:] if args[:1] == ["--model"] else args  # both spellings of TARGET
    target, rest = first(named, "kdjax evaluate TARGET")
    out, step = option(rest, "--out"), option(rest, "--step")
    rest = evaluation_fields(rest)
    is_run = (Path(target) / "checkpoints").is_dir()
    if step is not None and not is_run:
        raise ConfigError(f"--step {step} is of a run's checkpoints, and {target} is no run")
    from kdjax.export import NEWEST, load_run

    bare = Config(student=target, teacher=None, objective=negative_log_likelihood)
    if any(arg.startswith("--evaluation.name") for arg in rest):
        prompt, new = BENCHMARK_TOKENS
        data, evaluation = Data(max_prompt_tokens=prompt), Evaluation(max_new_tokens=new)
        bare = dataclasses.replace(bare, data=data, evaluation=evaluation)
    config, params = load_run(target, step or NEWEST) if is_run else (bare, None)
    if config.served.url is not None:  # its weights may not be here; --teacher loads them
        config = dataclasses.replace(config, teacher=None, served=Served())
    config, student = _for_evaluation(config), config.student
    config = override(config, rest, f"kdjax evaluate {target}")
    if config.student != student:
        raise ConfigError("kdjax evaluate: TARGET is the student; give another TARGET")
    place = new_file(out)
    from kdjax.report.results import Cell, Row, to_json
    from kdjax.report.tables import more_samples, responses
    from kdjax.report.text import print_table
    from kdjax.runtime import files
    from kdjax.runtime.console import announce, print_lines
    from kdjax.storage import run_folder
    from kdjax.training.evaluation import evaluate_params, write_results
    from kdjax.training.parts.build import build
    from kdjax.training.parts.startup import evaluation_context

    parts = build(dataclasses.replace(config, prefix="student", trajectories=None, lora=Lora()))
    for line in evaluation_context(parts):
        announce(line)
    settings = parts.config.evaluation
    problems = parts.problems.test.size
    announce(
        f"{target}: evaluating on {problems} problems, {settings.samples} samples each, of up to"
        f" {settings.max_new_tokens} tokens"
    )
    result, records = evaluate_params(parts, parts.student.trained if params is None else params)
    row = Row(Path(target).name, result, [], records)
    print_table([row])
    tables = [made([Cell(row.name, [row])]) for made in (more_samples, responses)]
    found = [pair for head, (line,) in tables for pair in zip(head[1:], line[1:], strict=True)]
    print_lines(["%, length in tokens", f"{row.name} (95 %)"], found)
    if place is not None and place.suffix == ".json":
        files.write_json(place, to_json(result))
    elif place is not None:
        write_results(place, row, parts.config)
        print(f"report: {place / run_folder.PAGE}")


def _for_evaluation(config: Config) -> Config:
    """A run's config without what is of training alone, with the teacher that has weights of its
    own."""
    from kdjax.config.teachers import teacher_models
    from kdjax.losses.objectives import negative_log_likelihood

    prompts = {"teacher_prompt_template": None, "max_teacher_prompt_tokens": None}
    data: Any = dataclasses.replace(config.data, **prompts)  # type: ignore[arg-type]
    changed: dict[str, Any] = {"prefix": "student", "trajectories": None, "data": data}
    if not any(teacher_models(config).values()):  # its objective may need none, or be unreadable
        changed |= {"teacher": None, "objective": negative_log_likelihood}
    return dataclasses.replace(config, self_decay=0.0, **changed)
