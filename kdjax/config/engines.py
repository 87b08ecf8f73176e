"""How responses are drawn, and by which engines drawn and scored: fields and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from kdjax.errors import ConfigError
from kdjax.losses.combinators import runs_on
from kdjax.losses.composition import describe
from kdjax.losses.topk import BY_SAMPLED
from kdjax.rollouts.engine_client import check_url


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """How responses are drawn, by student and teacher, in training and evaluation alike.

    rows: decoded at a time, at most. cache_gib: what their KV cache may take of a device; by
    default a quarter of an accelerator's memory, or 0.25 GiB. kv_cache: keys and values as they are
    computed, or in int8, half of bfloat16's memory, which changes log-probabilities a little.
    gap_limit_nats: training stops where sampler and scorer differ by more, in the mean over a
    batch's tokens, about the log-probability of what the student drew. ahead: draw (or
    read) the next step's rollout while this step trains; the student's are then one update old.
    engine: the URL of an OpenAI-compatible server (docs/engines.md) that draws in place of this
    process, for teacher prefixes and `kdjax rollouts`; engine_model is its name for the model (by
    default the config's), engine_log_probs what its log-probabilities describe; engine_seeds none
    is for one that takes no seeds, whose draws can't be repeated. So many requests are in flight,
    each answered within so many seconds or tried again. With prefix student the student's weights
    are published to it every engine_every steps, in a folder that both see (engine_folder, by
    default in the run's), by its own way of reloading (engine_speaks). reward_workers,
    reward_seconds: rewards that are computed at a time, and how long those of a batch may take
    (answers of reward math have a deadline each).
    """

    rows: int = 512
    cache_gib: float | None = None
    kv_cache: Literal["compute", "int8"] = "compute"
    gap_limit_nats: float = 0.1
    ahead: bool = False
    engine: str | None = None
    engine_model: str | None = None
    engine_log_probs: Literal["raw", "tempered", "drawn"] = "raw"
    reward_workers: int = 4
    reward_seconds: float = 60.0
    engine_seeds: Literal["rows", "none"] = "rows"
    engine_at_once: int = 32
    engine_timeout_seconds: float = 600.0
    engine_retries: int = 4
    engine_speaks: Literal["vllm", "sglang"] = "vllm"
    engine_every: int = 1
    engine_folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """A teacher that an engine scores as: the server at `url` reads each response and answers with
    its `top_k` most probable tokens and the sampled one (docs/engines.md). `teacher` names the
    model's tokenizer and shape; its weights are not loaded.

    model: the engine's name for it, by default the config's `teacher`. speaks: vllm, whose words
    tpu-inference has too, or sglang. top_k: vLLM refuses more than 20 unless it is started with
    --max-logprobs. How many requests are in flight, and their deadlines, are of `Rollouts`.
    check_rows: so many rows are scored at the start by the teacher's weights too, which are loaded
    for that; the difference is told. 0: none.
    """

    url: str | None = None
    model: str | None = None
    speaks: Literal["vllm", "sglang"] = "vllm"
    top_k: int = 20
    check_rows: int = 0


def check_rollouts(rollouts: Rollouts, save_every_steps: int) -> None:
    """Errors: ConfigError for a setting that nothing can be drawn with, or not drawn alike by a run
    that is resumed."""
    if rollouts.rows < 1 or not (rollouts.cache_gib or 1.0) > 0:
        raise ConfigError(
            f"rollouts.rows and rollouts.cache_gib must be over 0, got {rollouts.rows} and"
            f" {rollouts.cache_gib}"
        )
    if rollouts.engine is not None:
        check_url(rollouts.engine, "rollouts.engine")
    for name, least in (("engine_at_once", 1), ("engine_retries", 0), ("engine_every", 1)):
        if getattr(rollouts, name) < least:
            got = getattr(rollouts, name)
            raise ConfigError(f"rollouts.{name} must be at least {least}, got {got}")
    if save_every_steps % rollouts.engine_every:
        raise ConfigError(
            f"save_every_steps {save_every_steps} is not a multiple of rollouts.engine_every"
            f" {rollouts.engine_every}, and a resumed run publishes at once; change one of them"
        )
    if not rollouts.engine_timeout_seconds > 0:
        raise ConfigError(
            f"rollouts.engine_timeout_seconds must be over 0, got {rollouts.engine_timeout_seconds}"
        )


def check_served(config: Any, methods: Sequence[Any]) -> None:
    """Errors: ConfigError where an engine can't score as the teacher of this `Config`. methods:
    those of its timetable."""
    served = config.served
    if served.url is None:
        if served != Served():
            raise ConfigError(f"served.url is not set, so nothing else of {served} has an effect")
        return
    check_url(served.url, "served.url")
    if config.teacher is None:
        raise ConfigError(
            "served.url needs teacher beside it, one model's name or folder: its tokenizer and"
            " shape are read, its weights are not"
        )
    for name, least in (("top_k", 1), ("check_rows", 0)):
        if getattr(served, name) < least:
            got = getattr(served, name)
            raise ConfigError(f"served.{name} must be at least {least}, got {got}")
    for field, held, wanted, why in (
        ("stops", config.stops == "merge", "raw or mask", "its tokens outside the top k are one"),
        ("least_aligned", config.least_aligned is not None, "None", "it reads the same ids"),
        ("layout.teacher_devices", config.layout.teacher_devices, "0", "its weights are not here"),
        ("teacher_weights", config.teacher_weights != "compute", "compute",
         "its weights are not here"),
    ):  # fmt: skip
        if held:
            raise ConfigError(f"served.url: an engine scores, and {why}; set {field} {wanted}")
    for method in methods:
        drawn = method.prefix == "teacher" and config.trajectories is None
        if drawn and config.rollouts.engine is None:
            raise ConfigError(
                "prefix teacher, and the teacher is served: let an engine draw its responses too"
                " (rollouts.engine)"
            )
        if not runs_on(method.objective, *BY_SAMPLED):
            raise ConfigError(
                f"objective {describe(method.objective)} needs more of the teacher than the top"
                f" {served.top_k} and the sampled token, which an engine says; use another, or"
                " leave served out"
            )
