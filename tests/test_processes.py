"""Several processes are one run: on this machine, with JAX's collectives between them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from several import begin, finish, train_by
from test_train import final_state, logged

from kdjax import clipped_surrogate, forward_kl, models, processes, reverse_kl
from kdjax.base import ConfigError
from kdjax.command_line import join_processes
from kdjax.config import RL, Config, Curriculum, Data, Evaluation, Turn
from kdjax.data import batch_at, group_by_tag
from kdjax.parts import training_source
from kdjax.timetable import turn_at


@pytest.fixture(scope="module")
def several(tmp_path_factory, student_folder, teacher_folder) -> Config:
    """All three kinds of step (own responses, groups with rewards, the teacher's), a gate that
    rises, tests during training and an evaluation of several chunks, with numbers of problems that
    two or four do not divide."""
    return Config(
        cache=str(tmp_path_factory.mktemp("cache")),
        student=str(student_folder),
        teacher=str(teacher_folder),
        prefix="student",
        token_loss=reverse_kl,
        turns=(
            Turn(0.5, prefix="teacher", token_loss=forward_kl),
            Turn(0.25, objective=clipped_surrogate(0.2)),
        ),
        rl=RL(group_size=2, redraws=1),
        steps=4,
        batch_size=8,
        data=Data(terms=(2,), problems=21, max_prompt_tokens=24),
        curriculum=Curriculum((4, 8), 0.1, measure_every_steps=2, heldout_problems=5),
        evaluation=Evaluation(
            problems=5, samples=2, k=(1, 2), max_new_tokens=8, batch_size=4, every_steps=2
        ),
        save_every_steps=2,
        log_every_steps=1,
    )


@pytest.fixture(scope="module")
def runs(several, tmp_path_factory):
    """name -> (config, what each process said): one process; four, which restore its checkpoint;
    two, which restore both and go on from the middle of the run of four."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"one": (1, 4), "four": (4, 1), "two": (2, 2)}
    configs = {
        name: dataclasses.replace(several, run=str(folder / name), cache=str(folder / f"of {name}"))
        for name in names
    }
    said = {}
    for name, (count, devices) in names.items():
        if name == "two":
            shutil.copytree(folder / "four", folder / "two")
            shutil.rmtree(folder / "two" / "checkpoints" / "4")
        done = [folder / other for other in said]
        said[name] = configs[name], train_by(configs[name], count, devices, done)
    return said


def test_the_steps_are_of_every_kind(several):
    """The run that the others are compared with is what it is meant to be."""
    assert sorted(turn_at(several, step) for step in range(4)) == [0, 0, 1, 2]


def test_processes_are_one_run(runs):
    """Four processes train what one does, step by step, to float32 rounding: same losses, rewards,
    lengths, gate and tests, same evaluation; all processes know the same."""
    one, four = (logged(runs[name][0]) for name in ("one", "four"))
    assert [r["step"] for r in four] == [1, 2, 3, 4]
    for alone, together in zip(one, four, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert one[-1]["gate_length"] == 8
    states = [final_state(runs[name][0])[1] for name in ("one", "four")]
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=0, atol=2e-6)
    said = [own for name in ("one", "four") for own in runs[name][1]]
    assert {(own["avg"], tuple(own["tokens"])) for own in said} == {
        (said[0]["avg"], tuple(said[0]["tokens"]))
    }
    assert [own["devices"] for own in said] == [4] * 5


def test_checkpoints_are_of_no_number_of_processes(runs):
    """What one wrote four and two restore bit for bit, and one and two what four wrote; two go on
    from there and end where four ended."""
    ended = {name: final_state(runs[name][0])[1].params for name in ("one", "four", "two")}
    bits = {name: models.fingerprint(params) for name, params in ended.items()}
    assert [own["restored"] for own in runs["four"][1]] == [[bits["one"]]] * 4
    assert [own["restored"] for own in runs["two"][1]] == [[bits["one"], bits["four"]]] * 2
    chex.assert_trees_all_close(ended["two"], ended["four"], rtol=0, atol=2e-6)
    assert [r["step"] for r in logged(runs["two"][0])] == [1, 2, 3, 4]


def test_the_work_is_dealt_without_gap_or_overlap(runs):
    """Of every step each process draws its own block, and together they are the batch."""
    config, said = runs["four"]
    source = training_source(config)
    groups = group_by_tag(source, [""])
    for number in range(config.steps):
        whole = batch_at(groups, number, config.batch_size, config.seed)[1]
        rewarded = turn_at(config, number) == 2
        wanted = whole[: config.batch_size // 2] if rewarded else whole
        dealt = [[rows for step, rows in own["drawn"] if step == number] for own in said]
        assert [rows for own in dealt for (one,) in [own] for rows in one] == wanted


def test_what_is_written_once_is_written_by_the_first(runs):
    """The run folder of four holds what that of one does, each line once."""
    folders = [Path(runs[name][0].run) for name in ("one", "four")]
    listed = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert listed[0] == listed[1]
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in folders]
    texts = [[json.loads(line)["response"] for line in lines] for lines in samples]
    assert texts[0] == texts[1]
    assert "over 4 processes" in (folders[1] / "versions.json").read_text()


def test_a_lost_process_ends_the_others(several, tmp_path):
    """Killed in training, one process takes the other with it, within the heartbeat's time and a
    word that names it; the last checkpoint is whole, and one process goes on from it."""
    config = dataclasses.replace(
        several, run=str(tmp_path / "run"), turns=(), steps=2000, save_every_steps=2,
        evaluation=dataclasses.replace(several.evaluation, every_steps=0),
    )  # fmt: skip
    file = tmp_path / "config.py"
    file.write_text(
        "import json\nfrom kdjax.config_json import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({json.dumps(as_text(config))}))\n"
    )
    started = begin(["-m", "kdjax", "train", str(file)], 2, 1)
    limit = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoints" / "4").is_dir():
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in started), finish(started)[0]
        time.sleep(0.2)
    started[1].kill()
    killed = time.monotonic()
    (code, _, err), (lost, *_) = finish(started, processes.HEARTBEAT_SECONDS + 60)
    assert time.monotonic() - killed < processes.HEARTBEAT_SECONDS + 30
    assert code not in (0, None)
    assert lost == -9
    assert "another process of this run is gone" in err
    assert "/task:1" in err or "Task 1" in err or "Task: 1" in err
    step, state, _ = final_state(config)
    assert step >= 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def as_text(config: Config) -> str:
    from kdjax.config_json import as_dict

    return json.dumps(as_dict(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "here:1"], "got --coordinator here:1"),
        (["--distributed", "--process", "0"], "--coordinator HOST:PORT"),
        (["--coordinator=here:1", "--processes", "two", "--process", "0"], "--processes two"),
        (["--coordinator=here:1", "--processes", "2", "--process"], "--process"),
    ],
)
def test_flags_that_cannot_be(arguments, message):
    """Half of the flags, both ways at once, or no numbers: one line."""
    with pytest.raises(ConfigError, match="several processes are --distributed") as caught:
        join_processes("train", ["--steps", "3", *arguments])
    assert message in str(caught.value)


def test_flags_belong_to_runs(monkeypatch):
    """Commands of one process say so, other arguments stay, and tasks of Slurm that would all train
    the same run are refused."""
    assert join_processes("train", ["a", "--steps=3"]) == ["a", "--steps=3"]
    with pytest.raises(ConfigError, match="kdjax study is of one process"):
        join_processes("study", ["--distributed"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"one of 2 tasks .* add --distributed"):
        join_processes("train", [])
    assert join_processes("evaluate", []) == []


def test_a_share_is_a_block(monkeypatch):
    """Shares are in order, without gap or overlap, and differ by one row at most."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for total in (0, 3, 4, 10):
        shares = []
        for index in range(4):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            shares.append(processes.share(total))
        assert np.concatenate(shares).tolist() == list(range(total))
        sizes = {len(own) for own in shares}
        assert max(sizes) - min(sizes) <= 1
