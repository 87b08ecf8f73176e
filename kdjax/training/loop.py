"""The training loop: draw, update, record, save, step after step; an existing run is resumed."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Rollout, Samples, TrainState
from kdjax.config.as_json import as_dict
from kdjax.config.schema import Config
from kdjax.config.validation import validate
from kdjax.errors import PreemptedError
from kdjax.evaluate import all_responses, finished_responses, mean_entropy
from kdjax.grading.eval_report import EvalReport
from kdjax.runtime import files, processes
from kdjax.runtime.console import announce, training_progress
from kdjax.runtime.profiling import profiling
from kdjax.runtime.signals import stop_between_steps
from kdjax.runtime.watchdog import watchdog
from kdjax.step.update import Metrics
from kdjax.storage import run_folder
from kdjax.storage.checkpoints import Checkpoints, open_checkpoints
from kdjax.training.aligned import about_alignment
from kdjax.training.evaluation import progress_of
from kdjax.training.feed import (
    draw,
    draw_own,
    fell_back,
    length_of,
    on_mesh,
    sampler_params,
    with_old_policy,
)
from kdjax.training.finish import finish
from kdjax.training.parts import startup
from kdjax.training.parts.build import Parts, build
from kdjax.training.parts.problems import MEASURE, encode, run_key
from kdjax.training.records import check_gap, open_notes, record_of, write_startup
from kdjax.training.resume import about_step, about_version, check_resumable, start

HELDOUT_RESPONSES = {"all": all_responses, "finished": finished_responses}
"""The responses that the gate measures, by the config's `curriculum.heldout_responses`."""


def train(config: Config, profile_steps: int = 0) -> EvalReport:
    """Train, or resume, the run of a config; evaluate it; write everything to its folder.

    profile_steps: steps whose time is profiled (`profiling`). Errors: KdjaxError kinds, each one
    line with the remedy.
    """
    folder = Path(validate(config).run)
    with run_folder.open_run_folder(folder):
        return _train(config, folder, profile_steps)


def _train(config: Config, folder: Path, profile_steps: int) -> EvalReport:
    check_resumable(config, folder / "checkpoints")  # a refusal is all that is printed
    parts = build(config)
    about = startup.report(parts) + about_alignment(parts)
    checkpoints = open_checkpoints(folder / "checkpoints", **as_dict(config.checkpoints))
    try:
        state, before = start(parts, checkpoints)
        for line in about.splitlines():  # a study's next cell prints only those that differ
            announce(line)
        if int(state.step):
            announce(f"{config.run}: resuming from step {int(state.step)} of {config.steps}")
        versions = run_folder.versions()
        if int(state.step) and (said := about_version(folder, versions)):
            announce(said)
        files.write_json(folder / run_folder.CONFIG, as_dict(config))
        if int(state.step) < config.steps:  # who trained it, not who evaluates it again
            files.write_json(folder / run_folder.VERSIONS, versions)
        write_startup(folder, about, resumed=int(state.step) > 0)
        with profiling(folder / run_folder.PROFILE, profile_steps) as profile:
            profiled = parts._replace(profile=profile)
            state, seconds = _loop(profiled, state, before, folder, checkpoints)
    finally:
        checkpoints.close()
        parts.rewarder.close()
    return finish(parts, state, seconds, folder)


def _loop(
    parts: Parts, state: TrainState, before: dict[str, Any], folder: Path, checkpoints: Checkpoints
) -> tuple[TrainState, float]:
    """(the state after the last step, seconds of training in all).

    Args:
        parts: of the run.
        state: to continue from.
        before: the checkpoint's record of the steps before.
        folder: the run's.
        checkpoints: where states are saved.
    """
    config, timed = parts.config, parts.profile.timed
    first, name = int(state.step), run_folder.run_name(folder)
    records = run_folder.restored_metrics(folder, first, before.get("records"))
    metrics = run_folder.open_metrics(folder, first, config.wandb_project)
    notes = open_notes(parts, state, records, before.get("unsaid", ()), before.get("by_tag", {}))
    began = time.perf_counter() - before["seconds"]
    pool, drawn = ThreadPoolExecutor(1), None
    try:
        with (
            training_progress(name, config.steps, first) as show,
            watchdog(folder, config.faults.step_limit_seconds) as watch,
            stop_between_steps() as asked_to_stop,
        ):
            for number in parts.profile.steps(range(first, config.steps), watch.done):
                watch.begins(number + 1)
                entropy = timed("measure", _measure_entropy, parts, state, number)
                if drawn is None:
                    rollout = timed("rollout", _rollout, parts, state, number)
                else:
                    rollout = timed("input", on_mesh, parts, timed("rollout", drawn.result))
                drawn = timed("rollout", _draw_ahead, parts, pool, state, number + 1)
                updated = timed("score and update", _update, parts, state, number, rollout, entropy)
                (state, updates), done, fault = updated, number + 1, None
                saves = done % config.save_every_steps == 0 or done == config.steps
                tests = is_due(config.evaluation.every_steps, done)
                logs = done % config.log_every_steps == 0 or math.isfinite(entropy) or tests
                record = None
                notes.updated(done, updates)
                if saves or logs:
                    seconds = time.perf_counter() - began
                    record = timed("log", record_of, parts, state, updates, entropy, seconds)
                    watch.done()
                    if tests:
                        watch.rests()
                        record |= timed("test", _test, parts, state, done)
                        began += record["test_seconds"]
                        watch.done()
                    record, fault = notes.completed(done, record)
                    timed("log", metrics.write, done, record)
                    check_gap(config, record, done)
                timed("log", show, done, record)
                if asked_to_stop(done):
                    fault = fault or PreemptedError(
                        f"{name}: stopped after step {done} of {config.steps}, which is saved; the"
                        " same command resumes"
                    )
                if saves or fault is not None:
                    about = about_step(parts, done, time.perf_counter() - began, record or {})
                    about |= notes.kept()
                    timed("checkpoint", checkpoints.save, done, state, about)
                if fault is not None:
                    raise fault
    finally:
        pool.shutdown(cancel_futures=True)
        metrics.close()
    jax.block_until_ready(state)
    return state, time.perf_counter() - began


def _draw_ahead(
    parts: Parts, pool: ThreadPoolExecutor, state: TrainState, number: int
) -> Future[Rollout] | None:
    """Start drawing the rollout of step `number` from a copy of the present weights, before the
    present step updates them; None where rollouts are not drawn ahead.

    Across a checkpoint nothing is drawn ahead, so that a resumed run draws what an uninterrupted
    one draws; and across a measurement, which decides on the length and may abandon the weights.
    """
    config = parts.config
    if not config.rollouts.ahead or number >= config.steps or number % config.save_every_steps == 0:
        return None
    if number - 1 in parts.table.measured:
        return None
    params, length = jax.tree.map(jnp.copy, state.params), length_of(parts, state)
    reads = sampler_params(parts, params, number)  # here, where all processes are at the same step
    return pool.submit(draw_own, parts, reads, number, length, parts.table.at(number - 1).updates)


def _rollout(parts: Parts, state: TrainState, number: int) -> Rollout:
    """The rollout of step `number`, drawn with the student's present parameters."""
    return draw(parts, state.params, number, length_of(parts, state), 0)


def _update(
    parts: Parts, state: TrainState, number: int, rollout: Rollout, entropy: float
) -> tuple[TrainState, list[Metrics]]:
    """(the state after one step, the metrics of each of its updates): one update, or several over
    the same rollout (`rl.epochs`), which end where the gate falls back to other parameters.

    Args:
        parts: of the run.
        state: before the step.
        number: of the step.
        rollout: sharded over the mesh.
        entropy: held-out, in nats, NaN where it was not measured.
    """
    timed = parts.profile.timed
    teacher = parts.teachers[parts.problems.batch_at(number)[0]]
    rollout = timed("teacher", teacher.programs.read, teacher.params, rollout)
    rollout = timed("reference", parts.refer, rollout)
    step = teacher.programs.steps[parts.table.turn_at(number)]
    updates, frozen = parts.table.at(number).updates, parts.student.frozen
    if updates > 1 and rollout.old_logp_bt is None:
        rollout = timed("old policy", with_old_policy, parts, state.params, rollout)
    heldout = np.float32(entropy)
    state, first = step(state, teacher.given, rollout, heldout, frozen)
    made = [first]
    if math.isfinite(entropy) and fell_back(state):
        updates = 1  # the rollout is of the parameters that were left
    for _ in range(updates - 1):
        state = state._replace(step=state.step - 1)
        state, metrics = step(state, teacher.given, rollout, np.float32(np.nan), frozen)
        made.append(metrics)
    return state, made


def is_due(every: int, step: int) -> bool:
    """Whether something that is due every so many steps (0: never) is due after this one."""
    return every > 0 and step % every == 0


def _test(parts: Parts, state: TrainState, done: int) -> dict[str, Any]:
    """The student's test metrics after `done` steps; their seconds are not counted as training."""
    jax.block_until_ready(state)
    began = time.perf_counter()
    found = progress_of(parts, state.params, done)
    return found | {"test_seconds": time.perf_counter() - began}


def _measure_entropy(parts: Parts, state: TrainState, number: int) -> float:
    """The student's held-out entropy before step `number` if it is due, or NaN."""
    config = parts.config
    if number not in parts.table.measured:
        return float("nan")
    length, source = length_of(parts, state), parts.problems.heldout
    assert source is not None, "a gate that measures has problems"
    reads, key = parts.sampler_params(state.params), run_key(config.seed, MEASURE, number)
    most = config.data.max_prompt_tokens

    def draw_rows(rows: np.ndarray) -> Samples:
        batch = encode(source, parts.tokenizer, rows, most, length)
        return parts.responses.draw(reads, batch, key, length)

    samples = processes.draw_apart(draw_rows, source.size)
    entropy = mean_entropy(samples, HELDOUT_RESPONSES[config.curriculum.heldout_responses])
    if math.isnan(entropy):
        announce(
            f"{config.run}: a held-out entropy was not measured, as no stop token ended a response;"
            " the gate waits, and a threshold that is a share refers to the first entropy that is"
            " measured (curriculum.heldout_responses all measures truncated ones too)"
        )
    return entropy
