"""kill -9 at every named point and at random moments: the run resumes, and ends as if nothing had
been.

KDJAX_KILLS=500 is the release form (docs/reliability.md); KDJAX_KILL_SEED begins elsewhere.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config
from killed import FILES, FUNCTIONS, Kill, Server

from kdjax import models, report
from kdjax.checkpoint import open_checkpoints
from kdjax.command_line import load_file
from kdjax.step import init_state
from kdjax.student import optimizer_of

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
NAMED = {
    "student_reverse": [
        Kill("measurement"), Kill("rollout", 2), Kill("step", 3), Kill("save", 2), Kill("test"),
        Kill("retention"), Kill("evaluation"),
    ],
    "teacher_forward": [Kill("cache")],
    "rl": [Kill("rewards", 2)],
}  # fmt: skip
"""One after the other in one run, each where the run gets to after the one before."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Student and teacher of one layer and a few thousand parameters."""
    from kdjax.tasks.vocabulary import write_tokenizer
    from kdjax.tokenizer import load_tokenizer

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
    """One for runs that nothing happens to, and one with other hashes for those that are killed."""
    with start(0) as undisturbed, start(12345) as killing:
        yield undisturbed, killing


COMPARED = ("step", "state", "metrics", "evaluation")


def ending(config, run: Path) -> tuple[int, list[bytes], list[dict], dict]:
    """What is compared of a finished run: step, every bit of the state, metrics, evaluation."""
    _, params = models.load(config.student)
    checkpoints = open_checkpoints(run / "checkpoints")
    step = checkpoints.steps()[-1]
    state = checkpoints.restore(step, init_state(params, optimizer_of(config)))
    checkpoints.close()
    metrics = [
        {k: v for k, v in record.items() if k not in ("seconds", "test_seconds")}
        for record in report.read_metrics(run)
    ]
    evaluation = report.read_json(run / report.EVALUATION)["report"]
    evaluation = {k: v for k, v in evaluation.items() if "seconds" not in k}
    return step, [np.asarray(x).tobytes() for x in jax.tree.leaves(state)], metrics, evaluation


def random_kill(rng: random.Random) -> Kill:
    """A moment after a point that a run comes by: up to a second later, or a few milliseconds."""
    point = rng.choice(("start", "loop", "rollout", "step", "test", "save", "measurement"))
    after = rng.uniform(0.0, rng.choice((0.01, 0.1, 1.0)))
    return Kill(point, 1 if point in ("start", "loop") else rng.randint(1, 4), after)


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_as_the_undisturbed_one(method, servers, folders, tmp_path, capsys):
    """Every named kill happens, and random ones where the run does not end before; what is resumed
    each time, with other global seeds, ends with the same bits, metrics and evaluation."""
    undisturbed, killing = servers
    file, log = tmp_path / "config.py", tmp_path / "log.txt"
    file.write_text(CONFIG.format(student=folders[0], teacher=folders[1], method=METHODS[method]))
    config, rng = load_file(str(file), "get_config"), random.Random(f"{SEED} {method}")

    def command(name: str) -> list[str]:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        return ["train", str(file), "--run", str(place / "run"), "--cache", str(place / "cache")]

    assert undisturbed.run(command("whole"), log) == 0, log.read_text()
    expected = ending(config, tmp_path / "whole" / "run")
    named, happened, runs = list(NAMED.get(method, ())), 0, 0
    while named or happened < KILLS // len(METHODS):
        name, kills, ended = f"killed{runs}", [], False
        while not ended:
            random_one = random_kill(rng) if happened < KILLS // len(METHODS) else None
            kill = named.pop(0) if named else random_one if len(kills) < MOST_OF_A_RUN else None
            kills.append(kill)
            code = killing.run(command(name), log, kill, rng.getrandbits(32))
            ended = code == 0
            must_die = kill is not None and kill.after_seconds == 0
            assert code == (-9 if must_die or not ended else 0), f"{kills}\n{log.read_text()}"
            happened += not ended and not must_die
        runs += 1
        found = ending(config, tmp_path / name / "run")
        for what, one, other in zip(COMPARED, expected, found, strict=True):
            assert one == other, f"{what} differs after {kills} (KDJAX_KILL_SEED={SEED})"
    with capsys.disabled():
        print(f"\n{method}: {happened} random kills beside the named, {runs} runs")


def test_every_point_is_killed_at():
    """No named point is forgotten; the loop's begin is where random moments are counted from."""
    named = {kill.point for kills in NAMED.values() for kill in kills}
    assert named == {*FUNCTIONS, *FILES} - {"loop"}
