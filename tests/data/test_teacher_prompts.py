"""The teacher's own prompts: what stands in them, whose are left out, and what they are cut to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdjax.base import Problem
from kdjax.data.batches import Source, encode_prompts, file_source
from kdjax.data.fitting import within, without_overlong
from kdjax.data.teacher_prompts import (
    LIMIT,
    TeacherPrompts,
    as_teacher,
    fields_of,
    filled,
    with_fields,
)
from kdjax.errors import DataError
from kdjax.training.parts.problems import encode

PROBLEM = Problem("p", "1+1={answer}", "2", r"1+1=2;\boxed{2}", "", "carry nothing")


def source_of(*problems):
    return Source(len(problems), problems.__getitem__, f"{problems}", "list: all")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{prompt}", "1+1={answer}"),
        ("{solution}\n\n{prompt}", "1+1=2;\\boxed{2}\n\n1+1={answer}"),
        ("{teacher_prompt}: {answer}, {answer}", "carry nothing: 2, 2"),
        (r"\boxed{answer} \boxed{{answer}} {other}", r"\boxed{answer} \boxed{2} {other}"),
    ],
)
def test_templates(template, text):
    """Each field at each of its places; what a field holds, LaTeX and other names are text."""
    assert filled(template, PROBLEM) == text


def test_fields():
    """Those that are filled in, and no others."""
    assert fields_of("{solution}{prompt}{prompt}") == {"solution", "prompt"}
    assert fields_of(r"\boxed{answer} {nothing}") == set()


def test_a_problem_as_its_teacher_reads_it():
    """Another prompt and nothing to train on; another template is another source."""
    source = source_of(PROBLEM)
    read = as_teacher(source, "{solution} {prompt}")
    assert read.problem(0) == PROBLEM._replace(
        prompt=r"1+1=2;\boxed{2} 1+1={answer}", solution=None
    )
    assert as_teacher(source, "{solution} {prompt}") is read
    assert len({source.identity, read.identity, as_teacher(source, "{prompt}").identity}) == 3


def test_problems_without_a_field_are_left_out():
    """Those that have every field of the template, in order; of none, refused."""
    problems = [
        Problem(f"p{n}", "1", "1", "s" if n % 2 else None, "", "t" if n % 3 else None)
        for n in range(8)
    ]
    source = source_of(*problems)
    both = with_fields(source, "{teacher_prompt}{solution}{prompt}")
    assert [both.problem(n).id for n in range(both.size)] == ["p1", "p5", "p7"]
    assert both.identity != source.identity
    assert "4 of 8 have a solution" in both.about
    assert with_fields(source, "{prompt}{answer}") is with_fields(source, "") is source
    with pytest.raises(DataError, match=r"no problem has a teacher_prompt, .*columns teacher_pro"):
        with_fields(source_of(problems[0]), "{teacher_prompt}")


def test_the_column(tmp_path):
    """Read by its name or by another; where there is none, a file is what it was."""
    rows = [{"prompt": "1", "answer": "1", "feedback": f} for f in ("a ", None, "b")]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = file_source(path, ["teacher_prompt=feedback"])
    assert [told.problem(n).teacher_prompt for n in range(3)] == ["a ", None, "b"]
    plain = file_source(path)  # rows are equal without it; the identity is what it always was
    assert plain.size == 1
    assert plain.identity == "rows:84529218062c3f77"


def test_its_prompts_have_a_limit_of_their_own(tokenizer):
    """Over it a run is refused, or problems are left out by what the teacher would read."""
    source = source_of(PROBLEM, PROBLEM._replace(id="long", solution="1" * 20))
    read = as_teacher(source, "{solution}{prompt}")
    lengths = [len(ids) for ids in encode_prompts(read, range(2), tokenizer)]
    with pytest.raises(DataError, match=f"1 of 2 problems have prompts over {LIMIT} {lengths[0]}"):
        within(read, tokenizer, lengths[0], "problems", LIMIT)
    kept = without_overlong(source, tokenizer, lengths[0], read, LIMIT)
    assert [kept.problem(n).id for n in range(kept.size)] == ["p"]
    assert kept.problem(0) == PROBLEM
    assert f"1 of 2 left out: prompts over {LIMIT} {lengths[0]}" in kept.about


def test_a_batch_has_both_prompts(tokenizer):
    """Each encoded by its own reader, to its own width; responses are behind the student's."""
    source = source_of(PROBLEM)
    theirs = TeacherPrompts(as_teacher(source, "{solution} {prompt}"), tokenizer, 50)
    batch = encode(source, tokenizer, [0], 30, 20, theirs)
    plain = encode(source, tokenizer, [0], 30, 20)
    assert plain.teacher_prompts is None
    for ours, own in zip(batch[:6], plain[:6], strict=True):
        np.testing.assert_array_equal(ours, own)
    prompts, (length,) = batch.teacher_prompts
    wanted = tokenizer.encode_prompt(r"1+1=2;\boxed{2} 1+1={answer}")
    assert prompts.shape == (1, 50)
    assert prompts[0, :length].tolist() == wanted
    read = batch.of_teacher()
    assert read.prompt_bp is prompts
    assert plain.of_teacher() == plain
