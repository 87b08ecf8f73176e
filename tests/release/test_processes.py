"""Several processes are one run: on this machine, with JAX's collectives between them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from runs import final_state, logged
from several import begin, finish, free_port, train_by

from kdjax import clipped_surrogate, forward_kl, reverse_kl
from kdjax.config import RL, Config, Curriculum, Data, Evaluation, Turn
from kdjax.config.overrides import join_processes
from kdjax.config.timetable import timetable
from kdjax.data.batches import batch_at, group_by_tag
from kdjax.errors import ConfigError, RendezvousError
from kdjax.runtime import processes
from kdjax.storage.fingerprint import fingerprint
from kdjax.storage.restore import saved_steps
from kdjax.training.parts.problems import training_source


@pytest.fixture(scope="module")
def several(tmp_path_factory, student_folder, teacher_folder) -> Config:
    """All three kinds of step (own responses, groups with rewards, the teacher's), a gate and an
    evaluation, with numbers of problems that two or four don't divide."""
    return Config(
        cache=str(tmp_path_factory.mktemp("cache")),
        student=str(student_folder),
        teacher=str(teacher_folder),
        prefix="student",
        token_loss=reverse_kl,
        turns=(
            Turn(0.67, prefix="teacher", token_loss=forward_kl),
            Turn(0.4, objective=clipped_surrogate(0.2)),
        ),
        rl=RL(group_size=2, redraws=1),
        steps=3,
        batch_size=8,
        data=Data(terms=(2,), problems=21, max_prompt_tokens=24),
        curriculum=Curriculum((8, 9), 100.0, measure_every_steps=2, heldout_problems=5),
        evaluation=Evaluation(problems=5, samples=2, k=(1, 2), max_new_tokens=8, batch_size=4),
        save_every_steps=2,
        log_every_steps=1,
    )


@pytest.fixture(scope="module")
def runs(several, tmp_path_factory):
    """name -> (config, what each process said): one process; four, which go on from the middle of
    its run; two, which restore both, and train a run of their own."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"one": (1, 4), "four": (4, 1), "two": (2, 2)}
    configs = {
        name: dataclasses.replace(several, run=str(folder / name), cache=str(folder / f"of {name}"))
        for name in names
    }
    said = {}
    for name, (count, devices) in names.items():
        if name == "four":
            shutil.copytree(folder / "one", folder / "four")
            shutil.rmtree(folder / "four" / "checkpoints" / "3")
        done = [folder / other for other in said]
        said[name] = configs[name], train_by(configs[name], count, devices, done)
    return said


def test_the_steps_are_of_every_kind(several):
    """The run that the others are compared with is what it is meant to be."""
    assert sorted(timetable(several).turn_at(step) for step in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_are_one_run(runs, name):
    """Several processes train what one does, step by step, to float32 rounding, from the start or
    from its checkpoint on: same losses, rewards, lengths, gate, same evaluation; all of
    them know the same."""
    one, several = (logged(runs[each][0]) for each in ("one", name))
    assert [r["step"] for r in several] == [1, 2, 3]
    for alone, together in zip(one, several, strict=True):
        assert alone.keys() == together.keys()
        assert alone.pop("warnings", []) == together.pop("warnings", [])
        for field, value in alone.items():
            np.testing.assert_allclose(together[field], value, rtol=2e-5, atol=1e-6, err_msg=field)
    assert sum("heldout_entropy" in r for r in one) == 1
    assert sum("reward" in r for r in one) == 1
    states = [final_state(runs[each][0])[1] for each in ("one", name)]
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=0, atol=2e-6)
    said = [own for each in ("one", name) for own in runs[each][1]]
    first = said[0]["avg"], said[0]["tokens"]
    assert [(own["avg"], own["tokens"]) for own in said] == [first] * len(said)
    assert {own["devices"] for own in said} == {4}


def test_checkpoints_are_of_no_number_of_processes(runs):
    """What one and four processes wrote two restore bit for bit, and one what four wrote."""
    bits = {name: fingerprint(final_state(runs[name][0])[1].params) for name in runs}
    assert [own["restored"] for own in runs["two"][1]] == [[bits["one"], bits["four"]]] * 2


def test_the_work_is_dealt_without_gap_or_overlap(runs):
    """Of every step each process draws its own block, and together they are the batch."""
    config, said = runs["two"]
    source = training_source(config.data, timetable(config))
    groups = group_by_tag(source, [""])
    for number in range(config.steps):
        whole = batch_at(groups, number, config.batch_size, config.seed)[1]
        rewarded = timetable(config).turn_at(number) == 2
        wanted = whole[: config.batch_size // 2] if rewarded else whole
        dealt = [rows for own in said for step, rows in own["drawn"] if step == number]
        assert [row for rows in dealt for row in rows] == wanted
        assert len(dealt) == 2


def test_what_is_written_once_is_written_by_the_first(runs):
    """The run folder of two holds what that of one does, each line once."""
    folders = [Path(runs[name][0].run) for name in ("one", "two")]
    listed = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert listed[0] == listed[1]
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in folders]
    texts = [[json.loads(line)["response"] for line in lines] for lines in samples]
    assert texts[0] == texts[1]
    assert "over 2 processes" in (folders[1] / "versions.json").read_text()


def test_two_processes_stop_together(several, tmp_path):
    """SIGTERM to one: both finish the same step, save it and exit with 85, and the same command
    goes on. One killed: the other ends within the heartbeat's time, with a word that names it, and
    the last checkpoint is whole. The first profiled two steps, which waited for the other."""
    config = dataclasses.replace(
        several, run=str(tmp_path / "run"), turns=(), steps=2000, save_every_steps=2
    )
    file = tmp_path / "config.py"
    file.write_text(
        "import json\nfrom kdjax.config.as_json import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({json.dumps(as_text(config))}))\n"
    )
    started = training(file, config, 4)
    started[1].terminate()
    ended = finish(started)
    assert [code for code, *_ in ended] == [85, 85], ended
    stopped, state, _ = final_state(config)
    for _, _, err in ended:
        assert f"stopped after step {stopped} of 2000, which is saved" in err
    profiled = json.loads((Path(config.run) / "profile" / "steps.json").read_text())
    assert [step["number"] for step in profiled] == [3, 4]
    started = training(file, config, stopped + 2)
    started[1].kill()
    killed = time.monotonic()
    (code, _, err), (lost, *_) = finish(started, processes.HEARTBEAT_SECONDS + 60)
    assert time.monotonic() - killed < processes.HEARTBEAT_SECONDS + 30
    assert code not in (0, None)
    assert lost == -9
    assert re.search(r"Task:? 1 heartbeat timeout|stopped sending heartbeats\):\n1\n", err), err
    step, state, _ = final_state(config)
    assert step > stopped
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


TRAIN = ("-m", "kdjax", "train")


def training(file: Path, config: Config, until: int) -> list[subprocess.Popen]:
    """Two processes that train and profile, once they have saved a step from `until` on."""
    started, limit = begin([*TRAIN, str(file), "--profile=2"], 2, 1), time.monotonic() + 400
    while not any(step >= until for step in saved_steps(Path(config.run) / "checkpoints")):
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in started), finish(started)[0]
        time.sleep(0.2)
    return started


def as_text(config: Config) -> str:
    from kdjax.config.as_json import as_dict

    return json.dumps(as_dict(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "here:1"], "got --coordinator here:1"),
        (["--distributed", "--process", "0"], "--coordinator HOST:PORT"),
        (["--coordinator=here:1", "--processes", "two", "--process", "0"], "--processes two"),
        (["--coordinator=here:1", "--processes", "2", "--process"], "--process"),
        (["--coordinator=here", "--processes", "2", "--process", "0"], "--coordinator here "),
        (["--coordinator=here:1", "--processes", "2", "--process", "2"], "--process 2"),
        (["--coordinator=here:65536", "--processes", "2", "--process", "0"], "here:65536"),
    ],
)
def test_flags_that_cannot_be(arguments, message):
    """Half of the flags, both ways at once, or no numbers: one line."""
    with pytest.raises(ConfigError, match="several processes are --distributed") as caught:
        join_processes("train", ["--steps", "3", *arguments])
    assert message in str(caught.value)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_for_others_gives_up(process):
    """With or without a coordinator there: one line that says what to do, and code 75, in time."""
    call = f"processes.start('127.0.0.1:{free_port()}', 2, {process}, wait_seconds=2)"
    program, began = f"from kdjax.runtime import processes; {call}", time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert time.monotonic() - began < 60
    assert ended.returncode == RendezvousError.exit_code, ended.stderr
    waiting, late = ended.stderr.strip().splitlines()
    assert "waiting for all processes of this run at 127.0.0.1:" in waiting
    assert re.fullmatch(r"kdjax: not all processes .* within 2 s; start all of them, .*", late)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_where_the_first_cannot_listen(host):
    """A port that is taken, and an address of another machine: one line, before anyone waits."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(RendezvousError, match=f"process 0 can't listen at {address} .* free"):
            processes.start(address, 2, 0)


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
