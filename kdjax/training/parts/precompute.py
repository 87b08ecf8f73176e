"""Trajectories of a config: responses that are drawn once, with the teacher's outputs to keep.

`kdjax rollouts` fills a folder with them (kdjax/storage/trajectories.py) before training; the
prefix source teacher fills one in the cache, as problems are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import (
    Batch,
    Key,
    Model,
    Params,
    PrefixSource,
    Rollout,
    Sampler,
    Samples,
    Trajectories,
)
from kdjax.config.schema import Config, Prefix
from kdjax.data import batches
from kdjax.data.teacher_prompts import TeacherPrompts
from kdjax.errors import ConfigError, DataError, EngineError
from kdjax.rollouts.engine import open_engine, row_seeds
from kdjax.rollouts.engine_client import client_package
from kdjax.rollouts.engine_scores import Scorer
from kdjax.rollouts.prefix import (
    assemble_samples,
    dataset_samples,
    from_teacher,
    from_trajectories,
)
from kdjax.rollouts.widths import trim
from kdjax.runtime import processes
from kdjax.runtime.files import differences
from kdjax.sharding import owners, pad_rows, shard_batch
from kdjax.step.score import HeadPlan, response_top_k, teacher_states
from kdjax.storage import trajectories as folders
from kdjax.training.parts.precomputed import NOTHING, Keep, Stored, of_tag
from kdjax.training.parts.problems import encode
from kdjax.training.parts.programs import Programs
from kdjax.training.parts.roles import Role
from kdjax.training.parts.sampling import read_by_sampler, sampler_of
from kdjax.training.parts.teachers import Teacher, scorer_of


def parse_share(text: str | None) -> tuple[int, int]:
    """(index, count) of this process among those that fill a folder together, by default those of
    `jax.distributed`. Errors: ConfigError.

    >>> parse_share("1/4")
    (1, 4)
    """
    if text is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--share is INDEX/COUNT with INDEX below COUNT, such as 0/2, got {text}")
    return int(found[1]), int(found[2])


class Asked(NamedTuple):
    """A tag's problems, `rows` of the source, with everything that draws and reads their responses.

    prefix: who draws them. teacher: reads them; role and weights may be None. key: of the draw.
    draw_student: (batch, key, max_new_tokens) -> Samples with the student's initial parameters.
    theirs: the prompts that the teacher reads, and draws after, if these are others.
    """

    config: Config
    prefix: Prefix
    programs: Programs
    student: Role
    teacher: Teacher
    tag: str
    rows: np.ndarray
    source: batches.Source
    key: Key
    draw_student: Callable[[Batch, Key, int], Samples]
    theirs: TeacherPrompts | None = None


def settings_of(asked: Asked, keep: Keep) -> dict[str, Any]:
    """Everything that decides the trajectories of these problems, as JSON values; without a
    teacher's role nothing of the teacher."""
    config, prefix, tokenizer = asked.config, asked.prefix, asked.student.tokenizer
    teacher = asked.teacher.role
    found = batches.source_key(asked.source, tokenizer, config.data.max_prompt_tokens) | {
        "prefix": prefix,
        "vocabulary": tokenizer.size,
        "rows": len(asked.rows),
        "chunk_rows": folders.CHUNK_ROWS,
        "max_new_tokens": config.curriculum.lengths[-1],
        "dtype": config.dtype,
        "keep": str(keep),
    }
    if asked.tag:
        found["tag"] = asked.tag
    if prefix != "dataset":
        found |= {"sampling": dataclasses.asdict(config.sampling), "seed": config.seed}
        found["kv_cache"] = config.rollouts.kv_cache
        if config.rollouts.engine is not None:
            found["engine"] = config.rollouts.engine_model or "the model's own name"
    if prefix != "teacher":
        found["stop_ids"] = list(tokenizer.stop_ids)
    if prefix == "student":
        found["weights"] = asked.student.identity
    if teacher is None:
        return found
    if prefix == "teacher":
        found |= {"weights": teacher.identity, "stop_ids": list(teacher.tokenizer.stop_ids)}
    if keep != NOTHING:
        found |= {"teacher": teacher.identity, "teacher_stop_ids": list(teacher.tokenizer.stop_ids)}
    if keep.kind == "top_k":
        found["sampled_logp"] = True
    if keep != NOTHING and config.served.url is not None:
        found["served"] = config.served.model or teacher.name
    if keep != NOTHING or prefix == "teacher":
        found["teacher_weights"] = config.teacher_weights
    if asked.theirs is not None and (keep != NOTHING or prefix == "teacher"):
        found["teacher_prompts"] = batches.source_key(*asked.theirs)
    return found


def from_cache(asked: Asked, needed: Callable[[], np.ndarray]) -> PrefixSource:
    """The teacher's responses, drawn into the cache once for all runs that need the same, in the
    order of the rows of the source that are `needed`: one process draws some hundreds at a time, as
    the steps come to them; several draw all of them together, before the run begins."""

    together = owners(asked.programs.mesh) > 1

    def open_cache() -> folders.Draw:
        settings = settings_of(asked, NOTHING)
        place = folders.place_of(Path(asked.config.cache), settings)

        def places() -> np.ndarray:
            return np.searchsorted(asked.rows, needed())

        if together:
            return _fill_together(asked, place, settings, places())
        return folders.open_trajectories(place, settings, drawer(asked, NOTHING), places)

    read = functools.cache(open_cache)
    if together:
        read()
    return from_teacher(lambda rows: read()(np.searchsorted(asked.rows, rows)).samples)


DECISIVE = (
    "prefix", "problems", "tokenizer", "template", "tag", "rows", "weights", "sampling", "stop_ids",
    "teacher_prompts",
)  # fmt: skip
OF_TEACHER = ("teacher", "vocabulary", "dtype", "teacher_weights", "teacher_stop_ids")
"""Settings in which a config must agree with a folder of responses, and of teacher outputs."""


def from_stored(asked: Asked, stored: Stored) -> PrefixSource:
    """The responses of a folder whose settings agree with the config's.

    Errors: ConfigError naming the settings that differ.
    """
    wanted = settings_of(asked, stored.keep)
    names = DECISIVE if stored.keep == NOTHING else (*DECISIVE, *OF_TEACHER)
    unknown: tuple[str, ...] = ()
    if asked.teacher.role is None:  # its files may be elsewhere
        unknown = ("teacher", "teacher_weights", "teacher_stop_ids", "teacher_prompts")
        unknown += ("weights", "stop_ids") if asked.prefix == "teacher" else ()
    told = stored.settings.get("teacher_prompts", {"problems": None})["problems"]
    if unknown and stored.keep != NOTHING and asked.theirs and told != asked.theirs.source.identity:
        raise ConfigError(
            f"trajectories {stored.path} hold nothing of a teacher that read this"
            " data.teacher_prompt_template; set that of their drawing, or leave it out"
        )
    old, new = (
        {n: s[n] for n in names if n in s and n not in unknown} for s in (stored.settings, wanted)
    )
    changed = differences(old, new)
    if changed:
        raise ConfigError(
            f"trajectories {stored.path} are not this config's: {'; '.join(changed)};"
            " set the old values, or draw others: kdjax rollouts CONFIG --out FOLDER"
        )
    read = folders.reader(stored.path, stored.settings)
    return from_trajectories(lambda rows: read(np.searchsorted(asked.rows, rows)))


def _fill_together(
    asked: Asked, folder: Path, settings: dict[str, Any], places: np.ndarray
) -> folders.Draw:
    """Every process draws its share of the pieces of these places; the reader of all, once all
    have.

    Errors: DataError where the pieces of another process can't be seen here.
    """
    reads = None
    if asked.teacher.params is not None:
        reads = _teacher_reads(asked)  # once: it takes all processes, and they draw by themselves
    draw = drawer(asked, NOTHING, reads)
    share = jax.process_index(), jax.process_count()
    pieces = folders.fill_pieces(folder, settings, draw, places, share)
    processes.gather(None)
    if missing := folders.lacking(folder, pieces):
        raise DataError(
            f"{folder}: {missing} pieces that other processes drew are not seen here;"
            " set --cache to a folder that all of them see"
        )
    return folders.reader(folder, settings, pieces)


def fill(
    asked: Asked, out: str | None, keep: Keep, share: tuple[int, int], redo: bool
) -> tuple[Path, int]:
    """(a tag's folder, the number of chunks drawn now).

    Args:
        asked: the problems.
        out: the folder above the tag's; None: the one in the cache, which the prefix source
            teacher reads where nothing is kept.
        keep: the teacher's outputs to store.
        share: (index, count): this process's part of the chunks.
        redo: draws chunks again that are there.

    Errors: ConfigError for outputs to keep without a teacher, or more than its vocabulary; and as
    `trajectories.fill`.
    """
    if keep != NOTHING and asked.teacher.role is None:
        raise ConfigError(f"--keep {keep} needs a teacher; set teacher, or leave --keep out")
    if keep.kind == "states" and asked.config.served.url is not None:
        raise ConfigError("--keep states: an engine says no states; keep its top, --keep top_k=20")
    if keep != NOTHING and asked.config.least_aligned is not None:
        raise ConfigError(
            f"--keep {keep} is of the student's tokens, and least_aligned is for a teacher of other"
            " ones; leave --keep out"
        )
    if keep.k > asked.student.tokenizer.size:
        raise ConfigError(
            f"--keep {keep} is over the vocabulary of {asked.student.tokenizer.size} tokens; keep"
            " fewer"
        )
    settings = settings_of(asked, keep)
    place = folders.place_of(Path(asked.config.cache), settings)
    if out is not None:
        place = of_tag(Path(out), asked.tag)
    made = folders.fill(place, settings, drawer(asked, keep), share=share, redo=redo)
    return place, made


def drawer(asked: Asked, keep: Keep, reads: Params | None = None) -> folders.Draw:
    """draw(places in asked.rows) -> Trajectories as host arrays. reads: the teacher's parameters
    for its sampler; None: they are made at each draw, and freed after it. Errors: ConfigError where
    an engine is to draw and its client is not installed."""
    by_engine = asked.config.rollouts.engine is not None and asked.prefix != "dataset"
    if by_engine:
        client_package()
    engine = functools.cache(functools.partial(_open_engine, asked))
    scores = functools.cache(functools.partial(_open_scores, asked, keep))

    def draw(places: np.ndarray) -> Trajectories:
        rows = asked.rows[places]
        samples = _draw_samples(asked, rows, reads, engine() if by_engine else None)
        if keep == NOTHING:
            return Trajectories(samples)
        if asked.config.served.url is not None:
            return Trajectories(samples, top_k_bt=scores()(_assembled(asked, rows, samples)))
        return _read(asked, keep, rows, samples)

    return draw


def _open_scores(asked: Asked, keep: Keep) -> Scorer:
    assert asked.teacher.role is not None  # fill: outputs are kept of a teacher
    return scorer_of(asked.config, asked.teacher.role, keep.k)


def _assembled(asked: Asked, rows: np.ndarray, samples: Samples) -> Rollout:
    return assemble_samples(_encode(asked, rows), samples)


def _draw_samples(
    asked: Asked, rows: np.ndarray, reads: Params | None, engine: Sampler | None
) -> Samples:
    """Responses to the student's prompts, the engine's if there is one; the teacher's are to the
    prompts that it reads, and end at its own stop ids."""
    prefix, length = asked.prefix, asked.config.curriculum.lengths[-1]
    if prefix == "dataset":
        batches.require_solutions(asked.source, [int(row) for row in rows])
    sources: dict[str, Callable[[Batch], Samples]] = {
        "dataset": lambda batch: dataset_samples(batch, length),
        "student": lambda batch: asked.draw_student(batch, asked.key, length),
        "teacher": lambda batch: _as_teacher(asked, _asked(asked, batch), length, reads),
    }
    if engine is not None:
        sources[prefix] = lambda batch: engine(None, _asked(asked, batch), asked.key, length)
    return jax.tree.map(np.asarray, sources[prefix](_encode(asked, rows)))


def _asked(asked: Asked, batch: Batch) -> Batch:
    """The batch with the prompts of whoever draws."""
    return batch.of_teacher() if asked.prefix == "teacher" else batch


def _as_teacher(asked: Asked, batch: Batch, length: int, reads: Params | None) -> Samples:
    config, teacher, mesh = asked.config, asked.teacher, asked.programs.teacher_mesh
    model, role = teacher.programs.sampler, teacher.role
    assert model is not None  # validate: prefix teacher has one
    assert role is not None
    stop_ids, size = role.tokenizer.stop_ids, role.tokenizer.size
    draw = sampler_of(config.rollouts, mesh, model, config.sampling, stop_ids, size)
    return draw(_teacher_reads(asked) if reads is None else reads, batch, asked.key, length)


def _teacher_reads(asked: Asked) -> Params:
    programs, dtype = asked.programs, jnp.dtype(asked.config.dtype)
    teacher = asked.teacher
    return read_by_sampler(teacher.programs.params, dtype, programs.teacher_mesh)(teacher.params)


def _open_engine(asked: Asked) -> Sampler:
    """The engine, which has the teacher's or the student's initial weights, once its context holds
    the longest row and it has drawn a token of the first: one that lists its models may end there.

    Errors: ConfigError, EngineError.
    """
    config, rollouts = asked.config, asked.config.rollouts
    assert rollouts.engine is not None
    own = asked.teacher.role if asked.prefix == "teacher" else asked.student
    assert own is not None
    own_prompts = TeacherPrompts(asked.source, asked.student.tokenizer, 0)
    drawn = (asked.theirs if asked.prefix == "teacher" else None) or own_prompts
    prompts = batches.encode_prompts(drawn.source, asked.rows.tolist(), drawn.tokenizer)
    sampler = open_engine(
        rollouts.engine,
        rollouts.engine_model or own.name,
        stop_ids=own.tokenizer.stop_ids,
        vocabulary=asked.student.tokenizer.size,
        sampling=config.sampling,
        log_probs=rollouts.engine_log_probs,
        longest=max(map(len, prompts)) + config.curriculum.lengths[-1],
        seeds=row_seeds if rollouts.engine_seeds == "rows" else None,
        at_once=rollouts.engine_at_once,
        timeout_s=rollouts.engine_timeout_seconds,
        retries=rollouts.engine_retries,
    )
    try:
        sampler(None, _asked(asked, _encode(asked, asked.rows[:1])), asked.key, 1)
    except EngineError as error:
        raise EngineError(
            f"{error} (asked for one token first; docs/engines.md names what ends an engine there)"
        ) from None
    return sampler


def _encode(asked: Asked, rows: np.ndarray) -> Batch:
    prompt, length = asked.config.data.max_prompt_tokens, asked.config.curriculum.lengths[-1]
    return encode(asked.source, asked.student.tokenizer, rows, prompt, length, asked.theirs)


def _read(asked: Asked, keep: Keep, rows: np.ndarray, samples: Samples) -> Trajectories:
    """The samples with the teacher's outputs to keep; it reads as many rows at a time as in a
    training step."""
    config, programs, teacher = asked.config, asked.programs, asked.teacher
    mesh, model = programs.teacher_mesh, teacher.programs.model
    assert model is not None
    apart = mesh is not programs.mesh
    at_once = config.batch_size if apart else config.batch_size // config.micro_batches
    read = _reader(model, keep, programs.head._replace(mesh=mesh))
    width, whole = samples.tokens_bt.shape[1], None
    for first in range(0, len(rows), at_once):
        own = np.arange(first, min(first + at_once, len(rows)))
        places = pad_rows(own, mesh, at_least=at_once)
        piece = jax.tree.map(lambda x, p=places: x[p], samples)
        rollout = trim(_assembled(asked, rows[places], piece))
        made = read(teacher.params, shard_batch(rollout, mesh))
        if whole is None:  # pages of zeros that nothing is written to take no memory
            shape = (len(rows), width)
            whole = jax.tree.map(lambda x, s=shape: np.zeros(s + x.shape[2:], x.dtype), made)
        for kept, new in zip(jax.tree.leaves(whole), jax.tree.leaves(made), strict=True):
            kept[own, : new.shape[1]] = np.asarray(new)[: len(own)]
    if keep.kind == "states":
        return Trajectories(samples, states_btd=whole)
    return Trajectories(samples, top_k_bt=whole)


@functools.lru_cache(maxsize=8)  # compiled once for all chunks
def _reader(model: Model, keep: Keep, plan: HeadPlan):
    """read(params, rollout) -> the teacher's outputs to keep, [B, T, ...]."""
    if keep.kind == "states":
        return jax.jit(functools.partial(teacher_states, model))
    return jax.jit(functools.partial(response_top_k, model, k=keep.k, plan=plan))
