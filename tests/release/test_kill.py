"""kill -9 at every named point and at random moments: the run resumes, and ends as if nothing had
been.

KDJAX_KILLS=500 is the release form (docs/reliability.md); KDJAX_KILL_SEED begins elsewhere.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from killed import FILES, FUNCTIONS, Kill, Server
from several import flags_of, free_port
from tiny import tiny_config

from kdjax import models
from kdjax.config.overrides import load_file
from kdjax.config.timetable import timetable
from kdjax.runtime import files
from kdjax.step.update import init_state
from kdjax.storage import run_folder
from kdjax.storage.checkpoints import open_checkpoints
from kdjax.training.parts.programs import optimizer_of

KILLS = int(os.environ.get("KDJAX_KILLS", "10"))
SEED = int(os.environ.get("KDJAX_KILL_SEED", "0"))
MOST_OF_A_RUN = 8  # random kills, after which it is let finish and compared

METHODS = {
    "teacher_forward": 'prefix="teacher", token_loss=kdjax.forward_kl',
    "teacher_reverse": 'prefix="teacher", token_loss=kdjax.reverse_kl',
    "student_forward": 'prefix="student", token_loss=kdjax.forward_kl',
    "student_reverse": 'prefix="student", token_loss=kdjax.reverse_kl',
    "rl": 'prefix="student", objective=kdjax.clipped_surrogate(0.2), rl=RL(group_size=4,'
    " reward=even_length)",
}
CONFIG = """
import kdjax
from kdjax.config import *

def even_length(prompt, response, answer):
    return float(len(response) % 2 == 0)

def get_config():
    return Config(
        student={student!r}, teacher={teacher!r}, {method},
        steps=6, batch_size=8, save_every_steps=2, log_every_steps=1,
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(
            lengths=(7, 8), entropy_threshold_share=0.5, measure_every_steps=2, heldout_problems=4
        ),
        evaluation=Evaluation(
            problems=4, samples=2, k=(1, 2), max_new_tokens=8, batch_size=8, every_steps=2,
            samples_during_training=1,
        ),
    )
"""
RUNS = [*((method, 1) for method in METHODS), ("student_reverse", 2), ("rl", 2)]
"""Methods, and by how many processes."""
SHARES = {1: len(METHODS), 2: 25}
"""Of KILLS random ones a run gets one in so many: two processes take several times as long."""
NAMED = {
    ("student_reverse", 1): [
        Kill("measurement"), Kill("rollout", 2), Kill("step", 3), Kill("save", 2), Kill("test"),
        Kill("retention"), Kill("evaluation"),
    ],
    ("teacher_forward", 1): [Kill("cache")],
    ("rl", 1): [Kill("rewards", 2)],
    ("student_reverse", 2): [Kill("save"), Kill("step", 2, process=1)],
}  # fmt: skip
"""One after the other in one run, each where the run gets to after the one before."""
STARTED_AGAIN = {-6, 134, 75}
"""What a process whose peer is gone ends with: JAX ends it, or it fails, or waits in vain."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Student and teacher of one layer and a few thousand parameters."""
    from kdjax.data.tasks.vocabulary import write_tokenizer
    from kdjax.data.tokenizer import load_tokenizer

    place = tmp_path_factory.mktemp("models")
    write_tokenizer(place)
    size, made = load_tokenizer(place).size, []
    for seed, width in enumerate((16, 24)):
        config = tiny_config(size, hidden_size=width, num_hidden_layers=1)
        made.append(place / f"model{seed}")
        models.create(made[-1], config, place, seed=seed)
    return str(made[0]), str(made[1])


def start(hash_seed: int) -> Server:
    return Server(
        hash_seed, JAX_NUM_CPU_DEVICES="1", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )


@pytest.fixture(scope="module")
def servers():
    """Two for runs that nothing happens to, and two with other hashes for those that are killed; a
    run has one of them for each of its processes."""
    with start(0) as first, start(0) as second, start(12345) as third, start(54321) as fourth:
        yield (first, second), (third, fourth)


class Command(NamedTuple):
    """`kdjax train` by so many processes."""

    file: Path
    folder: Path
    processes: int

    def run(
        self, name: str, servers: Sequence[Server], kill: Kill | None = None, seed: int = 0
    ) -> tuple[int, ...]:
        """Train in the folder of that name, with other global seeds -> each process's exit code."""
        place, port = self.folder / name, free_port()
        place.mkdir(exist_ok=True)
        args = ["train", str(self.file)]
        args += ["--run", str(place / "run"), "--cache", str(place / "cache")]
        used = servers[: self.processes]
        for process, server in enumerate(used):
            own = [*args, *flags_of(process, self.processes, port)]
            own_kill = kill if kill is not None and kill.process == process else None
            server.begin(own, self.log(process), own_kill, seed + process)
        return tuple(server.end() for server in used)

    def log(self, process: int) -> Path:
        return self.folder / f"log{process}.txt"

    def said(self) -> str:
        return "\n".join(self.log(process).read_text() for process in range(self.processes))


COMPARED = ("step", "state", "metrics", "evaluation")


def ending(config, run: Path) -> tuple[int, list[bytes], list[dict], dict]:
    """What is compared of a finished run: step, every bit of the state, metrics, evaluation."""
    _, params = models.load(config.student)
    checkpoints = open_checkpoints(run / "checkpoints")
    step = checkpoints.steps()[-1]
    state = checkpoints.restore(
        step,
        init_state(params, optimizer_of(config.curriculum, config.optimizer, timetable(config))),
    )
    checkpoints.close()
    metrics = [
        {k: v for k, v in record.items() if k not in ("seconds", "test_seconds")}
        for record in run_folder.read_metrics(run)
    ]
    evaluation = files.read_json(run / run_folder.EVALUATION)["report"]
    evaluation = {k: v for k, v in evaluation.items() if "seconds" not in k}
    return step, [np.asarray(x).tobytes() for x in jax.tree.leaves(state)], metrics, evaluation


def random_kill(rng: random.Random, processes: int) -> Kill:
    """A moment after a point that a run comes by: up to a second later, or a few milliseconds."""
    process, points = rng.randrange(processes), ["start", "loop", "rollout", "step", "test"]
    points += ["measurement", *(["save"] if process == 0 else [])]  # which the first commits
    point, after = rng.choice(points), rng.uniform(0.0, rng.choice((0.01, 0.1, 1.0)))
    return Kill(point, 1 if point in ("start", "loop") else rng.randint(1, 4), after, process)


@pytest.mark.parametrize(("method", "processes"), RUNS)
def test_killed_runs_end_as_the_undisturbed_one(
    method, processes, servers, folders, tmp_path, capsys
):
    """Every named kill happens, and random ones where the run does not end before; what is resumed
    each time, with other global seeds, ends with the same bits, metrics and evaluation. Of two
    processes one is killed, and the other ends with a code that schedulers start again on."""
    undisturbed, killing = servers
    file, random_kills = tmp_path / "config.py", KILLS // SHARES[processes]
    file.write_text(CONFIG.format(student=folders[0], teacher=folders[1], method=METHODS[method]))
    config, rng = load_file(str(file), "get_config"), random.Random(f"{SEED} {method} {processes}")
    command = Command(file, tmp_path, processes)
    assert set(command.run("whole", undisturbed)) == {0}, command.said()
    expected = ending(config, tmp_path / "whole" / "run")
    named, happened, runs = list(NAMED.get((method, processes), ())), 0, 0
    while named or happened < random_kills:
        name, kills, ended = f"killed{runs}", [], False
        while not ended:
            random_one = random_kill(rng, processes) if happened < random_kills else None
            kill = named.pop(0) if named else random_one if len(kills) < MOST_OF_A_RUN else None
            kills.append(kill)
            codes = command.run(name, killing, kill, rng.getrandbits(32))
            ended, context = -9 not in codes, f"{codes} {kills}\n{command.said()}"
            at_once = kill is not None and kill.after_seconds == 0
            assert not (ended and at_once), f"a named point was not reached: {context}"
            assert set(codes) <= ({0} if ended else {-9, *STARTED_AGAIN}), context
            happened += not ended and not at_once
        runs += 1
        found = ending(config, tmp_path / name / "run")
        for what, one, other in zip(COMPARED, expected, found, strict=True):
            assert one == other, f"{what} differs after {kills} (KDJAX_KILL_SEED={SEED})"
    with capsys.disabled():
        print(f"\n{method}, {processes}: {happened} random kills beside the named, {runs} runs")


def test_every_point_is_killed_at():
    """No named point is forgotten; the loop's begin is where random moments are counted from."""
    named = {kill.point for kills in NAMED.values() for kill in kills}
    assert named == {*FUNCTIONS, *FILES} - {"loop"}
