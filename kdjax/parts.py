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
from kdjax.programs import (
    TEACHER_WEIGHTS,
    Programs,
    Shapes,
    choose_mesh,
    compose,
    head_chunk,
    sampling,
    to_sampler,
)
from kdjax.progress import announce
from kdjax.rollout import from_dataset, from_student, from_teacher
from kdjax.sampler import Samples
from kdjax.score import score
from kdjax.sharding import data_size, shard_batch
from kdjax.stops import Stops
from kdjax.student import Student, open_student
from kdjax.tokenizer import Tokenizer, load_pair, load_tokenizer
from kdjax.trajectories import CHUNK_ROWS, open_trajectories

ROLLOUT, MEASURE, EVALUATE, TEACHER, ADAPTER = range(5)  # purposes of the run key


class Parts(NamedTuple):
    """Everything a run is made of, built once from its config.

    initial_params are those that are trained, frozen those that are not; `programs.step` takes the
    trained ones, `whole` makes of them what `programs.student` reads.
    """

    config: Config
    programs: Programs
    tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer
    initial_params: Params
    frozen: Params | None
    whole: Callable[[Params], Params]
    teacher_params: Params | None
    source: data.Source
    prefix: PrefixSource
    identities: dict[str, str]

    @property
    def mesh(self) -> Mesh:
        return self.programs.mesh


def build(config: Config) -> Parts:
    """Load models and data, compose the programs. Here names become folders and weights."""
    student_folder = models.find(config.student)
    teacher_folder = None if config.teacher is None else models.find(config.teacher)
    thinking = config.data.thinking
    if teacher_folder is None:
        tokenizer = teacher_tokenizer = load_tokenizer(student_folder, thinking=thinking)
    else:
        tokenizer, teacher_tokenizer = load_pair(student_folder, teacher_folder, thinking=thinking)
    shapes = Shapes(
        models.read_config(student_folder),
        None if teacher_folder is None else models.read_config(teacher_folder),
        tokenizer.size,
        tokenizer.stop_ids,
        teacher_tokenizer.stop_ids,
    )
    mesh = choose_mesh(config, jax.local_devices(), shapes.student, shapes.teacher)
    programs = compose(config, mesh, shapes)
    source = training_source(config)
    _check_data(config, source)
    student = _open_student(config, student_folder, programs)
    teacher_params = None
    if teacher_folder is not None:
        _, teacher_params = models.load(
            teacher_folder,
            mesh,
            params_dtype=jnp.dtype(config.dtype),
            hold=TEACHER_WEIGHTS[config.teacher_weights],
        )
    # the teacher answers the student's prompts, token by token, and stops in its own way
    read_by_teacher = tokenizer._replace(stop_ids=teacher_tokenizer.stop_ids)
    prefixes: dict[str, Callable[[], PrefixSource]] = {
        "dataset": lambda: from_dataset,
        "student": lambda: from_student(_student_draw(config, programs, tokenizer, student)),
        "teacher": lambda: from_teacher(
            _teacher_trajectories(config, programs, read_by_teacher, teacher_params, source)
        ),
    }
    return Parts(
        config, programs, tokenizer, teacher_tokenizer, student.trained, student.frozen,
        student.whole, teacher_params, source, prefixes[config.prefix](), identities(config),
    )  # fmt: skip


def fresh_state(parts: Parts) -> TrainState:
    """Step 0 on the mesh: the student's parameters, and an optimizer state that lies beside
    them."""
    like = jax.tree.map(lambda leaf: leaf.sharding, parts.programs.state)
    params = parts.initial_params
    opt_state = jax.jit(parts.programs.optimizer.init, out_shardings=like.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), like.step), params, opt_state)


def draw_student(parts: Parts, params: Params, batch: Batch, key: Key, length: int) -> Samples:
    """Responses of a student with these trained parameters, at the training temperature."""
    draw = _student_draw(parts.config, parts.programs, parts.tokenizer, parts)
    return draw(params, batch, key, length)


def _open_student(config: Config, folder: Path, programs: Programs) -> Student:
    """The student's weights, divided as the config says, where the programs want them."""
    dtype = jnp.float32 if programs.lora is None else jnp.dtype(config.dtype)
    _, params = models.load(folder, programs.mesh, params_dtype=dtype)
    student = open_student(programs.lora, programs.student.config, params, run_key(config, ADAPTER))
    places = jax.tree.map(lambda leaf: leaf.sharding, programs.state.params)
    return student._replace(trained=jax.device_put(student.trained, places))


def _student_draw(config: Config, programs: Programs, tokenizer: Tokenizer, student):
    """`student` knows by `whole` what the sampler reads of trained parameters."""
    draw = sampling(
        programs.student_sampler, tokenizer.stop_ids, tokenizer.size, config.temperature
    )
    return lambda trained, batch, key, length: draw(
        programs.to_sampler(student.whole(trained)), batch, key, max_new_tokens=length
    )


def _check_data(config: Config, source: data.Source) -> None:
    if config.batch_size > source.size:
        raise ConfigError(
            f"batch_size {config.batch_size} is over the {source.size} training problems;"
            " a problem would be sampled twice with one key"
        )
    if config.prefix == "dataset":
        data.require_solutions(source, [0])


def startup_report(parts: Parts) -> str:
    """What the run of these parts is about to do. Errors: DataError, as `startup.report`."""
    programs = parts.programs
    return startup.report(
        parts.config,
        parts.mesh,
        (parts.tokenizer, parts.teacher_tokenizer),
        programs.student,
        programs.student_params,
        programs.teacher,
        parts.teacher_params,
        trained=programs.state.params,
        frozen=programs.frozen,
        stops=programs.stops,
        chunk=head_chunk(parts.config, parts.mesh, parts.tokenizer.size),
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
    """The config's evaluation of any parameters of the student's shape (whole, see `Parts`); its
    KLs and entropy are of the config's stop policy, as the loss's."""
    config, settings, programs = parts.config, parts.config.evaluation, parts.programs
    places = jax.tree.map(lambda leaf: leaf.sharding, programs.student_params)
    params = jax.device_put(params, places)
    sampler_params = programs.to_sampler(params)
    draw = sampling(
        programs.student_sampler,
        parts.tokenizer.stop_ids,
        parts.tokenizer.size,
        settings.temperature,
    )
    scorer = functools.partial(
        _score_student,
        programs.student,
        programs.teacher,
        programs.stops,
        head_chunk(config, parts.mesh, parts.tokenizer.size),
        parts.tokenizer.size,
        parts.mesh,
    )
    return evaluate(
        lambda batch, key, length: draw(sampler_params, batch, key, max_new_tokens=length),
        lambda rollout: scorer(params, parts.teacher_params, rollout),
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


def _teacher_trajectories(config, programs: Programs, tokenizer, teacher_params, source):
    """read(rows) -> the teacher's responses, drawn once for all runs that ask for the same."""
    mesh, model = programs.mesh, programs.teacher_sampler
    assert model is not None  # validate: prefix teacher has one
    draw = sampling(model, tokenizer.stop_ids, tokenizer.size, config.temperature)
    length = config.curriculum.lengths[-1]
    settings = {
        "weights": models.identity(models.find(config.teacher)),
        "prompts": data.source_key(source, tokenizer, config.data.max_prompt_tokens),
        "temperature": config.temperature,
        "max_new_tokens": length,
        "stop_ids": list(tokenizer.stop_ids),
        "seed": config.seed,
        "dtype": config.dtype,
        "teacher_weights": config.teacher_weights,
    }

    def draw_rows(rows: np.ndarray) -> Samples:
        announce(f"teacher: drawing trajectories once; they are kept in {config.cache}")
        padded = pad_rows(rows, mesh, at_least=CHUNK_ROWS)  # one shape, one compile
        batch = encode(source, tokenizer, padded, config, length)
        reads = to_sampler(programs.teacher_params, jnp.dtype(config.dtype), mesh)
        samples = draw(
            reads(teacher_params),
            shard_batch(batch, mesh),
            run_key(config, TEACHER),
            max_new_tokens=length,
        )
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
