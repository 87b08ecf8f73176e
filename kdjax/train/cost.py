"""The cost of a run so far, in model FLOPs of real tokens, by part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.data import batches
from kdjax.errors import DataError
from kdjax.models import flops
from kdjax.train.parts.build import Parts

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
    - teacher: reading every step's responses. Where its states are stored in a folder, its head
      alone; where its top-k are stored, nothing. A reference model reads them too.
    - student_forward and student_backward: of the updates.

    Responses that are read from a folder or are the dataset's cost nothing to draw. The gate's
    measurements and evaluations are not counted. Prompts count with their mean length (of 64).
    """
    config, programs = parts.config, parts.programs
    shape, source = parts.roles.student.shape, parts.problems.source
    some = batches.encode_prompts(source, range(min(64, source.size)), parts.tokenizer)
    prompt, adapter = float(np.mean([len(ids) for ids in some])), 0
    if parts.student.frozen is not None:
        adapter = sum(leaf.size for leaf in jax.tree.leaves(parts.student.trained))

    @functools.cache
    def kind_at(number: int) -> tuple[str, str, bool, int]:
        method = parts.table.at(number)
        tag, _ = parts.problems.batch_at(number)
        return tag, method.prefix, method.rewarded, method.updates

    def kinds(first: int, last: int) -> Counter[tuple[str, str, bool, int]]:
        return Counter(kind_at(number) for number in range(first, last))

    before: tuple[int, Counter[tuple[str, str, bool, int]]] = 0, Counter()

    def cost(first: int, last: int, record: Mapping[str, Any]) -> dict[str, float]:
        nonlocal before
        length, draws = record["response_length"], record.get("draws", 1.0)
        spent = dict.fromkeys(PARTS, 0.0)
        step, counted = before if before[0] <= first else (0, Counter())
        before = first, counted + kinds(step, first)
        earlier = before[1]
        for kind, steps in kinds(first, last).items():
            tag, prefix, rewarded, updates = kind
            teacher, whole = parts.teachers[tag], prompt + length
            rows = steps * config.batch_size
            sizes = rows * prompt, rows * length, whole
            forward, backward = flops.student(shape, *sizes, adapter)
            readings = updates if programs.teacher_mesh is programs.mesh else 1
            spent[FORWARD] += (updates + (updates > 1)) * forward  # once more for the old policy
            spent[BACKWARD] += updates * backward
            if teacher.programs.model is not None:
                once = flops.response(teacher.programs.model.config, *sizes)
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
                seen, known = earlier[kind] * config.batch_size, len(parts.problems.groups[tag])
                drawn = min(seen + rows, known) - min(seen, known)
                spent[SAMPLING] += flops.response(
                    teacher.programs.model.config, drawn * prompt, drawn * length, whole
                )
        return spent

    return cost


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
