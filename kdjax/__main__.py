"""The command line: `kdjax train | rollouts | evaluate | compare | study | export | plan ...`.

Exit codes: in HELP, and in docs/runs.md with what to do at each.
"""

from __future__ import annotations

import importlib
import os
import re
import sys

HELP = """\
kdjax: distillation of language models in JAX, where a method is two choices

  kdjax train CONFIG [--field VALUE ...]     train the run of a config file; resumes it if it exists
                 [--profile [5]]             of 5 steps after 2: where their time goes, as a table
                                             and as a trace for Perfetto (docs/runs.md)
                 [--distributed | --coordinator HOST:PORT --processes N --process I]
                                             as one of several processes (docs/launch.md)
  kdjax rollouts CONFIG [--out FOLDER] [--keep states|top_k=64] [--redo] [--share 0/2]
                 [--field VALUE ...]         draw a config's responses once, and keep the teacher's
                                             outputs; train on them with --trajectories FOLDER
  kdjax evaluate TARGET [--benchmark NAME] [--n 32] [--k 1,8,32] [--out FOLDER|FILE.json]
                 [--step newest|best|N] [--field VALUE ...]
                                             evaluate a model folder (or kdjax:teacher) or a run
                                             (also written --model TARGET), on
                                             its task or on a dataset by name (evaluation.name), n
                                             samples a problem (evaluation.samples); --teacher
                                             MODEL adds the KLs to a teacher
  kdjax compare A B [--out FILE.json]        B less A, paired by problem with 95 % intervals: runs,
                                             or what kdjax evaluate --out wrote
  kdjax study CONFIG [--folder FOLDER] [--jobs 2] [--only RUN]
                                             train and compare the runs of a study file, several at
                                             once on CPUs and GPUs; or one alone (CELL/seed_0)
  kdjax export RUN OUT [--dtype bfloat16] [--step newest|best|N]
                                             write a run's student as a Hugging Face folder
  kdjax export-adapter RUN OUT [--step N]    write a run's LoRA adapter as peft reads it
  kdjax init-student TEACHER OUT --layers 10|0,3,6 [--fresh [--seed 0]]
                                             write a student of some of a teacher's layers (10: as
                                             many, evenly spaced); --fresh: its widths, new weights
  kdjax data check NAME_OR_FILE [--against BENCHMARK ...] [--columns FIELD=COLUMN ...]
                   [--student MODEL] [--out FILE]
                                             what a dataset holds: duplicates, answers that can't be
                                             used, and what of it is in benchmarks too
  kdjax plan CONFIG [--topology v5e:4x4] [--out FILE] [--field VALUE ...]
                                             will it fit, how fast could it be? The real programs,
                                             compiled for TPUs, h100, h100:8, h200 or this machine
  kdjax bench head|rollout|verifier [--out FILE] [--field VALUE ...]
                                             errors, memory and time of the loss head, the sampler
                                             or the verifier, here
  kdjax list [configs|methods|losses|objectives|reductions|models|tasks|datasets]
                                             the names that come along

CONFIG is one that comes along (student_mix, methods/gkd, for a study quickstart) or a Python file
with get_config() -> kdjax.Config (a study: get_study() -> kdjax.Study).
Any field can be overridden: --optimizer.learning_rate 3e-4 --prefix teacher
  --token_loss "mix(forward_kl, reverse_kl, weight=0.8)". `kdjax train CONFIG --help` lists them.

Exit codes: 0 done, 64 wrong config, 65 bad data or model folder, 69 an inference engine failed,
70 a bug of kdjax, 71 not enough memory, open files or the like, 74 can't read or write, 75 not all
processes of the run came in time, or another run trains in its folder, 85 told to stop (SIGTERM,
SIGHUP, Ctrl-C) and saved: the same command resumes, 86 diverged, 124 a step hung
(faults.step_limit_seconds), 130 interrupted at once, 134 another process of the run was lost.
"""

COMMANDS = {
    "train": "train.run",
    "rollouts": "rollouts.run",
    "evaluate": "evaluate.run",
    "compare": "reports.compare",
    "study": "study.run",
    "export": "folders.export",
    "export-adapter": "folders.export_adapter",
    "init-student": "folders.init_student",
    "data": "data.run",
    "plan": "measure.plan",
    "bench": "measure.bench",
    "list": "names.run",
}
"""Where each command stands in kdjax/commands: it is imported when it is asked for."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; mistakes of the user end in one line on standard error and an exit code."""
    from kdjax.runtime.output import unbroken

    unbroken()
    args = sys.argv[1:] if arguments is None else arguments
    if args[:1] in (["--version"], ["-V"]):
        from kdjax import __version__

        print(f"kdjax {__version__}")
        return 0
    if not args or args[0] == "help" or _asks_for_help(args):
        print(help_of(args[0]) if args else HELP, end="")
        return 0
    if "KDJAX_PARENT" in os.environ:
        from kdjax.runtime.jobs import end_with_parent

        end_with_parent()
    code = _guarded(args[0], args[1:])
    from kdjax.errors import PreemptedError
    from kdjax.runtime import processes

    together = code in (0, PreemptedError.exit_code)  # all processes have come to the same end
    processes.end() if together else processes.abandon(code)
    if arguments is None:  # nobody comes after
        from kdjax.runtime.signals import end_in_time

        sys.stdout.flush()
        end_in_time(code)
    return code


NO_FIELDS = ("compare", "study", "export", "export-adapter")
"""Commands whose help has no list of fields."""


def _asks_for_help(args: list[str]) -> bool:
    """Whether help is asked for, other than of the fields that stand behind a command's target."""
    at = next((n for n, arg in enumerate(args) if arg in ("-h", "--help")), None)
    return at is not None and (at < (3 if args[0] == "data" else 2) or args[0] in NO_FIELDS)


def help_of(command: str) -> str:
    """The part of HELP that is about a command; all of it, if it is none."""
    parts = re.split(r"(?m)^(?=  kdjax |^$)", HELP)
    own = [part for part in parts if re.match(rf"  kdjax {re.escape(command)}\b(?!-)", part)]
    return "".join(own) or HELP


def _guarded(command: str, args: list[str]) -> int:
    """Run a command -> its exit code, once its mistakes have been told in a line."""
    from kdjax.errors import KdjaxError, Stopped, of_user_code, ordinary, without_secrets
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
    except Stopped as error:
        return error.exit_code
    except (Exception, SystemExit) as error:
        import traceback

        from kdjax.runtime import processes

        told = ordinary(error) or of_user_code(error)
        if told is None and isinstance(error, SystemExit):
            raise  # the list of fields was asked for
        if told is None:
            print(without_secrets(traceback.format_exc()), file=sys.stderr, end="")
        if processes.is_lost(error):
            return 134
        if told is not None:
            print(f"kdjax: {told}", file=sys.stderr)
            return told.exit_code
        print("kdjax: this is a bug of kdjax; please report the lines above", file=sys.stderr)
        return 70
    return 0


def _run(command: str, args: list[str]) -> None:
    from kdjax.errors import ConfigError

    if command not in COMMANDS:
        raise ConfigError(
            f"unknown command {command!r}; there are {', '.join(COMMANDS)} (kdjax --help)"
        )
    from kdjax.config.overrides import join_processes

    name, _, run = COMMANDS[command].partition(".")
    module = importlib.import_module(f"kdjax.commands.{name}")
    getattr(module, run)(join_processes(command, args))


if __name__ == "__main__":
    sys.exit(main())
