"""The evaluation of a student by its config: sampler, scorer and grader."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.base import Batch, Key, Params, Rollout, Samples, Sampling, Scores
from kdjax.config.as_json import as_dict
from kdjax.config.evaluated import evaluated_at
from kdjax.config.schema import WHERE_IT_RUNS, Config
from kdjax.config.teachers import SELF
from kdjax.config.timetable import timetable
from kdjax.data import batches
from kdjax.evaluate import Chunk, Keep, evaluate, progress
from kdjax.grading.answers import Grader, grade_boxed, grade_flexible
from kdjax.grading.eval_report import EvalReport, unread
from kdjax.grading.symbolic import open_lenient, open_symbolic
from kdjax.report.folder import write_report
from kdjax.report.results import Cell, Row, to_json
from kdjax.rollouts.sampler import Drawn
from kdjax.runtime import processes
from kdjax.runtime.console import announce, response_progress
from kdjax.runtime.files import digest
from kdjax.runtime.settings import return_freed_memory
from kdjax.sharding import data_size, rows_on_host, shard_batch
from kdjax.storage import run_folder
from kdjax.storage.fingerprint import fingerprint
from kdjax.training.parts import precomputed
from kdjax.training.parts.build import Parts, identities
from kdjax.training.parts.memory import rows_at_once
from kdjax.training.parts.precomputed import NOTHING
from kdjax.training.parts.problems import EVALUATE, PROGRESS, run_key, test_source
from kdjax.training.parts.programs import TeacherPrograms, jitted_score
from kdjax.training.parts.sampling import sampler_of
from kdjax.training.parts.teachers import Teacher


def evaluation_key(config: Config) -> dict[str, Any]:
    """Everything that decides the results of an evaluation at the end of a run, as JSON values."""
    elsewhere = set(WHERE_IT_RUNS) - {"evaluation"}
    fields = {name: value for name, value in as_dict(config).items() if name not in elsewhere}
    fields["evaluation"] = {
        name: value
        for name, value in fields["evaluation"].items()
        if name not in ("every_steps", "samples_during_training")
    }
    fields["rollouts"] = {
        name: value
        for name, value in fields["rollouts"].items()
        if name not in ("reward_workers", "reward_seconds")
    }
    return {
        "config": fields,
        "identities": identities(config, timetable(config)),
        "test problems": test_source(config.data, config.evaluation).identity,
    }


def evaluate_params(parts: Parts, params: Params) -> tuple[EvalReport, list[dict[str, Any]]]:
    """The config's evaluation of any parameters of the student's shapes (an adapter merged), with
    the reports at its other temperatures beside it and the records of its own; its KLs and entropy
    follow the config's stop policy, as the loss's do."""
    params = _placed(parts, params)
    first, *others = evaluated_at(parts.config.evaluation)
    result, records = _evaluated(parts, params, first, "evaluation")
    also = (_evaluated(parts, params, other, f"evaluation at {other}")[0] for other in others)
    return result._replace(also=tuple(also)), records


def _evaluated(
    parts: Parts, params: Params, sampling: Sampling, title: str
) -> tuple[EvalReport, list[dict[str, Any]]]:
    """The report and the records of one way of sampling; title: what progress is shown under."""
    config, settings, programs = parts.config, parts.config.evaluation, parts.programs
    tokenizer, source = parts.tokenizer, parts.problems.test
    responses = source.size * settings.samples
    multiple = math.lcm(data_size(programs.mesh), data_size(programs.teacher_mesh))
    rows = rows_at_once(
        programs.student.sampler, programs.mesh, config.rollouts, responses,
        config.data.max_prompt_tokens, settings.max_new_tokens,
    )  # fmt: skip
    chunk, batch = sizes(responses, rows, settings.batch_size, multiple)
    weights = fingerprint(params)
    besides = {"weights": weights, "chunk_rows": chunk, "sampled": as_dict(sampling)}
    with (
        GRADERS[settings.grader]() as grader,
        response_progress(title, responses) as tally,
        _keeping(config, besides, chunk < responses) as keep,
    ):
        score = _scorer(parts, params, source)

        def scored(rollout: Rollout, problems: Sequence[int]) -> Scores:
            scores = score(rollout, problems)
            tally.scored(len(problems))
            return scores

        def kept(number: int, make: Callable[[], Chunk]) -> Chunk:
            found = keep(number, make)
            tally.finished(
                len(found["records"]), sum(record["tokens"] for record in found["records"])
            )
            return found

        result, records = evaluate(
            _evaluation_draw(parts, params, sampling, tally.drawn),
            scored,
            source,
            tokenizer,
            run_key(config.seed, EVALUATE),
            grader=(settings.grader, grader),
            samples=settings.samples,
            k=settings.k,
            sampling=sampling,
            max_new_tokens=settings.max_new_tokens,
            max_prompt_tokens=config.data.max_prompt_tokens,
            batch_size=batch,
            chunk_rows=chunk,
            seed=config.seed,
            keep=kept,
        )
    if said := unread(result, records):
        announce(f"{title}: {said}")
    return result._replace(weights=weights), records


CHUNK_BATCHES = 4
"""Batches of the sampler that are drawn and stored together, at most: its later levels have full
batches of the long responses of all of them."""


def sizes(responses: int, rows: int, batch_size: int, multiple: int) -> tuple[int, int]:
    """(responses drawn and stored together, those scored at a time), whose parts are nearly equal,
    so that little is padding: of an evaluation a quarter is drawn together, at least `rows` and at
    most CHUNK_BATCHES times as many.

    Args:
        responses: of the evaluation.
        rows: that the sampler decodes at a time: those of rollouts.rows whose cache fits.
        batch_size: the most that are scored at a time, if it is a multiple.
        multiple: what the rows of a batch are a multiple of.

    >>> sizes(20, 512, 128, 1), sizes(2048, 512, 128, 1), sizes(1000, 512, 128, 8)
    ((20, 20), (512, 128), (512, 128))
    """
    most = max(rows, min(CHUNK_BATCHES * rows, -(-responses // 4)))
    together = -(-responses // -(-responses // most))
    batch = -(-together // -(-together // batch_size))
    batch = -(-batch // multiple) * multiple
    return -(-together // batch) * batch, batch


@contextlib.contextmanager
def _keeping(config: Config, besides: dict[str, Any], stores: bool) -> Iterator[Keep]:
    """A `Keep` that stores finished chunks in the cache until the evaluation ends, under all that
    decides them, so that a killed one continues after them. A single chunk is not stored."""
    if not stores:
        yield lambda number, make: make()
        return
    key = evaluation_key(config) | besides | {"versions": run_folder.versions()}
    folder = Path(config.cache) / "evaluations" / digest(key)

    def keep(number: int, make: Callable[[], Chunk]) -> Chunk:
        chunk = processes.from_first(lambda: run_folder.read_chunk(folder, number))
        return run_folder.write_chunk(folder, number, make()) if chunk is None else chunk

    yield keep
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)


def write_results(folder: Path, row: Row, config: Config) -> None:
    """An evaluation as a folder: evaluation.json with all that decides it, samples.jsonl, and the
    report as a page and in Markdown. Errors: StorageError."""
    key = evaluation_key(config) | {"weights": row.report.weights}
    run_folder.write_evaluation(folder, key, to_json(row.report), row.samples)
    cells, title = [Cell(row.name, [row])], f"Evaluation of {row.name}"
    about = {
        "student": config.student,
        "weights": row.report.weights,
        "prompt": row.report.template,
        "seed": config.seed,
        **run_folder.versions(),
    }
    write_report(folder, title, cells, about, table=None)


GRADERS: dict[str, Callable[[], contextlib.AbstractContextManager[Grader]]] = {
    "exact": lambda: contextlib.nullcontext(grade_boxed),
    "exact_flexible": lambda: contextlib.nullcontext(grade_flexible),
    "math": open_symbolic,
    "math_lenient": open_lenient,
}
"""The verifiers by evaluation.grader; each is opened for a `with` block."""


def progress_of(parts: Parts, params: Params, step: int) -> dict[str, Any]:
    """The test metrics (`progress`) of a student with these trained parameters after `step` steps:
    a pure function of its arguments."""
    config, settings = parts.config, parts.config.evaluation
    with GRADERS[settings.grader]() as grader:
        return progress(
            _evaluation_draw(parts, _placed(parts, parts.student.whole(params)), settings.sampling),
            parts.problems.test,
            parts.tokenizer,
            run_key(config.seed, PROGRESS, step),
            samples=settings.samples_during_training,
            grader=grader,
            max_new_tokens=settings.max_new_tokens,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )


def _placed(parts: Parts, params: Params) -> Params:
    places = jax.tree.map(lambda leaf: leaf.sharding, parts.programs.student.params)
    return jax.device_put(params, places)


def _evaluation_draw(
    parts: Parts,
    params: Params,
    sampling: Sampling,
    drawn: Drawn = lambda ended, tokens: None,
) -> Callable[[Batch, Key, int], Samples]:
    """draw(batch, key, length) of a student with these parameters, sampled so."""
    config, programs = parts.config, parts.programs
    draw = sampler_of(
        config.rollouts,
        programs.mesh,
        programs.student.sampler,
        sampling,
        parts.tokenizer.stop_ids,
        parts.tokenizer.size,
        drawn,
    )
    reads = programs.student.to_sampler(params)

    def draw_and_free(batch: Batch, key: Key, length: int) -> Samples:
        samples = draw(reads, batch, key, length)
        return_freed_memory()  # of the KV cache, before anything is scored
        return samples

    return draw_and_free


def _scorer(parts: Parts, params: Params, source: batches.Source):
    """score(rollout, problem of each row) -> Scores against the teacher of the problem's tag; where
    any problem of the source has a tag without a teacher, against none."""
    programs, teachers = parts.programs, parts.teachers
    tags = batches.tags_of(source, list(teachers))
    foreign = sorted({*tags.tolist()} - {*teachers})
    kept = precomputed.kept_of(parts.responses.stored) != NOTHING
    own, other = parts.config.teacher == SELF, parts.config.least_aligned is not None
    served = parts.config.served.url is not None
    if own:
        announce("evaluation: no KL to a teacher, as the student is its own")
    elif other:
        announce("evaluation: no KL to a teacher, as its tokenizer is not the student's")
    elif kept or served:
        how = "an engine scores as it" if served else "its outputs were read from a folder"
        announce(
            f"evaluation: no KL to a teacher, as {how} and it is not loaded;"
            f" kdjax evaluate {parts.config.run} --teacher MODEL has it"
        )
    elif foreign:
        announce(f"evaluation: no KL to a teacher, as problems have the tags {foreign} of none")
    if own or kept or served or foreign or other:
        tags, teachers = np.full(source.size, ""), {"": Teacher(None, TeacherPrograms())}

    def against(tag: str, rollout: Rollout) -> Scores:
        teacher = teachers[tag]
        read = teacher.programs.read(teacher.params, shard_batch(rollout, parts.mesh))
        scores = jitted_score(
            programs.student.model, teacher.programs.guide, programs.head, params, teacher.given,
            read,
        )  # fmt: skip
        return rows_on_host(scores)

    def score_by_tag(rollout: Rollout, problems: Sequence[int]) -> Scores:
        tags_b = tags[np.asarray(problems)]
        asked = processes.gather(list(dict.fromkeys(tags_b.tolist())))
        first, *others = dict.fromkeys(tag for own in asked for tag in own)
        scores = against(first, rollout)
        for tag in others:
            own = (tags_b == tag)[:, None]
            scores = jax.tree.map(functools.partial(np.where, own), against(tag, rollout), scores)
        return scores

    return score_by_tag
