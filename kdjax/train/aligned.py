"""The start-up report on teachers of another tokenizer: how much of the first responses is aligned,
and how much of the teacher's probability is of tokens that the student has."""

from __future__ import annotations

import numpy as np

from kdjax.errors import ConfigError
from kdjax.sharding import rows_on_host
from kdjax.train.feed import draw, length_of, own_batch_at
from kdjax.train.parts.build import Parts, fresh_state
from kdjax.train.parts.programs import jitted_score
from kdjax.train.parts.roles import title


def about_alignment(parts: Parts) -> str:
    """A line on the rollout of step 0; "" where student and teachers have one tokenizer. Errors:
    ConfigError where less of it is aligned than `least_aligned`."""
    least = parts.config.least_aligned
    if least is None:
        return ""
    state, programs = fresh_state(parts), parts.programs
    rollout = draw(parts, state.params, 0, length_of(parts, state), 0)
    tag = own_batch_at(parts, 0)[0]
    teacher = parts.teachers[tag]
    read = teacher.programs.read(teacher.params, rollout)
    scores = jitted_score(
        programs.student.model, teacher.programs.guide, programs.head,
        parts.student.whole(parts.student.trained), teacher.given, read,
    )  # fmt: skip
    mask, lengths, shared = rows_on_host(
        (scores.mask, rollout.response_length_b, scores.teacher_shared)
    )
    share = float(mask.sum() / max(1, lengths.sum()))
    kept = "all" if shared is None else f"{float(np.sum(shared) / max(1, mask.sum())):.2%}"
    said = (
        f"of the first {len(lengths)} responses {share:.1%} of the tokens are aligned with the"
        f" {title(tag)}'s, and {kept} of its probability there is of tokens that the student has"
    )
    if share < least:
        raise ConfigError(
            f"least_aligned is {least}, and {said}; lower it, or take a teacher whose tokenizer"
            " cuts text more like the student's"
        )
    return f"alignment: {said}\n"
