"""launch/slurm.sh on a real Slurm of one node: which ends start a job again, and which don't."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import chex
import pytest
from runs import final_state, logged
from slurm import HAS_SLURM, NO_SLURM, ROOT, job, one_node, said, until

from kdjax.config.overrides import load_file

pytestmark = pytest.mark.skipif(not HAS_SLURM, reason=NO_SLURM)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_node(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


# Two tasks that note each start, then do what FATE says of the first start; the second one is done.
STUB = """
echo "$JAX_COORDINATOR_PORT $SLURM_PROCID $*" >>starts
trap 'exit 85' TERM
case "${SLURM_RESTART_COUNT:-0} $FATE" in
  "0 uneven") sleep "$SLURM_PROCID"; exit 64 ;;
  "0 waits") for _ in $(seq 300); do sleep 0.1; done ;;
  *" killed") kill -KILL $$ ;;
  "0 "*) exit "$FATE" ;;
esac
"""


def submit(slurm, folder: Path, kdjax: str, *arguments: str, **environment: str) -> str:
    """The number of a job of two tasks, in a folder of its own that has a program kdjax."""
    (folder / "bin").mkdir(parents=True)
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "bin" / "kdjax").write_text(f"#!/usr/bin/env bash\n{kdjax}")
    (folder / "bin" / "kdjax").chmod(0o755)
    command = ["sbatch", "--parsable", "--ntasks=2", f"--chdir={folder}", ROOT / "launch/slurm.sh"]
    path = f"{folder / 'bin'}:{slurm['PATH']}"
    return said(slurm | environment | {"PATH": path}, *command, *arguments)


CASES = {  # name: (fate, options of slurm.sh, what is done to the job, state, exit code, restarts)
    "done": ("0", (), None, "COMPLETED", "0:0", 0),
    "mistake": ("64", (), None, "FAILED", "64:0", 0),
    "uneven": ("uneven", (), None, "FAILED", "64:0", 0),
    "diverged": ("86", (), None, "FAILED", "86:0", 0),
    "signalled": ("waits", (), ("scancel", "--signal=TERM"), "COMPLETED", "0:0", 1),
    "requeued": ("waits", (), ("scontrol", "requeue"), "COMPLETED", "0:0", 1),
    "cancelled": ("waits", (), ("scancel",), "CANCELLED", "85:0", 0),
    "late": ("75", (), None, "COMPLETED", "0:0", 1),
    "killed": ("killed", ("--restarts", "1"), None, "FAILED", "137:0", 1),
}


def test_which_ends_start_a_job_again(slurm, tmp_path):
    """All cases at once: state, exit code and restarts as Slurm has them, and two tasks a start.

    A task's own code is not hidden by those of tasks that are ended for it. A signal that Slurm
    gives before the time limit reaches the tasks, whose 85 requeues the job; one that was cancelled
    is not brought back by its own 85, and one that an operator requeued starts again once. A killed
    task, and one whose others did not come, are started again once, as --restarts says."""
    numbers = {
        name: submit(slurm, tmp_path / name, STUB, *options, "c.py", FATE=fate)
        for name, (fate, options, *_) in CASES.items()
    }
    for name, (_, _, action, *_) in CASES.items():
        if action:
            starts = tmp_path / name / "starts"
            until(lambda starts=starts: starts.exists() and len(read(starts)) == 2, 120)
            said(slurm, *action, numbers[name])
    final = {"COMPLETED", "FAILED", "CANCELLED"}
    for number in numbers.values():
        until(lambda number=number: job(slurm, number)["JobState"] in final, 120)
    found = {}
    for name, number in numbers.items():
        about = job(slurm, number)
        found[name] = (about["JobState"], about["ExitCode"], int(about["Restarts"]))
    assert found == {name: tuple(wanted) for name, (_, _, _, *wanted) in CASES.items()}
    for name, (*_, restarts) in CASES.items():
        tasks = [line.split(" ", 2) for line in read(tmp_path / name / "starts")]
        assert sorted(task for _, task, _ in tasks) == sorted(["0", "1"] * (restarts + 1)), name
        assert {command for *_, command in tasks} == {"train c.py --distributed"}
        assert len({port for port, *_ in tasks}) == restarts + 1, "a port for each start"


CONFIG = """
from kdjax.config import Config, Data, Evaluation
from kdjax.losses.objectives import negative_log_likelihood

def get_config():
    return Config(
        run="{run}", student="{student}", teacher=None, prefix="dataset",
        objective=negative_log_likelihood, steps=60, batch_size=8, save_every_steps=4,
        log_every_steps=1, data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )
"""


def test_a_requeued_run_ends_as_one_that_was_left_alone(slurm, tmp_path, student_folder):
    """Two tasks are one run. After its first checkpoint the job is requeued: the tasks have five
    seconds to save, start again, go on from the newest checkpoint, and come to the same bits."""
    kdjax = f'exec {sys.executable} -m kdjax "$@"'
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    here = {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": python_path}

    def start(name: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(CONFIG.format(run=tmp_path / name / "run", student=student_folder))
        return submit(slurm, tmp_path / name, kdjax, str(path), **here)

    def state(number: str) -> str:
        return job(slurm, number)["JobState"]

    def ends(name: str, number: str) -> None:
        until(lambda: state(number) in ("COMPLETED", "FAILED"), 300)
        log = (tmp_path / name / f"slurm-{number}.out").read_text()
        assert state(number) == "COMPLETED", log[-3000:]
        assert "2 x cpu, mesh data 2" in log

    ends("whole", start("whole"))
    number = start("parts")
    checkpoints = tmp_path / "parts" / "run" / "checkpoints"
    until(lambda: (checkpoints / "4").is_dir(), 300)
    said(slurm, "scontrol", "requeue", number)
    until(lambda: state(number) == "PENDING", 60)
    saved = [int(place.name) for place in checkpoints.iterdir() if place.name.isdecimal()]
    assert 4 <= max(saved) < 60
    ends("parts", number)
    assert int(job(slurm, number)["Restarts"]) == 1
    whole, parts = (
        load_file(str(tmp_path / f"{name}.py"), "get_config") for name in ("whole", "parts")
    )
    (step, left_alone, _), (_, requeued, _) = final_state(whole), final_state(parts)
    assert step == 60
    chex.assert_trees_all_equal(requeued, left_alone)
    assert logged(parts) == logged(whole)


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()
