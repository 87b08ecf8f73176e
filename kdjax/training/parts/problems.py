"""The problems of a run by their purposes, and the random key of each purpose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from kdjax.base import Batch, Key, random_key
from kdjax.config.schema import Config, Curriculum, Data, Evaluation
from kdjax.config.timetable import Timetable
from kdjax.data import batches
from kdjax.data.fitting import LIMIT as OF_PROMPTS
from kdjax.data.fitting import within, without_overlong
from kdjax.data.teacher_prompts import LIMIT, TeacherPrompts, as_teacher, with_fields
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError

ROLLOUT, MEASURE, EVALUATE, TRAJECTORIES, ADAPTER, PROGRESS = range(6)  # purposes of the run key


class Problems(NamedTuple):
    """The problems of a run: those of training, their rows by tag, and the batch of each step,
    batch_size different ones, one a row or one a group where every step is rewarded; the gate's,
    where it measures; the evaluation's. theirs: by tag, the prompts of a teacher that reads others;
    {} where teachers read the student's. equal: every tag has as many batches as any other."""

    source: batches.Source
    heldout: batches.Source | None
    test: batches.Source
    groups: batches.Groups
    batch_size: int
    seed: int
    theirs: dict[str, TeacherPrompts]
    equal: bool = False

    def batch_at(self, step: int, redraw: int = 0) -> tuple[str, list[int]]:
        """(tag, rows of the source) of a step's batch; at each redraw others of the same tag."""
        seed = self.seed + (redraw << 32)  # another order of the same problems
        return batches.batch_at(self.groups, step, self.batch_size, seed, self.equal)


def open_problems(
    config: Config, table: Timetable, readers: Mapping[str, Tokenizer], tokenizer: Tokenizer
) -> Problems:
    """The problems of a config, with all prompts measured.

    Args:
        config, table: of the run.
        readers: by tag, the tokenizer of its teacher, which renders prompts of its own.
        tokenizer: the student's.

    Errors: ConfigError for fewer than a batch of some tag, DataError for a worked response that is
    missing and for a prompt that is too long.
    """
    data = config.data

    def fitting(
        source: batches.Source,
        what: str,
        asked: tuple[Tokenizer, int, str] = (tokenizer, data.max_prompt_tokens, OF_PROMPTS),
        read: batches.Source | None = None,
    ) -> batches.Source:
        by, limit, field = asked
        if data.overlong_prompts == "leave_out":
            return without_overlong(source, by, limit, read, field)
        within(read or source, by, limit, what, field)
        return source

    source = fitting(training_source(data, table), "training problems")
    template, most = data.teacher_prompt_template, data.teacher_prompt_tokens
    if template is not None:
        for reader in dict.fromkeys(readers.values()):
            asked = (reader, most, LIMIT)
            source = fitting(source, "training problems", asked, as_teacher(source, template))
    test = fitting(test_source(config.data, config.evaluation), "test problems")
    heldout = None
    if len(config.curriculum.lengths) > 1:
        heldout = fitting(heldout_source(config.data, config.curriculum), "held-out problems")
    groups = batches.group_by_tag(source, list(readers))
    rewarded = all(method.rewarded for method in table.methods)
    at_once = config.batch_size // (config.rl.group_size if rewarded else 1)
    for tag, rows in groups.items():
        if at_once > len(rows):
            of_tag = f" of tag {tag!r}" if tag else ""
            raise ConfigError(
                f"batch_size {config.batch_size} is over the {len(rows)} training problems{of_tag};"
                " a problem would be sampled twice with one key"
            )
    if table.draws("dataset"):
        batches.require_solutions(source, [0])
    theirs = {}
    if template is not None:
        read = as_teacher(source, template)
        theirs = {tag: TeacherPrompts(read, reader, most) for tag, reader in readers.items()}
    equal = config.teacher_shares == "equal"
    return Problems(source, heldout, test, groups, at_once, config.seed, theirs, equal)


def training_source(data: Data, table: Timetable) -> batches.Source:
    """The training problems; where worked responses are trained on, those that have one; where a
    teacher's prompts hold columns, those that have all of them."""
    source = _named_or_file(data.name, data.file, "train", data.columns)
    if source is None:
        source = batches.task_source(data.task, "train", data.problems, data.terms)
    elif table.draws("dataset"):
        source = batches.with_solutions(source)
    return with_fields(source, data.teacher_prompt_template or "")


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
    theirs: TeacherPrompts | None = None,
) -> Batch:
    """Problems of a source as a Batch.

    Args:
        source, tokenizer, indices, max_prompt_tokens: as in `batches.encode_batch`.
        length: limit of a response in tokens.
        theirs: the prompts that the teacher reads, if these are others.
    """
    rows = [int(i) for i in indices]
    batch = batches.encode_batch(
        source, rows, tokenizer, max_prompt_tokens=max_prompt_tokens, max_new_tokens=length
    )
    if theirs is None:
        return batch
    read = batches.encode_batch(
        theirs.source, rows, theirs.tokenizer, max_prompt_tokens=theirs.max_tokens, max_new_tokens=1
    )
    return batch._replace(teacher_prompts=(read.prompt_bp, read.prompt_length_b))


def run_key(seed: int, purpose: int, step: int = 0) -> Key:
    """The key of a purpose at a step: the same whenever it is asked for; nothing is saved."""
    return jax.random.fold_in(jax.random.fold_in(random_key(seed), purpose), step)
