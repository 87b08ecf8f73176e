"""A config's parts, built once: models, data, prefix source, compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import data, models, startup
from kdjax.base import Batch, ConfigError, Key, Model, Params, PrefixSource, TrainState
from kdjax.config import WHERE_IT_RUNS, Config, as_dict
from kdjax.evaluate import EvalReport, evaluate
from kdjax.head import chunk_tokens
from kdjax.optimizer import make_optimizer
from kdjax.progress import announce
from kdjax.rollout import from_dataset, from_student, from_teacher
from kdjax.sampler import Samples, generate
from kdjax.score import score
from kdjax.sharding import data_size, make_mesh, replicated, shard_batch
from kdjax.step import make_step
from kdjax.stops import Stops
from kdjax.tokenizer import Tokenizer, load_pair, load_tokenizer
from kdjax.trajectories import CHUNK_ROWS, open_trajectories

ROLLOUT, MEASURE, EVALUATE, TEACHER = range(4)  # purposes of the run key


class Parts(NamedTuple):
    """Everything a run is made of, built once from its config."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer
    stops: Stops
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


def build(config: Config) -> Parts:
    """Load models and data, compose the step. The only place where names become functions."""
    mesh, dtype = make_mesh(), jnp.dtype(config.dtype)
    student_folder = models.find(config.student)
    teacher, teacher_params = None, None
    if config.teacher is None:
        tokenizer = teacher_tokenizer = load_tokenizer(
            student_folder, thinking=config.data.thinking
        )
    else:
        teacher_folder = models.find(config.teacher)
        tokenizer, teacher_tokenizer = load_pair(
            student_folder, teacher_folder, thinking=config.data.thinking
        )
        teacher, teacher_params = models.load(teacher_folder, mesh, dtype)
        teacher_params = jax.tree.map(lambda w: w.astype(dtype), teacher_params)
    student, params = models.load(student_folder, mesh, dtype)
    stop_ids = dict.fromkeys((*tokenizer.stop_ids, *teacher_tokenizer.stop_ids))
    stops = Stops(config.stops, tuple(stop_ids))
    source = training_source(config)
    if config.batch_size > source.size:
        raise ConfigError(
            f"batch_size {config.batch_size} is over the {source.size} training problems;"
            " a problem would be sampled twice with one key"
        )
    optimizer = make_optimizer(
        steps=config.steps,
        lengths=config.curriculum.lengths,
        entropy_threshold_nats=config.curriculum.entropy_threshold_nats,
        **as_dict(config.optimizer),
    )
    draw = jitted_generate(student, tokenizer, config.temperature)
    # the teacher answers the student's prompts, token by token, and stops in its own way
    read_by_teacher = tokenizer._replace(stop_ids=teacher_tokenizer.stop_ids)
    prefixes: dict[str, Callable[[], PrefixSource]] = {
        "dataset": lambda: from_dataset,
        "student": lambda: from_student(draw),
        "teacher": lambda: from_teacher(
            _teacher_trajectories(config, mesh, read_by_teacher, teacher, teacher_params, source)
        ),
    }
    if config.prefix == "dataset":
        data.require_solutions(source, [0])
    step = _compose_step(config, mesh, tokenizer, stops, student, teacher, optimizer)
    return Parts(
        config, mesh, tokenizer, teacher_tokenizer, stops, student, params, teacher, teacher_params,
        optimizer, source, prefixes[config.prefix](), draw, step, identities(config),
    )  # fmt: skip


def _compose_step(config: Config, mesh, tokenizer, stops: Stops, student, teacher, optimizer):
    """The config's step, jitted; its state is given away to the next."""
    rows = config.batch_size // config.micro_batches
    if rows % data_size(mesh):
        raise ConfigError(
            f"batch_size / micro_batches is {rows} rows, which can't be dealt over"
            f" {data_size(mesh)} devices; make it a multiple of {data_size(mesh)}"
        )
    step = make_step(
        student,
        teacher,
        optimizer,
        token_loss=config.token_loss,
        objective=config.objective,
        reduction=config.reduction,
        stops=stops,
        micro_batches=config.micro_batches,
        chunk=_head_chunk(config, tokenizer),
        vocabulary=tokenizer.size,
        mesh=mesh,
    )
    return jax.jit(step, donate_argnums=0)


def startup_report(parts: Parts) -> str:
    """What the run of these parts is about to do. Errors: DataError, as `startup.report`."""
    return startup.report(
        parts.config,
        parts.mesh,
        (parts.tokenizer, parts.teacher_tokenizer),
        parts.student,
        parts.initial_params,
        parts.teacher,
        parts.teacher_params,
        stops=parts.stops,
        chunk=_head_chunk(parts.config, parts.tokenizer),
    )


def identities(config: Config) -> dict[str, str]:
    """What a run was trained with, besides its config: contents of model folders and problems."""
    found = {"student": models.identity(models.find(config.student))}
    if config.teacher is not None:
        found["teacher"] = models.identity(models.find(config.teacher))
    found["problems"] = training_source(config).identity
    if len(config.curriculum.lengths) > 1:
        found["heldout problems"] = heldout_source(config).identity
    return found


def evaluation_key(config: Config) -> dict[str, Any]:
    """Everything that decides what an evaluation at the end of a run says."""
    elsewhere = set(WHERE_IT_RUNS) - {"evaluation"}
    fields = {name: value for name, value in as_dict(config).items() if name not in elsewhere}
    return {
        "config": fields,
        "identities": identities(config),
        "test problems": test_source(config).identity,
    }


def training_source(config: Config) -> data.Source:
    """The problems that a config trains on."""
    if config.data.file is not None:
        return data.file_source(config.data.file)
    return data.task_source(config.data.task, "train", config.data.problems, config.data.terms)


def heldout_source(config: Config) -> data.Source:
    """The problems that the entropy gate measures on, disjoint from training and test."""
    if config.curriculum.heldout_file is not None:
        return data.file_source(config.curriculum.heldout_file)
    return data.task_source(
        config.data.task, "heldout", config.curriculum.heldout_problems, config.data.terms
    )


def test_source(config: Config) -> data.Source:
    """The problems that a run is evaluated on."""
    if config.evaluation.file is not None:
        return data.file_source(config.evaluation.file)
    return data.task_source(config.data.task, "test", config.evaluation.problems, config.data.terms)


@functools.lru_cache(maxsize=8)  # programs compiled for one cell serve the next
def jitted_generate(model: Model, tokenizer: Tokenizer, temperature: float):
    """The sampler of a model, jitted: (params, batch, key, max_new_tokens) -> Samples."""
    draw = functools.partial(
        generate,
        model,
        stop_ids=tokenizer.stop_ids,
        temperature=temperature,
        vocabulary=tokenizer.size,
    )
    jitted = jax.jit(draw, static_argnames="max_new_tokens")
    return lambda params, batch, key, max_new_tokens: jitted(
        params, batch, key, max_new_tokens=max_new_tokens
    )


def run_key(config: Config, purpose: int, step: int = 0) -> Key:
    """The key of a purpose at a step: the same whenever it is asked for; nothing is saved."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)


def encode(
    source: data.Source, tokenizer: Tokenizer, indices, config: Config, length: int
) -> Batch:
    limit = config.data.max_prompt_tokens
    return data.encode_batch(
        source, [int(i) for i in indices], tokenizer, max_prompt_tokens=limit, max_new_tokens=length
    )


def pad_rows(rows: np.ndarray, mesh: Mesh, at_least: int = 1) -> np.ndarray:
    """The rows, the last one repeated until they can be dealt over the mesh."""
    wanted = -(-max(len(rows), at_least) // data_size(mesh)) * data_size(mesh)
    return np.concatenate([rows, np.full(wanted - len(rows), rows[-1])])


def evaluate_params(parts: Parts, params: Params) -> tuple[EvalReport, list[dict[str, Any]]]:
    """The config's evaluation of any parameters of the student's shape; its KLs and entropy are of
    the config's stop policy, as the loss's."""
    config, settings = parts.config, parts.config.evaluation
    params = jax.device_put(params, replicated(parts.mesh))
    scorer = functools.partial(
        _score_student,
        parts.student,
        parts.teacher,
        parts.stops,
        _head_chunk(config, parts.tokenizer),
        parts.tokenizer.size,
        parts.mesh,
    )
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
        batch_size=-(-settings.batch_size // data_size(parts.mesh)) * data_size(parts.mesh),
        seed=config.seed,
        place=lambda batch: shard_batch(batch, parts.mesh),
    )


def _teacher_trajectories(config, mesh, tokenizer, teacher, teacher_params, source):
    """read(rows) -> the teacher's responses, drawn once for all runs that ask for the same."""
    draw = jitted_generate(teacher, tokenizer, config.temperature)
    length = config.curriculum.lengths[-1]
    settings = {
        "weights": models.identity(models.find(config.teacher)),
        "prompts": data.source_key(source, tokenizer, config.data.max_prompt_tokens),
        "temperature": config.temperature,
        "max_new_tokens": length,
        "stop_ids": list(tokenizer.stop_ids),
        "seed": config.seed,
        "dtype": config.dtype,
    }

    def draw_rows(rows: np.ndarray) -> Samples:
        announce(f"teacher: drawing trajectories once; they are kept in {config.cache}")
        padded = pad_rows(rows, mesh, at_least=CHUNK_ROWS)  # one shape, one compile
        batch = encode(source, tokenizer, padded, config, length)
        samples = draw(teacher_params, shard_batch(batch, mesh), run_key(config, TEACHER), length)
        return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], samples)

    return open_trajectories(Path(config.cache), settings, source.size, draw_rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _score_student(
    student: Model,
    teacher: Model | None,
    stops: Stops,
    chunk,
    vocabulary,
    mesh,
    params,
    teacher_params,
    rollout,
):
    return score(
        student,
        params,
        teacher,
        teacher_params,
        rollout,
        stops=stops,
        chunk=chunk,
        vocabulary=vocabulary,
        mesh=mesh,
    )


def _head_chunk(config: Config, tokenizer: Tokenizer) -> int:
    """Tokens a chunk of the loss head: what fits head_memory_mib of each device, if it is given;
    else 8 % of the device's memory (128 MiB on CPU), and at most 1,024."""
    if config.head_memory_mib is not None:
        return chunk_tokens(config.head_memory_mib * 2**20, tokenizer.size)
    device = jax.local_devices()[0]
    stated = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return min(1024, chunk_tokens(0.08 * stated if stated else 128 * 2**20, tokenizer.size))
