"""The student behind an engine: its weights are published to it, and it draws the rollouts."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.base import Batch, Params, Sampler
from kdjax.config.schema import Config
from kdjax.errors import ConfigError
from kdjax.losses.topk import TAIL_FLOOR
from kdjax.models.lora import Student
from kdjax.rollouts.engine import open_engine, row_seeds
from kdjax.rollouts.engine_client import Engine, open_client
from kdjax.rollouts.engine_scores import Scorer, open_scorer
from kdjax.rollouts.engine_weights import open_check, reload
from kdjax.sharding import rows_on_host, shard_batch
from kdjax.training.parts.programs import Programs, jitted_logp
from kdjax.training.parts.roles import Role
from kdjax.training.parts.teachers import as_responses

KEPT = 2
"""Folders of published weights that stay: the engine's own, and the one before."""


class Published(NamedTuple):
    """The student's engine.

    - draw: its sampler, of the weights published last; it takes None as parameters.
    - publish(trained, number) publishes the trained parameters for the rollout of step `number`,
      where that is due (`rollouts.engine_every`).
    - drawn_since() -> the step whose rollout was the first of the published weights.
    """

    draw: Sampler
    publish: Callable[[Params, int], None]
    drawn_since: Callable[[], int]


class _Opened(NamedTuple):
    engine: Engine
    draw: Sampler
    score: Scorer


def open_published(
    config: Config, role: Role, programs: Programs, student: Student, batch: Batch
) -> Published:
    """The engine of `rollouts.engine` as the student's sampler; it is first asked when weights are
    published.

    A publication is a new folder, renamed into place when it is whole, with an LM head of its own
    (a tied one stays stale in vLLM on CPUs); then the engine reads it, and scores the prompts of
    `batch`, which must come out as the trainer scores them with those weights (`open_check`).

    Errors, of `publish`: ConfigError, EngineError where the engine is not up, serves another model
    or can't draw so, and where it does not serve what was published.
    """
    opened = functools.cache(functools.partial(_open, config, role))
    rows = as_responses(batch)
    here, check = shard_batch(rows, programs.mesh), open_check(config.rollouts.gap_limit_nats)
    inside = np.arange(rows.sampler_logp_bt.shape[1])[None] < rows.response_length_b[:, None]
    folder = Path(config.rollouts.engine_folder or Path(config.run) / "published")
    versions = list[int]()

    def publish(trained: Params, number: int) -> None:
        every = config.rollouts.engine_every
        if versions and versions[-1] // every == number // every:
            return
        engine, _, score = opened()
        if not versions:
            for old in folder.glob("version-*"):  # of this run, before it was resumed
                shutil.rmtree(old)
        whole, place = student.whole(trained), folder / f"version-{number:06d}"
        models.write_folder(place, whole, role.folder, jnp.dtype(config.dtype), untied=True)
        reload(engine, config.rollouts.engine_speaks, place, number)
        own = jitted_logp(programs.student.model, whole, here, plan=programs.head)
        said = np.asarray(score(rows).sampled_logp)
        of = f"engine at {engine.url}, version {number}"
        check(said[inside], np.asarray(rows_on_host(own))[inside], of)
        versions.append(number)
        for gone in versions[:-KEPT]:
            shutil.rmtree(folder / f"version-{gone:06d}", ignore_errors=True)

    return Published(lambda *asked: opened().draw(*asked), publish, lambda: versions[-1])


def _open(config: Config, role: Role) -> _Opened:
    """Errors: ConfigError, EngineError."""
    rollouts, tokenizer = config.rollouts, role.tokenizer
    assert rollouts.engine is not None
    if jax.process_count() > 1:
        raise ConfigError("rollouts.engine draws the student's rollouts in runs of one process")
    named = rollouts.engine, rollouts.engine_model or role.name
    asking: dict[str, Any] = {
        "at_once": rollouts.engine_at_once,
        "timeout_s": rollouts.engine_timeout_seconds,
        "retries": rollouts.engine_retries,
    }
    draw = open_engine(
        *named, stop_ids=tokenizer.stop_ids, vocabulary=tokenizer.size, sampling=config.sampling,
        log_probs=rollouts.engine_log_probs,
        longest=config.data.max_prompt_tokens + config.curriculum.lengths[-1],
        seeds=row_seeds if rollouts.engine_seeds == "rows" else None, **asking,
    )  # fmt: skip
    score = open_scorer(
        *named, k=1, vocabulary=tokenizer.size, speaks=rollouts.engine_speaks, **asking
    )
    return _Opened(open_client(*named, "rollouts.engine", **asking), draw, score)


def about_engines(config: Config, teachers: dict[str, Role | None], draws: bool) -> Iterator[str]:
    """What engines do in a run; draws: the student's rollouts."""
    served, role = config.served, teachers.get("")
    if served.url is not None and role is not None:
        yield (
            f"teacher: an engine at {served.url} scores as {served.model or role.name}: the top"
            f" {served.top_k} tokens and the sampled one; a tail under {TAIL_FLOOR:g} counts so"
        )
    if draws:
        every = config.rollouts.engine_every
        yield (
            f"rollouts: an engine at {config.rollouts.engine} draws the student's, which is"
            f" published to it {'before each' if every == 1 else f'every {every} steps'}; the"
            " evaluation draws here"
        )
