"""The cost of a run so far, in model FLOPs of real tokens, by part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.data import batches
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import DataError
from kdjax.models import flops
from kdjax.training.parts.build import Parts

SAMPLING, TEACHER, FORWARD, BACKWARD = (
    "flops_sampling",
    "flops_teacher",
    "flops_student_forward",
    "flops_student_backward",
)
PARTS = (SAMPLING, TEACHER, FORWARD, BACKWARD)

Cost = Callable[[int, int, Mapping[str, Any]], dict[str, float]]
"""cost(first, last, record) -> FLOPs of the steps first .. last - 1, from the metrics of one logged
step: its mean response_length in tokens, and its draws of a row if rewarded."""


def open_account(parts: Parts) -> Cost:
    """The cost function of a run, by part (`PARTS`), whichever device or server does the work:

    - sampling: drawing responses. The student draws each step's; groups that are drawn again count
      each time, at the length of those that were used. The teacher's are drawn once for each
      problem that the run visits, at its first visit, as if for this run alone.
    - teacher: reading every step's responses, behind its own prompts. Where its states are stored
      in a folder, its head alone; where its top-k are stored, nothing. A reference reads them too.
    - student_forward and student_backward: of the updates, and of the old policy where several
      updates need it (rollouts drawn ahead bring it along).

    Responses that are read from a folder or are the dataset's cost nothing to draw. The gate's
    measurements and evaluations are not counted. Prompts count with their mean length (of 64).
    Two limits, as records say a step's mean length alone: attention is counted at it, not at the
    mean of squares (too little by 3 % of the layers for lognormal lengths, by 18 % where half of
    the rows have 200 and half 5,120 tokens on Qwen3-0.6B); and a teacher's responses that a
    curriculum cuts are counted as they were read, not as they were drawn.
    """
    config, programs = parts.config, parts.programs
    shape, source = parts.roles.student.shape, parts.problems.source
    prompt, adapter = _prompt_tokens(source, parts.tokenizer), 0
    apart = {t: _prompt_tokens(p.source, p.tokenizer) for t, p in parts.problems.theirs.items()}
    reads = dict.fromkeys(parts.teachers, prompt) | apart
    if parts.student.frozen is not None:
        adapter = sum(leaf.size for leaf in jax.tree.leaves(parts.student.trained))

    @functools.cache
    def kind_at(number: int) -> tuple[str, str, bool, int]:
        method = parts.table.at(number)
        tag, _ = parts.problems.batch_at(number)
        return tag, method.prefix, method.rewarded, method.updates

    def kinds(first: int, last: int) -> Counter[tuple[str, str, bool, int]]:
        return Counter(kind_at(number) for number in range(first, last))

    first_visits = _first_visits(parts)

    def cost(first: int, last: int, record: Mapping[str, Any]) -> dict[str, float]:
        length, draws = record["response_length"], record.get("draws", 1.0)
        spent, visits = dict.fromkeys(PARTS, 0.0), first_visits(first, last)
        for kind, steps in kinds(first, last).items():
            tag, prefix, rewarded, updates = kind
            teacher, whole = parts.teachers[tag], prompt + length
            rows = steps * config.batch_size
            sizes = rows * prompt, rows * length, whole
            forward, backward = flops.student(shape, *sizes, adapter)
            readings = updates if programs.teacher_mesh is programs.mesh else 1
            old_policy = updates > 1 and not config.rollouts.ahead
            spent[FORWARD] += (updates + old_policy) * forward
            spent[BACKWARD] += updates * backward
            theirs = reads[tag]
            if teacher.programs.shape is not None:
                asked = rows * theirs, rows * length, theirs + length
                once = flops.response(teacher.programs.shape, *asked)
                spent[TEACHER] += readings * once
            elif teacher.given is not None:
                head = sum(leaf.size for leaf in jax.tree.leaves(teacher.given))
                spent[TEACHER] += 2.0 * rows * length * head
            if programs.reference is not None:
                spent[TEACHER] += flops.response(programs.reference.model.config, *sizes)
            if parts.responses.stored:
                continue
            if prefix == "student":
                again = draws if rewarded else 1.0
                spent[SAMPLING] += again * flops.response(shape, *sizes)
            if prefix == "teacher" and teacher.programs.model is not None:
                drawn = visits.pop(tag, 0)
                spent[SAMPLING] += flops.response(
                    teacher.programs.model.config, drawn * theirs, drawn * length, theirs + length
                )
        return spent

    return cost


def _prompt_tokens(source: batches.Source, tokenizer: Tokenizer) -> float:
    """The mean length of the first prompts, in tokens."""
    some = batches.encode_prompts(source, range(min(64, source.size)), tokenizer)
    return float(np.mean([len(ids) for ids in some]))


def _first_visits(parts: Parts) -> Callable[[int, int], Counter[str]]:
    """visits(first, last) -> by tag, for how many problems the steps first .. last - 1 are the
    first to ask for the teacher's response."""
    visited: tuple[int, set[int]] = 0, set()

    def visits(first: int, last: int) -> Counter[str]:
        nonlocal visited
        done, seen = visited if visited[0] <= first else (0, set())
        new: Counter[str] = Counter()
        for number in range(done, last):
            if parts.table.at(number).prefix == "teacher":
                tag, rows = parts.problems.batch_at(number)
                new[tag] += len({*rows} - seen) if number >= first else 0
                seen.update(rows)
        visited = last, seen
        return new

    return visits


def spent(cost: Cost, metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """FLOPs by part up to the last record; each counts for the steps since the one before it.
    Errors: DataError for a record without a length."""
    total, done = dict.fromkeys(PARTS, 0.0), 0
    for record in metrics:
        if not isinstance(record.get("response_length"), int | float):
            raise DataError(
                f"the metrics of step {record['step']} have no response_length, so what the run"
                " cost is not known; delete the run's metrics.jsonl, or train under another --run"
            )
        new = cost(done, record["step"], record)
        total = {name: total[name] + new[name] for name in PARTS}
        done = record["step"]
    return total
