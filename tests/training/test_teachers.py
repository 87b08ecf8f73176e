"""Several teachers by tag: each step is the single-teacher step, turns are fair, runs resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from release import by_default
from runs import (
    assert_bitwise_equal,
    assert_interrupted_equals_uninterrupted,
    final_state,
    logged,
    write_problems,
)

from kdjax import models
from kdjax.base import Problem
from kdjax.config import Config, Curriculum, Data, Evaluation, Layout
from kdjax.data.batches import Source, batch_at, file_source, group_by_tag, index_at, task_source
from kdjax.errors import ConfigError, DataError, PreemptedError
from kdjax.models import flops
from kdjax.sharding import shard_batch
from kdjax.storage import run_folder
from kdjax.training import loop as train_module
from kdjax.training.evaluation import _scorer
from kdjax.training.parts import startup
from kdjax.training.parts.build import build, fresh_state, rows_needed
from kdjax.training.parts.problems import encode


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder, other_folder) -> Config:
    """Four steps of 8 rows on 36 problems, 24 of tag add and 12 of tag sub."""
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), student=str(student_folder),
        teacher=None, teachers=(f"add={teacher_folder}", f"sub={other_folder}"),
        steps=4, batch_size=8, save_every_steps=2, log_every_steps=1,
        data=Data(file=write_problems(tmp_path / "train.jsonl", 36), max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(
            file=write_problems(tmp_path / "test.jsonl", 6),
            samples=1, k=(1,), max_new_tokens=8, batch_size=8,
        ),
    )  # fmt: skip


def alone(config: Config, tag: str) -> Config:
    """The config with this tag's teacher for every problem."""
    (model,) = [text.partition("=")[2] for text in config.teachers if text.startswith(tag)]
    return dataclasses.replace(config, teacher=model, teachers=(), cache=config.cache + tag)


def tagged(counts: dict[str, int]) -> Source:
    problems = [Problem(f"{t}/{i}", "1", "1", None, t) for t, n in counts.items() for i in range(n)]
    return Source(len(problems), lambda index: problems[index], "list")


def test_turns_are_in_proportion():
    """After any number of batches each tag has had its share of them, to within one; after a round
    (here 7 batches), exactly."""
    counts = {"a": 40, "b": 10, "c": 20}
    groups = group_by_tag(tagged(counts), list(counts))
    turns = [batch_at(groups, number, 5, seed=1)[0] for number in range(70)]
    for done in range(1, 71):
        so_far = Counter(turns[:done])
        for tag, count in counts.items():
            off = abs(so_far[tag] - done * count / 70)
            assert off < 1e-9 if done % 7 == 0 else off < 1


def test_equal_shares_take_turns():
    """One after the other, however many problems each has; a tag's own batches are those of shares
    by problems, in the same order."""
    counts = {"a": 40, "b": 10, "c": 20}
    groups = group_by_tag(tagged(counts), list(counts))
    turns = [batch_at(groups, number, 5, seed=1, equal=True) for number in range(30)]
    assert [tag for tag, _ in turns] == ["a", "b", "c"] * 10
    by_problems = [batch_at(groups, number, 5, seed=1) for number in range(70)]
    for tag in counts:
        own, others = ([rows for t, rows in each if t == tag] for each in (turns, by_problems))
        assert own == others[:10]


def test_shares_of_tags_are_logged(tiny, tmp_path, monkeypatch):
    """Of updates, response tokens and loss so far, by hand from each step's record; whatever is
    logged between, and over a stop; with equal shares each tag takes every other step."""
    tiny = dataclasses.replace(tiny, teacher_shares="equal")
    train_module.train(tiny)
    records, tags = logged(tiny), ["add", "sub", "add", "sub"]
    for done, record in enumerate(records, start=1):
        for name, of in (("updates", None), ("tokens", "response_tokens"), ("loss", "loss")):
            values = [1.0 if of is None else r[of] for r in records[:done]]
            for tag in ("add", "sub"):
                own = sum(v for v, t in zip(values, tags, strict=False) if t == tag)
                assert record[f"{name}_of/{tag}"] == pytest.approx(own / sum(values), rel=1e-6)
    rare = dataclasses.replace(
        tiny, run=str(tmp_path / "rare"), log_every_steps=4, save_every_steps=4
    )
    update, steps = train_module._update, []

    def told_to_stop(*args):
        steps.append(args[2])
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_update", told_to_stop)
        with pytest.raises(PreemptedError):
            train_module.train(rare)
    train_module.train(rare)
    last = {name: value for name, value in records[-1].items() if "_of/" in name}
    assert {name: logged(rare)[-1][name] for name in last} == last
    assert_bitwise_equal(jax.device_get(final_state(rare)[1]), jax.device_get(final_state(tiny)[1]))


def test_an_epoch_of_a_tag_is_a_permutation():
    """Batches hold one tag; a tag's batches, in order, go through all its problems once an epoch,
    otherwise in each epoch, for each seed and for each tag."""
    counts = {"a": 24, "b": 24}
    groups = group_by_tag(tagged(counts), list(counts))
    streams: dict = {(tag, seed): [] for tag in counts for seed in (0, 1)}
    for seed in (0, 1):
        for number in range(16):
            tag, rows = batch_at(groups, number, 6, seed)
            assert set(rows) <= set(groups[tag].tolist())
            streams[tag, seed] += [row - groups[tag][0] for row in rows]
    epochs = [stream[i : i + 24] for stream in streams.values() for i in (0, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) == 8


def test_one_teacher_reads_the_stream_as_it_is():
    """With the tag "" alone, problems' own tags are not looked at, and batch n is positions n B on
    of the one stream."""
    source = tagged({"a": 5, "b": 8})
    groups = group_by_tag(source, [""])
    for number in range(7):
        positions = range(4 * number, 4 * number + 4)
        wanted = [index_at(source.size, p, 3, batch_size=4) for p in positions]
        assert batch_at(groups, number, 4, seed=3) == ("", wanted)


def test_the_tag_column(tmp_path):
    """Text of any kind; a missing value or column is the empty tag; tasks have none."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "1", "answer": "1", "tag": tag} for tag in ("a b", None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [file_source(path).problem(i).tag for i in range(2)] == ["a b", ""]
    bare = write_problems(tmp_path / "q.jsonl", 1, tags=None)
    assert file_source(bare).problem(0).tag == ""
    assert task_source("calc", "train", 1, (2,)).problem(0).tag == ""


def test_steps_are_those_of_single_teachers(tiny):
    """The run equals, bit for bit, stepping by hand: a batch of a tag with the step of a run that
    has this teacher alone, on the same rollouts."""
    train_module.train(tiny)
    parts = build(tiny)
    singles = {tag: build(alone(tiny, tag)) for tag in ("add", "sub")}
    state, taught, metrics = fresh_state(parts), [], []
    for number in range(tiny.steps):
        tag, rows = batch_at(parts.problems.groups, number, 8, tiny.seed)
        taught.append(tag)
        assert {parts.problems.source.problem(row).tag for row in rows} == {tag}
        rollout = train_module._rollout(parts, state, number)
        (teacher,) = singles[tag].teachers.values()
        state, values = teacher.programs.steps[0](
            state, teacher.params, rollout, jnp.float32(np.nan), None
        )
        metrics.append(float(values["loss"]))
    assert taught == ["add", "sub", "add", "add"]
    assert_bitwise_equal(jax.device_get(state), jax.device_get(final_state(tiny)[1]))
    assert [record["loss"] for record in logged(tiny)] == metrics


@pytest.mark.release
def test_interrupted_equals_uninterrupted(tiny, tmp_path, monkeypatch):
    """Stopped within a round of turns and resumed: the same bits, with teachers' trajectories."""
    whole = dataclasses.replace(tiny, prefix="teacher")
    result = assert_interrupted_equals_uninterrupted(whole, tmp_path, monkeypatch)
    about = final_state(whole)[2]
    assert {"teacher add", "teacher sub"} <= set(about["identities"])
    swapped = dataclasses.replace(whole, teachers=whole.teachers[::-1])
    with pytest.raises(ConfigError, match="was started with another config: teachers: "):
        train_module.train(swapped)
    assert result.training_flops == pytest.approx(flops_by_hand(whole), rel=1e-12)


def flops_by_hand(config: Config) -> float:
    """Three steps with the first teacher, one with the second, each at its own length."""
    parts = build(config)
    prompt = np.mean([len(parts.tokenizer.encode_prompt(f"{n}+1=")) for n in range(36)])
    total = 0.0
    for record in run_folder.read_metrics(Path(config.run)):
        tag, new = parts.problems.batch_at(int(record["step"]) - 1)[0], record["response_length"]
        teacher = models.read_config(parts.teachers[tag].role.folder)
        sizes = (8 * prompt, 8 * new, prompt + new)
        total += sum(flops.student(parts.roles.student.shape, *sizes))
        total += 2 * flops.response(teacher, *sizes)
    return total


def test_trajectories_are_of_the_tag_s_teacher(tiny):
    """The responses for a tag's problems are those that its teacher gives in a run of its own."""
    config = dataclasses.replace(tiny, prefix="teacher")
    parts = build(config)
    for tag in parts.problems.groups:
        single = build(alone(config, tag))
        both = np.intersect1d(rows_needed(parts, tag), rows_needed(single, ""))[[1, 0]]
        batch = encode(
            parts.problems.source, parts.tokenizer, both, config.data.max_prompt_tokens, 8
        )
        found, wanted = (
            p(batch, None, None, 8)
            for p in (
                parts.responses.sources["teacher"][tag],
                single.responses.sources["teacher"][""],
            )
        )
        for ours, theirs in zip(found, wanted, strict=True):
            if ours is not None:  # other rows beside them: other rounding of log-probabilities
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
    kept = (Path(config.cache) / "trajectories").glob("*/settings.json")
    settings = [json.loads(path.read_text()) for path in kept]
    assert sorted(s["tag"] for s in settings) == ["add", "sub"]
    assert len({s["weights"] for s in settings}) == 2


def test_evaluation_scores_each_problem_against_its_teacher(tiny):
    """Rows of both tags in one batch have the KLs of the run with that tag's teacher alone."""
    parts = build(tiny)
    source = file_source(tiny.evaluation.file)
    problems = [0, 1, 2, 3, 4, 5, 5, 5]
    rollout = rollout_of(parts, source, problems)
    mixed = _scorer(parts, parts.student.trained, source)(rollout, problems)
    for tag in ("add", "sub"):
        single = build(alone(tiny, tag))
        scores = _scorer(single, single.student.trained, source)(rollout, problems)
        own = [row for row, p in enumerate(problems) if source.problem(p).tag == tag]
        for name in ("forward_kl", "reverse_kl", "student_logp", "teacher_logp"):
            ours, theirs = (np.asarray(getattr(s, name)) for s in (mixed, scores))
            np.testing.assert_array_equal(ours[own], theirs[own])
            if name == "forward_kl":
                assert (np.delete(ours, own, axis=0) != np.delete(theirs, own, axis=0)).any()


def rollout_of(parts, source, problems):
    batch = encode(source, parts.tokenizer, problems, parts.config.data.max_prompt_tokens, 8)
    batch = shard_batch(batch, parts.mesh)
    return parts.responses.sources[parts.config.prefix]["add"](
        batch, parts.sampler_params(parts.student.trained), jax.random.key(0), 8
    )


def test_problems_without_a_teacher_have_no_kl(tiny, tmp_path, capsys):
    """Test problems without tags: KLs are left out of the report, and that is said."""
    bare = write_problems(tmp_path / "bare.jsonl", 6, tags=None)
    evaluation = dataclasses.replace(tiny.evaluation, file=bare)
    result = train_module.train(dataclasses.replace(tiny, evaluation=evaluation))
    assert result.forward_kl is None
    assert result.reverse_kl is None
    assert result.entropy > 0
    assert "no KL to a teacher, as problems have the tags [''] of none" in capsys.readouterr().out


def test_the_start_is_reported_for_each_teacher(tiny):
    """A line for each tag; sizes, tokenizers and self-tests of each model once."""
    third = tiny.teachers[0].replace("add", "bdd", 1)
    config = dataclasses.replace(tiny, teachers=(*tiny.teachers, third))
    path = Path(config.data.file)
    path.write_text(path.read_text() + path.read_text().replace('"add"', '"bdd"'))
    parts = build(config)
    said = startup.report(parts).splitlines()
    add, sub = (text.partition("=")[2] for text in tiny.teachers)
    assert said[:3] == [
        f"teacher add: {add}, for 24 problems",
        f"teacher sub: {sub}, for 12 problems",  # its repeated rows count once
        f"teacher bdd: {add}, for 24 problems",
    ]
    assert parts.teachers["add"] is parts.teachers["bdd"]
    tests = [line for line in said if line.startswith("self-test: ")]
    assert tests == [
        f"self-test: the teacher {t} as its own student has KL 0" for t in ("add", "sub")
    ]
    assert sum("agree id by id" in line for line in said) == 2


def test_what_does_not_fit_together_is_refused(tiny, tmp_path):
    """Tags and teachers must match, and every tag must fill a batch."""

    def build_with(**changes):
        return build(dataclasses.replace(tiny, **changes))

    with pytest.raises(
        DataError, match=r"train\.jsonl/1 has the tag 'sub', and teachers have \['add'\]"
    ):
        build_with(teachers=tiny.teachers[:1])
    extra = (*tiny.teachers, tiny.teachers[0].replace("add", "mul", 1))
    with pytest.raises(ConfigError, match="no training problem has the tag 'mul'"):
        build_with(teachers=extra)
    with pytest.raises(ConfigError, match="16 is over the 12 training problems of tag 'sub'"):
        build_with(batch_size=16)
    with pytest.raises(DataError, match="calc/train/0 has the tag '', and teachers have"):
        build_with(data=dataclasses.replace(tiny.data, file=None, max_prompt_tokens=28))


def test_each_teacher_s_tokenizer_is_checked(tiny, tmp_path, other_folder):
    """The second teacher's tokenizer is compared with the student's like the first one's."""
    shutil.copytree(other_folder, tmp_path / "foreign")
    path = tmp_path / "foreign" / "tokenizer.json"
    path.write_text(path.read_text().replace("<think>", "<thunk>"))
    with pytest.raises(ConfigError, match="tokenizers differ"):
        build(dataclasses.replace(tiny, teachers=(tiny.teachers[0], f"sub={tmp_path / 'foreign'}")))


@pytest.mark.parametrize(
    ("apart", "rows", "micro_batches"), by_default([(2, 24, 2), (4, 8, 1)], (2, 24, 2))
)
def test_a_teacher_on_its_own_devices_gives_the_same_step(tiny, apart, rows, micro_batches):
    """A step on 6 + 2 or on 4 + 4 devices has the metrics and gradients of that on 8, to rounding;
    student and teacher lie on devices of their own."""
    write_problems(Path(tiny.data.file), 96)
    shared = dataclasses.replace(tiny, batch_size=rows, prefix="dataset")
    layout = Layout(fsdp=2, teacher_devices=apart)
    split = dataclasses.replace(shared, layout=layout, micro_batches=micro_batches)
    one, other = step_of(build(shared)), step_of(parts := build(split))
    assert one[1]["loss"] > 1e-4
    for name, value in one[1].items():
        np.testing.assert_allclose(other[1][name], value, rtol=1e-4, err_msg=name)
    for ours, theirs in zip(*map(jax.tree.leaves, (other[0], one[0])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    trees = (parts.programs.student.state.params, parts.teachers["add"].params)
    held = [jax.tree.leaves(tree)[0].sharding.device_set for tree in trees]
    assert [len(devices) for devices in held] == [8 - apart, apart]
    assert not held[0] & held[1]


def step_of(parts):
    """(optimizer state, metrics) after the first step, on the host."""
    state, teacher = fresh_state(parts), parts.teachers["add"]
    assert batch_at(parts.problems.groups, 0, 1, 0)[0] == "add"
    rollout = teacher.programs.read(teacher.params, train_module._rollout(parts, state, 0))
    nan = jnp.float32(np.nan)
    state, values = teacher.programs.steps[0](state, teacher.given, rollout, nan, None)
    return jax.device_get((state.opt_state, values))


@pytest.mark.release
def test_a_run_with_a_teacher_on_its_own_devices(tiny):
    """Teacher trajectories, training and evaluation agree with the shared mesh's, to rounding."""
    shared = dataclasses.replace(alone(tiny, "sub"), prefix="teacher", steps=2)
    layout = Layout(teacher_devices=4)
    split = dataclasses.replace(shared, run=tiny.run + "2", cache=tiny.cache + "2", layout=layout)
    results = [train_module.train(config) for config in (shared, split)]
    for ours, theirs in zip(logged(split), logged(shared), strict=True):
        assert ours.pop("warnings", []) == theirs.pop("warnings", [])
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)  # entropy_excess: a difference
    assert results[1].forward_kl == pytest.approx(results[0].forward_kl, rel=1e-4)
    assert "teacher's devices: 4 more" in (Path(split.run) / run_folder.STARTUP).read_text()


def test_devices_that_do_not_divide_are_refused(tiny):
    """The teacher's devices must leave some, and rows must divide over both parts."""
    for apart, says in ((8, "leaves none of 8 devices"), (3, "the teacher's 3 devices")):
        with pytest.raises(ConfigError, match=says):
            build(dataclasses.replace(tiny, layout=Layout(teacher_devices=apart)))
    with pytest.raises(ConfigError, match="8 rows, which can't be sharded over 7 devices"):
        build(dataclasses.replace(tiny, layout=Layout(teacher_devices=1)))
