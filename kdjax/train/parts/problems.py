"""The problems of a run by their purposes, and the random key of each purpose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax

from kdjax.base import Batch, Key, random_key
from kdjax.config.schema import Config, Curriculum, Data, Evaluation
from kdjax.config.timetable import Timetable
from kdjax.data import batches
from kdjax.data.fitting import within, without_overlong
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError

ROLLOUT, MEASURE, EVALUATE, TRAJECTORIES, ADAPTER, PROGRESS = range(6)  # purposes of the run key


class Problems(NamedTuple):
    """The problems of a run: those of training, their rows by tag, and the batch of each step,
    batch_size different ones, one a row or one a group where every step is rewarded; the gate's,
    where it measures; the evaluation's. equal: every tag has as many batches as any other."""

    source: batches.Source
    heldout: batches.Source | None
    test: batches.Source
    groups: batches.Groups
    batch_size: int
    seed: int
    equal: bool = False

    def batch_at(self, step: int, redraw: int = 0) -> tuple[str, list[int]]:
        """(tag, rows of the source) of a step's batch; at each redraw others of the same tag."""
        seed = self.seed + (redraw << 32)  # another order of the same problems
        return batches.batch_at(self.groups, step, self.batch_size, seed, self.equal)


def open_problems(
    config: Config, table: Timetable, tags: Iterable[str], tokenizer: Tokenizer
) -> Problems:
    """The problems of a config, for teachers of these tags, with all prompts measured by the
    student's tokenizer. Errors: ConfigError for fewer than a batch of some tag, DataError for a
    worked response that is missing and for a prompt that is too long."""

    def fitting(source: batches.Source, what: str) -> batches.Source:
        limit = config.data.max_prompt_tokens
        if config.data.overlong_prompts == "leave_out":
            return without_overlong(source, tokenizer, limit)
        return within(source, tokenizer, limit, what)

    source = fitting(training_source(config.data, table), "training problems")
    test = fitting(test_source(config.data, config.evaluation), "test problems")
    heldout = None
    if len(config.curriculum.lengths) > 1:
        heldout = fitting(heldout_source(config.data, config.curriculum), "held-out problems")
    groups = batches.group_by_tag(source, list(tags))
    rewarded = all(method.rewarded for method in table.methods)
    asked = config.batch_size // (config.rl.group_size if rewarded else 1)
    for tag, rows in groups.items():
        if asked > len(rows):
            of_tag = f" of tag {tag!r}" if tag else ""
            raise ConfigError(
                f"batch_size {config.batch_size} is over the {len(rows)} training problems{of_tag};"
                " a problem would be sampled twice with one key"
            )
    if table.draws("dataset"):
        batches.require_solutions(source, [0])
    equal = config.teacher_shares == "equal"
    return Problems(source, heldout, test, groups, asked, config.seed, equal)


def training_source(data: Data, table: Timetable) -> batches.Source:
    """The training problems; where worked responses are trained on, those that have one."""
    source = _named_or_file(data.name, data.file, "train", data.columns)
    if source is not None:
        return batches.with_solutions(source) if table.draws("dataset") else source
    return batches.task_source(data.task, "train", data.problems, data.terms)


def heldout_source(data: Data, curriculum: Curriculum) -> batches.Source:
    """The problems of the entropy gate's measurements, disjoint from training and test."""
    source = _named_or_file(curriculum.heldout_name, curriculum.heldout_file, "train", data.columns)
    return source or batches.task_source(
        data.task, "heldout", curriculum.heldout_problems, data.terms
    )


def test_source(data: Data, evaluation: Evaluation) -> batches.Source:
    """The problems that a run is evaluated on."""
    source = _named_or_file(evaluation.name, evaluation.file, "test", evaluation.columns)
    return source or batches.task_source(data.task, "test", evaluation.problems, data.terms)


def _named_or_file(
    name: str | None, file: str | None, use: str, columns: tuple[str, ...]
) -> batches.Source | None:
    if name is not None:
        return batches.named_source(name, use, columns)
    return None if file is None else batches.file_source(file, columns, use)


def encode(
    source: batches.Source,
    tokenizer: Tokenizer,
    indices: Iterable[int],
    max_prompt_tokens: int,
    length: int,
) -> Batch:
    """Problems of a source as a Batch.

    Args:
        source, tokenizer, indices, max_prompt_tokens: as in `batches.encode_batch`.
        length: limit of a response in tokens.
    """
    return batches.encode_batch(
        source,
        [int(i) for i in indices],
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=length,
    )


def run_key(seed: int, purpose: int, step: int = 0) -> Key:
    """The key of a purpose at a step: the same whenever it is asked for; nothing is saved."""
    return jax.random.fold_in(jax.random.fold_in(random_key(seed), purpose), step)
