"""The whole of a run: trains, resumes bit for bit, refuses what would corrupt it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from release import by_default
from runs import (
    CELLS,
    assert_bitwise_equal,
    assert_interrupted_equals_uninterrupted,
    even_digits,
    final_state,
    logged,
    padded,
)

from kdjax import (
    clipped_surrogate,
    extrapolated,
    forward_kl,
    mix,
    models,
    policy_gradient,
    reverse_kl,
)
from kdjax.config import RL, Checkpointing, Faults, Rollouts, Turn
from kdjax.config.timetable import timetable
from kdjax.errors import (
    BusyError,
    ConfigError,
    DataError,
    DivergedError,
    EngineError,
    PreemptedError,
    StorageError,
)
from kdjax.evaluate import mean_entropy
from kdjax.export import load_run
from kdjax.losses.objectives import negative_log_likelihood
from kdjax.losses.trial import TOKENS
from kdjax.runtime.console import announce
from kdjax.sharding import make_mesh
from kdjax.step.gate import DECISIONS
from kdjax.step.optimizer import gate_state, guard_state
from kdjax.step.update import init_state, make_step
from kdjax.storage import run_folder
from kdjax.storage.checkpoints import open_checkpoints
from kdjax.storage.hold import hold
from kdjax.storage.restore import read_params, saved_steps
from kdjax.training import loop as train_module
from kdjax.training.parts import build as parts_module
from kdjax.training.parts.programs import optimizer_of


@pytest.mark.parametrize(
    ("prefix", "token_loss"),
    by_default(CELLS, ("student", forward_kl)),
    ids=lambda x: getattr(x, "__name__", x),
)
def test_interrupted_equals_uninterrupted(tiny, tmp_path, monkeypatch, prefix, token_loss):
    """In each of the four cells, with another cache."""
    whole = dataclasses.replace(tiny, prefix=prefix, token_loss=token_loss)
    assert_interrupted_equals_uninterrupted(whole, tmp_path, monkeypatch)


def with_a_reference(config):
    """Every second step amplifies what the student has learned since it was its reference."""
    amplified = policy_gradient(extrapolated(2.0))
    turn = Turn(share=0.5, prefix="student", objective=amplified)
    return dataclasses.replace(
        config, prefix="dataset", turns=(turn,), reference=config.student, rollouts=Rollouts()
    )


@pytest.mark.release
def test_turns_are_resumed(tiny, tmp_path, monkeypatch):
    """Interrupted equals uninterrupted, where steps of two methods take turns."""
    assert_interrupted_equals_uninterrupted(with_a_reference(tiny), tmp_path, monkeypatch)


def test_turns_and_a_reference(tiny):
    """Steps of two methods, one of which asks a reference model: each step is of its own turn, and
    the reference is part of the run's identity."""
    whole = with_a_reference(tiny)
    train_module.train(whole)
    turns = [timetable(whole).turn_at(step) for step in range(4)]
    assert turns == [0, 1, 0, 1]
    assert ["sampler_gap" in record for record in logged(whole)] == [t == 1 for t in turns]
    first = logged(whole)[0]  # the student is its reference at its start: the same log-probability
    assert first["reference_logp"] == pytest.approx(first["student_logp"], abs=1e-6)
    assert "reference" in final_state(whole)[2]["identities"]
    other = dataclasses.replace(whole, reference=tiny.teacher)
    with pytest.raises(ConfigError, match="reference: "):
        train_module.train(other)


@pytest.mark.parametrize(
    ("policy", "threshold", "made"),
    [
        pytest.param(
            "stop", {"entropy_threshold_nats": 0.1}, {3: "rise"}, marks=pytest.mark.release
        ),
        ("fall_back", {"entropy_threshold_share": 2.0}, {1: "start", 3: "fall back"}),
    ],
)
def test_a_run_killed_in_a_measurement_resumes_to_the_same_decision(
    tiny, tmp_path, monkeypatch, policy, threshold, made
):
    """The gate is in the checkpoint, with what it may return to, and a measurement repeated on
    resume decides the same: the same bits and metrics as in one go. Where nothing passed before,
    what is returned to is the model that the run began with."""
    curriculum = dataclasses.replace(tiny.curriculum, lengths=(4, 8), policy=policy, **threshold)
    whole = dataclasses.replace(tiny, curriculum=curriculum, steps=3)
    train_module.train(whole)
    halves = dataclasses.replace(whole, run=str(tmp_path / "halves"))
    calls = []

    def killed(samples, responses):
        calls.append(1)
        if len(calls) == len(made):  # that of step 2, after a checkpoint
            raise KeyboardInterrupt
        return mean_entropy(samples, responses)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "mean_entropy", killed)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(halves)
    assert final_state(halves)[0] == 2
    train_module.train(halves)
    state, resumed = final_state(whole)[1], final_state(halves)[1]
    assert_bitwise_equal(state, resumed)
    assert logged(whole) == logged(halves)
    seen = {r["step"]: DECISIONS[r["gate_decision"]] for r in logged(whole) if "gate_decision" in r}
    assert seen == made
    history = gate_state(state.opt_state).history
    measured = [r["heldout_entropy"] for r in logged(whole) if "heldout_entropy" in r]
    np.testing.assert_array_equal(history.entropy_nats, np.float32(measured))
    np.testing.assert_array_equal(history.step + 1, list(made))
    assert logged(whole)[-1]["gate_length"] == (4 if policy == "fall_back" else 8)
    if policy == "fall_back":
        assert logged(whole)[-1]["gate_threshold_nats"] == pytest.approx(2 * measured[0])
        chex.assert_trees_all_close(state.params, models.load(whole.student)[1], atol=1e-6)


def test_after_a_fall_back_the_abandoned_rollout_is_not_trained_on(tiny):
    """Of a step of three updates the first returns to the stable parameters, here the start's, and
    there the step ends: its responses are of the parameters that were left."""
    curriculum = dataclasses.replace(
        tiny.curriculum, lengths=(4, 8), policy="fall_back", entropy_threshold_share=2.0
    )
    config = dataclasses.replace(
        tiny, curriculum=curriculum, steps=3, teacher=None, objective=clipped_surrogate(0.2),
        rl=RL(4, even_digits, epochs=3),
    )  # fmt: skip
    train_module.train(config)
    assert [r.get("gate_decision") for r in logged(config)] == [
        0,
        None,
        DECISIONS.index("fall back"),
    ]
    params = final_state(config)[1].params
    chex.assert_trees_all_close(params, models.load(config.student)[1], atol=1e-6)


def test_nothing_is_drawn_ahead_across_a_measurement(tiny, monkeypatch):
    """The rollout after a decision is of the length and the weights that it left."""
    curriculum = dataclasses.replace(
        tiny.curriculum, lengths=(4, 8), policy="fall_back", entropy_threshold_nats=0.3
    )
    config = dataclasses.replace(
        tiny, curriculum=curriculum, steps=7, save_every_steps=7, rollouts=Rollouts(ahead=True)
    )
    entropies, lengths = iter([0.5, 0.1, 0.1]), {}
    monkeypatch.setattr(train_module, "mean_entropy", lambda *_: next(entropies))

    def noting(made):
        def drawn(parts, params, number, length, *rest):
            lengths[number] = length
            return made(parts, params, number, length, *rest)

        return drawn

    for name in ("draw", "draw_own"):
        monkeypatch.setattr(train_module, name, noting(getattr(train_module, name)))
    train_module.train(config)
    records = logged(config)
    assert [r["gate_length"] for r in records] == [4, 4, 8, 8, 4, 4, 4]
    assert [r["staleness"] for r in records] == [0, 1, 1, 0, 1, 0, 1]
    assert [lengths[n] for n in range(7)] == [4] + [r["gate_length"] for r in records[:-1]]


def test_unfinished_responses_are_not_measured_where_they_are_masked(tiny, capsys):
    """With limits that no response ends within, the gate waits, and says why, once."""
    curriculum = dataclasses.replace(
        tiny.curriculum, lengths=(1, 2), heldout_responses="finished", entropy_threshold_nats=0.0
    )
    config = dataclasses.replace(tiny, curriculum=curriculum, steps=5)
    train_module.train(config)
    assert [r["gate_length"] for r in logged(config)] == [1] * 5
    assert not any("heldout_entropy" in r or "gate_decision" in r for r in logged(config))
    assert capsys.readouterr().out.count("no stop token ended a response") == 1


def test_rollouts_drawn_ahead(tiny, tmp_path, monkeypatch):
    """Every second rollout is of weights one update old, and says so; where a run is interrupted,
    and resumed, changes nothing; other checkpoints would, and are refused."""
    ahead = dataclasses.replace(tiny, rollouts=Rollouts(ahead=True))
    train_module.train(ahead)
    assert [r["staleness"] for r in logged(ahead)] == [0, 1, 0, 1]
    halves = dataclasses.replace(ahead, run=str(tmp_path / "halves"))
    drawn = train_module.draw_own

    def interrupted(parts, params, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return drawn(parts, params, number, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "draw_own", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(halves)
    with pytest.raises(ConfigError, match="save_every_steps: 2 -> 3"):
        train_module.train(dataclasses.replace(halves, save_every_steps=3))
    train_module.train(halves)
    assert_bitwise_equal(final_state(ahead)[1], final_state(halves)[1])
    present = dataclasses.replace(tiny, run=str(tmp_path / "present"))
    train_module.train(present)
    first, second = ([r["loss"] for r in logged(c)] for c in (ahead, present))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_sampler_and_scorer_are_compared(tiny, monkeypatch):
    """The gap is logged, of float32 rounding; where it is over its limit the run stops at once."""
    train_module.train(tiny)
    assert all(0 < r["sampler_gap"] < 1e-4 for r in logged(tiny))
    with pytest.raises(DivergedError, match=r"sampler and scorer differ by .* at step 1") as caught:
        train_module.train(
            dataclasses.replace(tiny, run=f"{tiny.run}2", rollouts=Rollouts(gap_limit_nats=1e-9))
        )
    assert "\n" not in str(caught.value)


def test_a_resume_may_draw_in_other_batches(tiny):
    """How many rows are decoded at a time is where a run runs; how the cache keeps them is not."""
    train_module.train(tiny)
    train_module.train(dataclasses.replace(tiny, rollouts=Rollouts(rows=4)))
    with pytest.raises(ConfigError, match=r"rollouts.kv_cache: compute -> int8"):
        train_module.train(dataclasses.replace(tiny, rollouts=Rollouts(kv_cache="int8")))


def test_an_engine_that_is_not_up(tiny):
    """The student's weights can't be published to it: one line, before the first step."""
    engine = Rollouts(engine="http://localhost:1/v1", engine_retries=0)
    with pytest.raises(EngineError, match=r"engine at http://localhost:1: can't be reached"):
        train_module.train(dataclasses.replace(tiny, rollouts=engine))
    with pytest.raises(DataError, match="no trajectories"):  # reading what it drew is not refused
        train_module.train(
            dataclasses.replace(tiny, rollouts=engine, trajectories=f"{tiny.run} none")
        )


def test_different_runs_differ(tiny, tmp_path):
    """The bitwise test can fail: another seed gives other parameters."""
    train_module.train(tiny)
    other = dataclasses.replace(tiny, run=str(tmp_path / "other"), seed=1)
    train_module.train(other)
    a, b = final_state(tiny)[1].params, final_state(other)[1].params
    assert any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_run_folder_is_complete(tiny, monkeypatch):
    """Config, versions, metrics of both KLs and entropies, TensorBoard, samples, evaluation, page,
    checkpoints."""
    monkeypatch.undo()  # with its figures
    result = train_module.train(tiny)
    folder = Path(tiny.run)
    assert json.loads((folder / "config.json").read_text())["token_loss"] == "forward_kl"
    assert {"jax", "git_commit", "devices"} <= set(
        json.loads((folder / "versions.json").read_text())
    )
    wanted = {
        "loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "student_logp",
        "teacher_logp", "sampler_logp", "top1_agreement", "response_length", "truncated",
        "gradient_norm", "entropy_excess",
    }  # fmt: skip
    assert wanted <= set(logged(tiny)[-1])
    assert list((folder / "tensorboard").iterdir())
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8
    assert "<svg" in (folder / "report.html").read_text()
    assert "## Comparison" in (folder / "report.md").read_text()
    assert (folder / "report.csv").read_text().startswith("cell,seed,avg_at_2,")
    assert final_state(tiny)[2]["position"] == 32
    assert result.training_flops > 0
    assert result.entropy > 0
    assert len(result.correct) == 4


def test_the_teacher_is_not_in_the_checkpoint(tiny):
    """Only the student's parameters, twice more for Adam: the folder is far smaller than with a
    teacher."""
    train_module.train(tiny)
    _, state, about = final_state(tiny)
    leaves = {leaf.shape for leaf in jax.tree.leaves(state)}
    teacher_width = 24
    assert not any(teacher_width in shape for shape in leaves)
    assert set(about["identities"]) == {"student", "teacher", "problems"}


def test_plain_sft_learns(tiny):
    """Dataset prefix with one-hot targets, no teacher: the loss falls, and no divergence is
    logged."""
    config = dataclasses.replace(
        tiny, teacher=None, prefix="dataset", objective=negative_log_likelihood, steps=12,
        save_every_steps=12, optimizer=dataclasses.replace(tiny.optimizer, learning_rate=1e-2),
    )  # fmt: skip
    result = train_module.train(config)
    losses = [r["loss"] for r in logged(config)]
    assert losses[-1] < losses[0] - 0.5
    assert "forward_kl" not in logged(config)[-1]
    assert result.forward_kl is None


def test_changed_config_is_refused_with_its_differences(tiny, capsys):
    """Resuming with another loss or rate lists what differs, and nothing else is said or
    overwritten."""
    train_module.train(tiny)
    announce.cache_clear()
    capsys.readouterr()
    before = (Path(tiny.run) / "config.json").read_bytes()
    changed = dataclasses.replace(
        tiny, token_loss=mix(forward_kl, reverse_kl, weight=0.5), batch_size=16
    )
    with pytest.raises(ConfigError, match=r"batch_size: 8 -> 16; token_loss: forward_kl -> mix\("):
        train_module.train(changed)
    assert (Path(tiny.run) / "config.json").read_bytes() == before
    assert capsys.readouterr().out == ""


def test_finished_run_is_not_trained_again(tiny):
    """The same command on a finished run changes no checkpoint, no metric, not who trained it."""
    train_module.train(tiny)
    state, metrics = final_state(tiny)[1], logged(tiny)
    (Path(tiny.run) / "versions.json").write_text('{"git_commit": "of the training"}')
    train_module.train(tiny)
    assert "of the training" in (Path(tiny.run) / "versions.json").read_text()
    assert_bitwise_equal(state, final_state(tiny)[1])
    assert metrics == logged(tiny)


def test_foreign_folder_is_not_touched(tiny):
    """A run folder that holds something else is refused, and keeps it."""
    folder = Path(tiny.run)
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        train_module.train(tiny)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_unwritable_run_folder(tiny, tmp_path):
    """A path that can't become a folder is one clear line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write the run folder"):
        train_module.train(dataclasses.replace(tiny, run=str(tmp_path / "file" / "run")))


def test_a_damaged_checkpoint_is_passed_over(tiny, capsys):
    """A resume says what is wrong, goes on from the step before, and ends in the same bits; other
    checkpoints.* are no other run. Where none is intact it does not begin anew by itself."""
    train_module.train(tiny)
    whole, folder = final_state(tiny)[1], Path(tiny.run) / "checkpoints"
    shutil.rmtree(folder / "4" / "params")
    train_module.train(dataclasses.replace(tiny, checkpoints=Checkpointing(last=3)))
    said = capsys.readouterr().out
    assert said.count(f"checkpoint {folder}/4 is damaged: params: ") == 1
    assert final_state(tiny)[0] == 4
    assert_bitwise_equal(whole, final_state(tiny)[1])
    assert (folder / "quarantine" / "4").is_dir()
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "about")
    with pytest.raises(DataError, match="holds no intact checkpoint"):
        train_module.train(tiny)


def test_the_best_checkpoint_stays(tiny, tmp_path):
    """The best by a test is kept beside the last, is exported by name, and the page names it."""
    config = dataclasses.replace(
        tiny,
        save_every_steps=1,
        evaluation=dataclasses.replace(tiny.evaluation, every_steps=1),
        checkpoints=Checkpointing(last=1, best="lowest test_entropy"),
    )
    train_module.train(config)
    entropies = {r["step"]: r["test_entropy"] for r in logged(config)}
    best = min(entropies, key=entropies.__getitem__)
    assert best < 4, "the last one is the best: another seed is needed"
    folder = Path(config.run) / "checkpoints"
    assert saved_steps(folder) == [best, 4]
    page = (Path(config.run) / "report.md").read_text()
    assert f"step {best}: lowest test_entropy {entropies[best]:.4g}" in page
    like = models.abstract_params(
        models.read_config(Path(config.student)), np.float32, make_mesh(1)
    )
    shutil.rmtree(folder / str(best) / "training")  # the optimizer's files are not read
    for name in ("best", str(best)):
        _, params = load_run(config.run, name)
        assert_bitwise_equal(params, read_params(folder, best, like))
    for name, says in (("3", "has no checkpoint 3; it has"), ("last", "has no checkpoint last")):
        with pytest.raises(DataError, match=says):
            load_run(config.run, name)
    shutil.rmtree(folder / "4" / "params")
    assert_bitwise_equal(load_run(config.run)[1], params)  # what is intact; nothing is moved
    assert saved_steps(folder) == [best, 4]
    with pytest.raises(DataError, match="checkpoints/4 is damaged: params"):
        load_run(config.run, "4")


def test_other_weights_on_resume_are_refused(tiny, tmp_path):
    """A student folder whose weights changed under a run is noticed by its identity."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny.student, copy)
    config = dataclasses.replace(tiny, student=str(copy))
    train_module.train(config)
    generation = copy / "generation_config.json"
    generation.write_text(generation.read_text() + " ")
    with pytest.raises(ConfigError, match="other weights or data: student: "):
        train_module.train(config)


def test_a_folder_that_is_in_use_or_a_models_is_left_alone(tiny, tmp_path, monkeypatch):
    """Before anything is loaded: one that another run trains in, and a model's, whose config.json
    is no run's."""
    monkeypatch.setattr(train_module, "build", lambda config: pytest.fail("it was begun"))
    folder, model = Path(tiny.run), tmp_path / "model"
    shutil.copytree(tiny.student, model)
    before = sorted((path, path.read_bytes()) for path in model.iterdir())
    with hold(folder), pytest.raises(BusyError, match=f"process {os.getpid()} on .* trains in"):
        train_module.train(tiny)
    with pytest.raises(StorageError, match="but no run; choose another --run"):
        train_module.train(dataclasses.replace(tiny, run=str(model)))
    assert sorted((path, path.read_bytes()) for path in model.iterdir()) == before
    with pytest.raises(ConfigError, match="run must name a folder"):
        train_module.train(dataclasses.replace(tiny, run=""))


def test_a_failed_start_does_not_pin_the_run(tiny):
    """A run that failed before its first checkpoint starts again with the corrected config."""
    wrong = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, max_prompt_tokens=5))
    with pytest.raises(DataError, match=r"prompts over data\.max_prompt_tokens 5,"):
        train_module.train(wrong)
    train_module.train(tiny)
    saved = json.loads((Path(tiny.run) / "config.json").read_text())
    assert saved["data"]["max_prompt_tokens"] == 24


def not_a_number(student_logp, teacher_logp):
    """Of a chunk; the few tokens that a loss is tried on before the run are fine."""
    few = len(student_logp) <= TOKENS
    return forward_kl(student_logp, teacher_logp) * (1.0 if few else np.nan)


@pytest.mark.parametrize(("log_every_steps", "saved"), [(1, 2), (4, 3)])
def test_a_run_that_diverges_is_saved_as_it_was(tiny, log_every_steps, saved):
    """Bad updates are skipped, each is named with its step although records are read less often,
    and after two in a row the run stops with the parameters that it began with, blaming the loss
    and not the learning rate; again when it is resumed."""
    config = dataclasses.replace(
        tiny, token_loss=not_a_number, log_every_steps=log_every_steps, save_every_steps=3,
        faults=Faults(skipped_in_a_row=2),
    )  # fmt: skip
    with pytest.raises(
        DivergedError, match=r"step 1: loss is nan.*not_a_number \(.*test_loop.py:\d+\).*, not the"
        r" learning rate; 2 updates in a row",
    ) as caught:  # fmt: skip
        train_module.train(config)
    assert "optimizer.learning_rate" not in str(caught.value)
    step, state, _ = final_state(config)
    assert step == saved
    assert_bitwise_equal(
        state.params,
        init_state(
            models.load(config.student)[1],
            optimizer_of(config.curriculum, config.optimizer, timetable(config)),
        ).params,
    )
    assert (guard_state(state.opt_state).in_a_row, gate_state(state.opt_state).step) == (step, step)
    said = [line for record in logged(config) for line in record["warnings"] if "skipped" in line]
    assert said == [
        f"step {n}: loss is nan and gradient_norm is nan, its update was skipped"
        for n in range(1, step + 1)
    ]
    with pytest.raises(DivergedError, match=f"step {step + 1}: loss is nan"):
        train_module.train(config)


def test_a_run_goes_on_after_bad_updates(tiny, capsys):
    """Every second loss is not a number: the others train, the metrics stay JSON, and the report
    says which updates were skipped."""
    turn = Turn(share=0.5, token_loss=not_a_number)
    train_module.train(
        dataclasses.replace(tiny, prefix="teacher", turns=(turn,), log_every_steps=3)
    )
    _, state, _ = final_state(tiny)
    assert (guard_state(state.opt_state).in_a_row, guard_state(state.opt_state).total) == (1, 2)

    def refuse(constant):
        raise AssertionError(constant)

    text = (Path(tiny.run) / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [(r["step"], r["skipped"], "loss" in r) for r in records] == [
        (2, 1, False), (3, 1, True), (4, 2, False),
    ]  # fmt: skip
    report_text, printed = (Path(tiny.run) / "report.md").read_text(), capsys.readouterr().out
    for step in (2, 4):
        line = f"step {step}: loss is nan and gradient_norm is nan, its update was skipped"
        assert line in report_text
        assert printed.count(line) == 1


def test_a_run_told_to_stop_saves_and_resumes(tiny, tmp_path, monkeypatch, capsys):
    """SIGTERM in the second step of five, whose update is skipped: it is saved, between records and
    regular checkpoints, and what is resumed has the bits, metrics, warnings and FLOPs of an
    undisturbed run."""
    bad = Turn(share=0.5, token_loss=not_a_number)
    whole = dataclasses.replace(tiny, steps=5, save_every_steps=5, log_every_steps=3, turns=(bad,))
    train_module.train(whole)
    halves = dataclasses.replace(whole, run=str(tmp_path / "halves"))
    rollout = train_module._rollout

    def told(parts, state, number):
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        return rollout(parts, state, number)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "_rollout", told)
        with pytest.raises(PreemptedError, match="stopped after step 2 of 5, which is saved"):
            train_module.train(halves)
    assert final_state(halves)[0] == 2
    assert logged(halves) == []
    train_module.train(halves)
    assert f"{halves.run}: resuming from step 2 of 5" in capsys.readouterr().out
    assert_bitwise_equal(final_state(whole)[1], final_state(halves)[1])
    assert logged(whole) == logged(halves)
    assert any("step 2: loss is nan" in line for line in logged(halves)[0]["warnings"])


def test_batches_larger_than_the_data_are_refused(tiny):
    """One problem twice in a batch would be sampled with one key."""
    with pytest.raises(ConfigError, match="batch_size 32 is over the 24 training problems"):
        train_module.train(dataclasses.replace(tiny, batch_size=32))


def test_rows_that_cannot_be_dealt_are_refused(tiny):
    """8 rows in two micro-batches on eight devices: an error before anything is written."""
    with pytest.raises(ConfigError, match=r"micro_batches is 4 rows.* a multiple of 8"):
        train_module.train(dataclasses.replace(tiny, micro_batches=2))
    assert not Path(tiny.run).exists()


@pytest.mark.release
def test_padding_rows_are_as_if_they_were_not_there(tiny, tmp_path):
    """Student and teacher with 3 and 8 rows of padding train as without: samples, losses, KLs."""
    config = dataclasses.replace(tiny, prefix="student", steps=2)
    train_module.train(config)
    wide = dataclasses.replace(
        config,
        run=str(tmp_path / "wide"),
        student=padded(tmp_path / "student3", config.student, 3),
        teacher=padded(tmp_path / "teacher8", config.teacher, 8),
    )
    train_module.train(wide)
    plain, with_padding = (run_folder.read_metrics(Path(c.run)) for c in (config, wide))
    assert len(plain) == 2
    for expected, found in zip(plain, with_padding, strict=True):
        for record in (expected, found):  # padding costs time and FLOPs, and nothing else
            for name in ("seconds", *(n for n in record if n.startswith("flops_"))):
                del record[name]
        assert found.pop("warnings", []) == expected.pop("warnings", [])
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_another_tokenizer_is_refused(tiny, tmp_path, tokenizer_folder, tokenizer):
    """A teacher with another tokenizer can't be compared token by token."""
    from tiny import tiny_config

    from kdjax import models

    other = tmp_path / "other"
    models.create(other, tiny_config(tokenizer.size), tokenizer_folder, seed=0)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<think>", "<thunk>"))
    with pytest.raises(ConfigError, match="tokenizers differ"):
        train_module.train(dataclasses.replace(tiny, teacher=str(other)))
    assert not Path(tiny.run).exists()


def test_teacher_trajectories_are_shared_between_runs(tiny, tmp_path, monkeypatch):
    """Forward and reverse KL on teacher prefixes read the same files; the second run draws
    nothing."""
    first = dataclasses.replace(tiny, prefix="teacher")
    train_module.train(first)
    stored = sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert stored
    ages = [p.stat().st_mtime_ns for p in stored]
    train_module.train(
        dataclasses.replace(first, run=str(tmp_path / "second"), token_loss=reverse_kl)
    )
    assert [p.stat().st_mtime_ns for p in stored] == ages


def test_training_on_a_file(tiny, tmp_path):
    """A JSONL of prompts and answers trains and evaluates; without evaluation.file it is refused by
    name."""
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = dataclasses.replace(tiny.data, file=str(path))
    with pytest.raises(ConfigError, match=r"evaluation\.file"):
        train_module.train(dataclasses.replace(tiny, data=data))
    evaluation = dataclasses.replace(tiny.evaluation, file=str(path))
    result = train_module.train(dataclasses.replace(tiny, data=data, evaluation=evaluation))
    assert result.problems == 12
    with pytest.raises(DataError, match="no worked response"):
        train_module.train(
            dataclasses.replace(
                tiny, run=str(tmp_path / "sft"), prefix="dataset", data=data, evaluation=evaluation
            )
        )


def test_one_compile_a_length(tiny, monkeypatch):
    """The step is traced once a length: anew when it rises, not when it returns to one before."""
    curriculum = dataclasses.replace(
        tiny.curriculum, lengths=(4, 8), policy="fall_back", entropy_threshold_nats=0.3
    )
    config = dataclasses.replace(tiny, curriculum=curriculum, steps=6)
    entropies = iter([0.5, 0.1])
    monkeypatch.setattr(train_module, "mean_entropy", lambda *_: next(entropies))
    parts = parts_module.build(config)
    traces = []
    programs = parts.programs
    teacher = parts.teachers[""]
    step = make_step(programs.student.model, teacher.programs.model, programs.student.optimizer)

    def counted(*args):
        traces.append(1)
        return step(*args)

    counting = teacher._replace(programs=teacher.programs._replace(steps=(jax.jit(counted),)))
    parts = parts._replace(teachers={"": counting})
    folder = Path(config.run)
    folder.mkdir()
    checkpoints = open_checkpoints(folder / "checkpoints")
    train_module._loop(
        parts, parts_module.fresh_state(parts), {"seconds": 0.0}, folder, checkpoints
    )
    checkpoints.close()
    assert [r["gate_length"] for r in logged(config)] == [4, 4, 8, 8, 4, 4]
    assert len(traces) == 2
