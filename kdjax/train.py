"""The training loop: builds the parts from a config, then data flows one way, step after step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import data, flops, models, report
from kdjax.base import Batch, ConfigError, Key, Model, Params, PrefixSource, Rollout, TrainState
from kdjax.checkpoint import Checkpoints, open_checkpoints
from kdjax.config import WHERE_IT_RUNS, Config, as_dict, differences, validate
from kdjax.evaluate import EvalReport, evaluate, mean_entropy, to_json
from kdjax.gate import rollout_length
from kdjax.optimizer import gate_state, make_optimizer
from kdjax.page import Row, render_page
from kdjax.progress import Progress, training_progress
from kdjax.rollout import from_dataset, from_student, from_teacher
from kdjax.sampler import Samples, generate
from kdjax.score import score
from kdjax.sharding import make_mesh, replicated, shard_batch
from kdjax.step import init_state, make_step
from kdjax.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from kdjax.trajectories import CHUNK_ROWS, open_trajectories

ROLLOUT, MEASURE, EVALUATE, TEACHER = range(4)  # purposes of the run key


class Parts(NamedTuple):
    """Everything a run is made of, built once from its config."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    student: Model
    initial_params: Params
    teacher: Model | None
    teacher_params: Params | None
    optimizer: Any
    source: data.Source
    prefix: PrefixSource
    generate: Callable[[Params, Batch, Key, int], Samples]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    identities: dict[str, str]


def train(config: Config) -> EvalReport:
    """Train, or resume, the run of a config; evaluate it; leave everything in its folder.

    Errors: KdjaxError kinds, each one line with the remedy.
    """
    folder = Path(validate(config).run)
    parts = build(config)
    report.open_run_folder(folder, as_dict(config))
    checkpoints = open_checkpoints(folder / "checkpoints")
    try:
        state, seconds = _start(parts, folder, checkpoints)
        state, seconds = _loop(parts, state, seconds, folder, checkpoints)
    finally:
        checkpoints.close()
    return _finish(parts, state, seconds, folder)


def build(config: Config) -> Parts:
    """Load models and data, compose the step. The only place where names become functions."""
    mesh, dtype = make_mesh(), jnp.dtype(config.dtype)
    student_folder = models.find(config.student)
    tokenizer = load_tokenizer(student_folder)
    student, params = models.load(student_folder, mesh, dtype)
    teacher = teacher_params = None
    identities = {"student": models.identity(student_folder)}
    if config.teacher is not None:
        teacher_folder = models.find(config.teacher)
        check_same_vocabulary(tokenizer, load_tokenizer(teacher_folder))
        teacher, teacher_params = models.load(teacher_folder, mesh, dtype)
        teacher_params = jax.tree.map(lambda w: w.astype(dtype), teacher_params)
        identities["teacher"] = models.identity(teacher_folder)
        if teacher.config.vocab_size != student.config.vocab_size:
            raise ConfigError(
                f"student has {student.config.vocab_size} vocabulary rows, teacher {teacher.config.vocab_size};"
                " kdjax does not match padded vocabularies yet: use models with equal rows"
            )
    source = training_source(config)
    optimizer = make_optimizer(
        steps=config.steps,
        lengths=config.curriculum.lengths,
        entropy_threshold_nats=config.curriculum.entropy_threshold_nats,
        **as_dict(config.optimizer),
    )
    step = make_step(
        student,
        teacher,
        optimizer,
        token_loss=config.token_loss,
        objective=config.objective,
        reduction=config.reduction,
        micro_batches=config.micro_batches,
        chunk=config.head_chunk,
    )
    draw = jitted_generate(student, tokenizer, config.temperature)
    prefixes: dict[str, Callable[[], PrefixSource]] = {
        "dataset": lambda: from_dataset,
        "student": lambda: from_student(draw),
        "teacher": lambda: from_teacher(
            _teacher_trajectories(config, mesh, tokenizer, teacher, teacher_params, source, identities["teacher"])
        ),
    }
    if config.prefix == "dataset":
        data.require_solutions(source)
    return Parts(
        config, mesh, tokenizer, student, params, teacher, teacher_params, optimizer, source,
        prefixes[config.prefix](), draw, jax.jit(step, donate_argnums=0), identities,
    )  # fmt: skip


def training_source(config: Config) -> data.Source:
    """The problems that a config trains on."""
    if config.data.file is not None:
        return data.file_source(config.data.file)
    return data.task_source(config.data.task, "train", config.data.problems, config.data.terms)


def heldout_source(config: Config) -> data.Source:
    """The problems that the entropy gate measures on, disjoint from training and test."""
    if config.curriculum.heldout_file is not None:
        return data.file_source(config.curriculum.heldout_file)
    return data.task_source(config.data.task, "heldout", config.curriculum.heldout_problems, config.data.terms)


def test_source(config: Config) -> data.Source:
    """The problems that a run is evaluated on."""
    if config.evaluation.file is not None:
        return data.file_source(config.evaluation.file)
    return data.task_source(config.data.task, "test", config.evaluation.problems, config.data.terms)


@functools.lru_cache(maxsize=8)
def jitted_generate(model: Model, tokenizer: Tokenizer, temperature: float):
    """The sampler of a model, jitted: (params, batch, key, max_new_tokens) -> Samples."""
    draw = functools.partial(generate, model, stop_ids=tokenizer.stop_ids, temperature=temperature)
    jitted = jax.jit(draw, static_argnames="max_new_tokens")
    return lambda params, batch, key, max_new_tokens: jitted(params, batch, key, max_new_tokens=max_new_tokens)


def run_key(config: Config, purpose: int, step: int = 0) -> Key:
    """The key of a purpose at a step: the same whenever it is asked for, so nothing of it is saved."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)


def _teacher_trajectories(config, mesh, tokenizer, teacher, teacher_params, source, identity):
    """read(rows) -> the teacher's responses, drawn once for all runs that ask for the same."""
    draw = jitted_generate(teacher, tokenizer, config.temperature)
    length = config.curriculum.lengths[-1]
    settings = {
        "weights": identity,
        "prompts": data.source_key(source, tokenizer, config.data.max_prompt_tokens),
        "temperature": config.temperature,
        "max_new_tokens": length,
        "stop_ids": list(tokenizer.stop_ids),
        "seed": config.seed,
        "dtype": config.dtype,
    }

    def draw_rows(rows: np.ndarray) -> Samples:
        padded = np.concatenate([rows, np.full(CHUNK_ROWS - len(rows), rows[-1])])  # one shape, one compile
        batch = _encode(source, tokenizer, padded, config, length)
        samples = draw(teacher_params, shard_batch(batch, mesh), run_key(config, TEACHER), length)
        return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], samples)

    return open_trajectories(Path(config.cache), settings, source.size, draw_rows)


def _encode(source: data.Source, tokenizer: Tokenizer, indices, config: Config, length: int) -> Batch:
    limit = config.data.max_prompt_tokens
    return data.encode_batch(
        source, [int(i) for i in indices], tokenizer, max_prompt_tokens=limit, max_new_tokens=length
    )


def _start(parts: Parts, folder: Path, checkpoints: Checkpoints) -> tuple[TrainState, float]:
    """A fresh state, or the newest checkpoint's after checking that the config is the one it came from."""
    place = replicated(parts.mesh)
    state = jax.device_put(init_state(parts.initial_params, parts.optimizer), place)
    saved = report.read_json(folder / report.CONFIG)
    changed = differences(*({k: v for k, v in c.items() if k not in WHERE_IT_RUNS} for c in (saved, as_dict(parts.config))))
    if changed:
        raise ConfigError(
            f"{folder} was started with another config: {'; '.join(changed)}. Choose another --run, or the old values"
        )
    steps = checkpoints.steps()
    if not steps:
        return state, 0.0
    state, about = checkpoints.restore(steps[-1], state)
    if about["identities"] != parts.identities:
        raise ConfigError(f"{folder} was trained with other weights: {about['identities']} -> {parts.identities}")
    return state, about["seconds"]


def _loop(
    parts: Parts, state: TrainState, seconds: float, folder: Path, checkpoints: Checkpoints
) -> tuple[TrainState, float]:
    config = parts.config
    first = int(state.step)
    metrics = report.open_metrics(folder, first, config.wandb_project)
    began = time.perf_counter() - seconds
    try:
        with training_progress(folder.name, config.steps, first) as progress:
            for number in range(first, config.steps):
                entropy = _measure_entropy(parts, state, number)
                rollout = _rollout(parts, state, number)
                state, values = parts.step(state, parts.teacher_params, rollout, jnp.float32(entropy))
                done = number + 1
                if done % config.log_every_steps == 0 or done == config.steps:
                    _log(parts, state, values, entropy, began, done, metrics, progress)
                progress.advance(done)
                if done % config.save_every_steps == 0 or done == config.steps:
                    checkpoints.save(done, state, _about(parts, done, time.perf_counter() - began))
    finally:
        metrics.close()
    jax.block_until_ready(state)
    return state, time.perf_counter() - began


def _rollout(parts: Parts, state: TrainState, number: int) -> Rollout:
    """The training data of step `number`: a pure function of (config, state, number)."""
    config = parts.config
    length = rollout_length(gate_state(state.opt_state), config.curriculum.lengths)
    positions = range(number * config.batch_size, (number + 1) * config.batch_size)
    indices = [data.index_at(parts.source, p, config.seed) for p in positions]
    batch = shard_batch(_encode(parts.source, parts.tokenizer, indices, config, length), parts.mesh)
    rollout = parts.prefix(batch, state.params, run_key(config, ROLLOUT, number), length)
    return shard_batch(rollout, parts.mesh)


def _measure_entropy(parts: Parts, state: TrainState, number: int) -> float:
    """The student's held-out entropy before step `number` when the curriculum asks for it, or NaN."""
    config = parts.config
    curriculum = config.curriculum
    if len(curriculum.lengths) == 1 or number == 0 or number % curriculum.measure_every_steps:
        return float("nan")
    length = rollout_length(gate_state(state.opt_state), curriculum.lengths)
    source = heldout_source(config)
    indices = range(source.size)
    batch = shard_batch(_encode(source, parts.tokenizer, indices, config, length), parts.mesh)
    return mean_entropy(parts.generate(state.params, batch, run_key(config, MEASURE, number), length))


def _log(parts, state, values, entropy, began, done, metrics, progress: Progress) -> None:
    record = {name: float(v) for name, v in values.items()}
    gate = gate_state(state.opt_state)
    record |= {"gate_stage": int(gate.stage), "heldout_entropy": entropy, "seconds": time.perf_counter() - began}
    record = {name: value for name, value in record.items() if value == value}
    metrics.write(done, record)
    progress.show(record)


def _about(parts: Parts, done: int, seconds: float) -> dict[str, Any]:
    return {
        "config": as_dict(parts.config),
        "identities": parts.identities,
        "position": done * parts.config.batch_size,
        "seconds": seconds,
    }


def _finish(parts: Parts, state: TrainState, seconds: float, folder: Path) -> EvalReport:
    """Evaluate the trained student and write what a reader of the run needs."""
    result, records = evaluate_params(parts, state.params)
    result = result._replace(training_flops=_training_flops(parts, folder), training_seconds=seconds)
    report.write_json(folder / report.EVALUATION, to_json(result))
    report.write_samples(folder, records)
    row = Row(folder.name, result, report.read_metrics(folder), records)
    report.write_text(folder / report.PAGE, render_page(f"Run {folder.name}", [row], about_run(folder)))
    return result


def about_run(folder: Path) -> dict[str, Any]:
    """What produced a run, for its page."""
    config = report.read_json(folder / report.CONFIG)
    method = {name: config[name] for name in ("prefix", "token_loss", "objective", "reduction", "steps", "batch_size")}
    return {**method, "temperature": config["temperature"], "seed": config["seed"], **report.read_json(folder / report.VERSIONS)}


def evaluate_params(parts: Parts, params: Params) -> tuple[EvalReport, list[dict[str, Any]]]:
    """The config's evaluation of any parameters of the student's shape."""
    config, settings = parts.config, parts.config.evaluation
    scorer = functools.partial(_score_student, parts.student, parts.teacher, config.head_chunk)
    return evaluate(
        jitted_generate(parts.student, parts.tokenizer, settings.temperature),
        lambda params, rollout: scorer(params, parts.teacher_params, rollout),
        params,
        test_source(config),
        parts.tokenizer,
        run_key(config, EVALUATE),
        samples=settings.samples,
        k=settings.k,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
        batch_size=-(-settings.batch_size // parts.mesh.size) * parts.mesh.size,
        seed=config.seed,
        place=lambda batch: shard_batch(batch, parts.mesh),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score_student(student: Model, teacher: Model | None, chunk: int, params, teacher_params, rollout):
    return score(student, params, teacher, teacher_params, rollout, chunk=chunk)


def _training_flops(parts: Parts, folder: Path) -> float:
    """Model FLOPs of the run, from the logged lengths: rollouts, teacher, student forward and backward.

    Teacher trajectories count once for each problem that the run visited, as if drawn for this run alone.
    """
    config = parts.config
    student, teacher = parts.student.config, parts.teacher.config if parts.teacher else None
    lengths = [r["response_length"] for r in report.read_metrics(folder)]
    mean_new = float(np.mean(lengths)) if lengths else 0.0
    prompt = float(np.mean([len(data.encode_prompt(parts.source, i, parts.tokenizer)) for i in range(min(64, parts.source.size))]))
    rows, length = config.steps * config.batch_size, prompt + mean_new
    total = flops.training(student, teacher, rows * prompt, rows * mean_new, length)
    if config.prefix == "student":
        total += flops.sampling(student, rows * prompt, rows * mean_new, length)
    if config.prefix == "teacher" and teacher is not None:
        drawn = min(rows, parts.source.size)
        total += flops.sampling(teacher, drawn * prompt, drawn * mean_new, length)
    return total
