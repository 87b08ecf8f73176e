"""The command line: `kdjax train | rollouts | evaluate | compare | study | export | plan ...`.

Exit codes: in HELP, and in docs/runs.md with what to do at each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdjax.usage import HELP


def main(arguments: list[str] | None = None) -> int:
    """Run one command; mistakes of the user end in one line on standard error and an exit code."""
    args = sys.argv[1:] if arguments is None else arguments
    if not args or args[0] == "help" or (args[:2][-1] in ("-h", "--help")):
        print(HELP, end="")
        return 0
    code = _guarded(args[0], args[1:])
    from kdjax.errors import PreemptedError
    from kdjax.runtime import processes

    together = code in (0, PreemptedError.exit_code)  # all processes have come to the same end
    processes.end() if together else processes.abandon(code)
    return code


def _guarded(command: str, args: list[str]) -> int:
    """Run a command -> its exit code, once its mistakes have been told in a line."""
    from kdjax.errors import KdjaxError, without_secrets
    from kdjax.runtime.signals import stop_at_once

    try:
        with stop_at_once():
            _run(command, args)
    except KdjaxError as error:
        print(f"kdjax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "kdjax: interrupted; the same command resumes from the last checkpoint", file=sys.stderr
        )
        return 130
    except Exception as error:
        import traceback

        from kdjax.runtime import processes

        print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        if processes.is_lost(error):
            return 134
        print("kdjax: this is a bug of kdjax; please report the lines above", file=sys.stderr)
        return 70
    return 0


def _run(command: str, args: list[str]) -> None:
    from kdjax.errors import ConfigError

    commands = {
        "train": _train,
        "rollouts": _rollouts,
        "evaluate": _evaluate,
        "compare": _compare,
        "study": _study,
        "export": _export,
        "export-adapter": _export_adapter,
        "data": _data,
        "plan": _plan,
        "bench": _bench,
    }
    if command not in commands:
        raise ConfigError(
            f"unknown command {command!r}; there are {', '.join(commands)} (kdjax --help)"
        )
    from kdjax.config.overrides import join_processes

    commands[command](join_processes(command, args))


def _train(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override

    path, rest = _first(args, "kdjax train CONFIG")
    profile_steps = _profile_steps(rest)
    config = override(load_file(path, "get_config"), rest, f"kdjax train {path}")
    from kdjax.report.results import Row
    from kdjax.report.text import print_table
    from kdjax.runtime.console import announce
    from kdjax.train.loop import train

    result = train(config, profile_steps)
    print_table([Row(Path(config.run).name, result, [], [])])
    announce(f"report: {Path(config.run) / 'report.html'}")


PROFILED_STEPS = 5


def _profile_steps(rest: list[str]) -> int:
    """Take `--profile [STEPS]` out of the arguments: PROFILED_STEPS unless said, 0 without it."""
    from kdjax.errors import ConfigError

    rest[:] = [
        f"--profile={PROFILED_STEPS}" if arg == "--profile" and then.startswith("-") else arg
        for arg, then in zip(rest, [*rest[1:], "-"], strict=False)
    ]
    steps = _option(rest, "--profile") or "0"
    if not steps.isdecimal():
        raise ConfigError(f"--profile takes a number of steps, got {steps}")
    return int(steps)


def _rollouts(args: list[str]) -> None:
    import dataclasses

    from kdjax.config.overrides import load_file, override
    from kdjax.train.parts.precompute import fill, parse_share
    from kdjax.train.parts.precomputed import parse_keep

    path, rest = _first(args, "kdjax rollouts CONFIG")
    out, keep, share = (_option(rest, name) for name in ("--out", "--keep", "--share"))
    redo = "--redo" in rest
    rest = [arg for arg in rest if arg != "--redo"]
    config = override(load_file(path, "get_config"), rest, f"kdjax rollouts {path}")
    asked = parse_keep(keep), parse_share(share), redo
    import jax

    from kdjax.config.validation import validate
    from kdjax.train.parts.build import asked_of, build

    config = validate(dataclasses.replace(config, trajectories=None))
    parts = build(config, jax.local_devices())  # by itself, whatever other processes do
    for each in asked_of(parts, config.prefix).values():
        place, drawn = fill(each, out, *asked)
        print(f"{place}: {drawn} chunks drawn now, {len(each.rows)} responses in all")


def _study(args: list[str]) -> None:
    import dataclasses

    from kdjax.config.overrides import load_file
    from kdjax.errors import ConfigError

    path, rest = _first(args, "kdjax study CONFIG")
    folder, jobs, only = (_option(rest, name) for name in ("--folder", "--jobs", "--only"))
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
        print(f"{verdict.outcome:12} {verdict.claim.statement}")
    print(f"report: {Path(study.folder) / 'report.html'}")


BENCHMARK_TOKENS = (1024, 4096)
"""Limits of prompt and response of a model folder on a dataset by name, unless others are given."""


def _evaluate(args: list[str]) -> None:
    import dataclasses

    from kdjax.config.overrides import evaluation_fields, override
    from kdjax.config.schema import Config, Data, Evaluation, Lora, teacher_models
    from kdjax.errors import ConfigError
    from kdjax.losses.objectives import negative_log_likelihood

    named = args[1:] if args[:1] == ["--model"] else args  # both spellings of TARGET
    target, rest = _first(named, "kdjax evaluate TARGET")
    out, step = _option(rest, "--out"), _option(rest, "--step")
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
    if not any(teacher_models(config).values()):  # its objective may need none, or be unreadable
        config = dataclasses.replace(config, objective=negative_log_likelihood)
    student = config.student
    config = dataclasses.replace(config, prefix="student", trajectories=None)
    config = override(config, rest, f"kdjax evaluate {target}")
    if config.student != student:
        raise ConfigError("kdjax evaluate: TARGET is the student; give another TARGET")
    place = _new_file(out)
    from kdjax.report.results import Cell, Row, to_json
    from kdjax.report.tables import more_samples, responses
    from kdjax.report.text import print_table
    from kdjax.runtime import files
    from kdjax.runtime.console import print_lines
    from kdjax.storage import run_folder
    from kdjax.train.evaluation import evaluate_params, write_results
    from kdjax.train.parts.build import build

    parts = build(dataclasses.replace(config, prefix="student", trajectories=None, lora=Lora()))
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


def _compare(args: list[str]) -> None:
    from kdjax.errors import ConfigError

    rest = list(args)
    out = _option(rest, "--out")
    if len(rest) != 2 or any(arg.startswith("-") for arg in rest):
        raise ConfigError("usage: kdjax compare A B [--out FILE.json] (kdjax --help)")
    file = _new_file(out)
    from kdjax.report.compare import compare, read_result, table, to_json
    from kdjax.runtime import files
    from kdjax.runtime.console import print_lines

    first, second = (read_result(Path(each)) for each in rest)
    found = compare(first, second, names=(rest[0], rest[1]))
    print_lines(*table(found))
    print("A: {}, B: {}; B less A is paired by problem, with its 95 % interval".format(*rest))
    if file is not None:
        files.write_json(file, to_json(found))


def _export(args: list[str]) -> None:
    from kdjax.errors import ConfigError
    from kdjax.export import NEWEST, export

    rest = list(args)
    dtype, step = _option(rest, "--dtype") or "float32", _option(rest, "--step") or NEWEST
    if len(rest) != 2 or dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            "usage: kdjax export RUN OUT [--dtype float32|bfloat16] [--step newest|best|N]"
        )
    run, out = rest
    export(run, out, dtype, step)
    print(f"wrote {out}: a Hugging Face folder in {dtype}")


def _data(args: list[str]) -> None:
    from kdjax.errors import ConfigError

    usage = "kdjax data check NAME_OR_FILE"
    what, rest = _first(args, usage)
    if what != "check":
        raise ConfigError(f"unknown command data {what!r}; there is check: {usage}")
    target, rest = _first(rest, usage)
    from kdjax import models
    from kdjax.config.overrides import override
    from kdjax.data.sources.check import DataCheck, check, to_json
    from kdjax.data.sources.show import show
    from kdjax.data.tokenizer import Wording, load_tokenizer
    from kdjax.runtime import files

    out = _option(rest, "--out")
    asked = override(DataCheck(), rest, usage)
    file, student = _new_file(out), None
    if asked.student is not None:
        wording = Wording(asked.prompt_template, asked.system_prompt, asked.thinking)
        student = load_tokenizer(models.find(asked.student), wording)
    found = check(target, asked.columns, asked.against, student)
    show(found)
    if file is not None:
        files.write_json(file, to_json(found))


def _plan(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override

    path, rest = _first(args, "kdjax plan CONFIG")
    topology, out = _option(rest, "--topology"), _option(rest, "--out")
    config = override(load_file(path, "get_config"), rest, f"kdjax plan {path}")
    file = _new_file(out)
    from kdjax.plan.plan import plan
    from kdjax.plan.show import show, to_json
    from kdjax.runtime import files

    made = plan(config, topology or "local")
    show(made)
    if file is not None:
        files.write_json(file, to_json(made))


def _export_adapter(args: list[str]) -> None:
    from kdjax.errors import ConfigError
    from kdjax.export import NEWEST, export_adapter

    rest = list(args)
    step = _option(rest, "--step") or NEWEST
    if len(rest) != 2:
        raise ConfigError("usage: kdjax export-adapter RUN OUT [--step newest|best|N]")
    run, out = rest
    export_adapter(run, out, step)
    print(f"wrote {out}: a peft adapter")


def _bench(args: list[str]) -> None:
    from kdjax.bench import show_figures
    from kdjax.bench.head import HeadBench, bench_head
    from kdjax.bench.rollout import RolloutBench, bench_rollout
    from kdjax.bench.verifier import VerifierBench, bench_verifier
    from kdjax.config.overrides import override
    from kdjax.errors import ConfigError

    benches: dict[str, tuple[Any, Callable]] = {
        "head": (HeadBench(), bench_head),
        "rollout": (RolloutBench(), bench_rollout),
        "verifier": (VerifierBench(), bench_verifier),
    }
    what, rest = _first(args, "kdjax bench head|rollout|verifier")
    if what not in benches:
        raise ConfigError(f"unknown bench {what!r}; there are {', '.join(benches)}")
    out = _option(rest, "--out")
    default, measure = benches[what]
    sizes = override(default, rest, f"kdjax bench {what}")
    show_figures(measure(sizes), sizes, _new_file(out))


def _first(args: list[str], usage: str) -> tuple[str, list[str]]:
    from kdjax.errors import ConfigError

    if not args or args[0].startswith("-"):
        raise ConfigError(f"usage: {usage} [--field VALUE ...] (kdjax --help)")
    return args[0], list(args[1:])


def _option(rest: list[str], name: str) -> str | None:
    """Take `name VALUE` out of the arguments."""
    from kdjax.errors import ConfigError

    rest[:] = [
        part for arg in rest for part in (arg.split("=", 1) if arg.startswith(name) else [arg])
    ]
    if name not in rest:
        return None
    at = rest.index(name)
    if at + 1 == len(rest):
        raise ConfigError(f"{name} needs a value")
    value = rest[at + 1]
    del rest[at : at + 2]
    return value


def _new_file(out: str | None) -> Path | None:
    """Where --out writes. Errors: StorageError where something is there already."""
    from kdjax.errors import StorageError

    if out is not None and Path(out).exists():
        raise StorageError(f"{out} exists; choose another --out, nothing was overwritten")
    return None if out is None else Path(out)


if __name__ == "__main__":
    sys.exit(main())
