"""train.parts.problems."""

from __future__ import annotations

import jax

from kdjax.base import Batch, Key
from kdjax.config.schema import Config
from kdjax.config.timetable import methods
from kdjax.data import batches
from kdjax.data.tokenizer import Tokenizer

ROLLOUT, MEASURE, EVALUATE, TRAJECTORIES, ADAPTER, PROGRESS = range(6)  # purposes of the run key


def training_source(config: Config) -> batches.Source:
    """The problems that a config trains on; where it trains on worked responses, those that bring
    one."""
    source = _named_or_file(config.data.name, config.data.file, "train", config.data.columns)
    if source is not None:
        needs = any(method.prefix == "dataset" for method in methods(config))
        return batches.with_solutions(source) if needs else source
    return batches.task_source(config.data.task, "train", config.data.problems, config.data.terms)


def heldout_source(config: Config) -> batches.Source:
    """The problems that the entropy gate measures on, disjoint from training and test."""
    curriculum = config.curriculum
    source = _named_or_file(
        curriculum.heldout_name, curriculum.heldout_file, "train", config.data.columns
    )
    return source or batches.task_source(
        config.data.task, "heldout", config.curriculum.heldout_problems, config.data.terms
    )


def test_source(config: Config) -> batches.Source:
    """The problems that a run is evaluated on."""
    settings = config.evaluation
    source = _named_or_file(settings.name, settings.file, "test", settings.columns)
    return source or batches.task_source(
        config.data.task, "test", settings.problems, config.data.terms
    )


def _named_or_file(
    name: str | None, file: str | None, use: str, columns: tuple[str, ...]
) -> batches.Source | None:
    if name is not None:
        return batches.named_source(name, use, columns)
    return None if file is None else batches.file_source(file, columns)


def run_key(config: Config, purpose: int, step: int = 0) -> Key:
    """The key of a purpose at a step: the same whenever it is asked for; nothing is saved."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), purpose), step)


def encode(
    source: batches.Source, tokenizer: Tokenizer, indices, config: Config, length: int
) -> Batch:
    limit = config.data.max_prompt_tokens
    return batches.encode_batch(
        source, [int(i) for i in indices], tokenizer, max_prompt_tokens=limit, max_new_tokens=length
    )
