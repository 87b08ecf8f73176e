r"""Answers: what of a response counts, which texts are equal, and that hostile text is harmless."""

from __future__ import annotations

import pytest
from golden_answers import CORRECT, FLEXIBLE, RESPONSES, WRONG, flat
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.bench.verifier import HOSTILE, grade_hostile
from kdjax.grading import answers, equivalence
from kdjax.grading.answers import (
    Outcome,
    after_hashes,
    boxed,
    extract_answer,
    first_of,
    flexible,
    grade,
    grade_boxed,
    grade_flexible,
)
from kdjax.grading.equivalence import MAX_ANSWER_CHARACTERS, Number, is_equivalent, read

LONGEST = "9" * MAX_ANSWER_CHARACTERS


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"3+4=7;\boxed{7}", "7"),
        (r"\boxed{7} and on", "7"),
        (r"\boxed{}", None),
        (r"\boxed{ 7 }", " 7 "),
        ("", None),
        ("7", None),
        (r"boxed{7}", None),
        (r"\boxed 7", None),
        (r"\boxed {7}", None),
        (r"\Boxed{7}", None),
        (r"\boxed{7", None),
        (r"\boxed{7}\boxed{8}", "8"),
        (r"\boxed{7} or \boxed{8", "7"),
        (r"\boxed{7}}}\boxed{8}}", "8"),
        (r"}\boxed{7}", "7"),
        (r"{\boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{{7}}}", "{{7}}"),
        (r"\boxed{{7}", None),
        (r"\boxed{\{7\}}", r"\{7\}"),
        (r"\boxed{\{7}", r"\{7"),
        (r"\boxed{7\\}", r"7\\"),
        (r"\boxed{1+\boxed{2}}", "2"),
        (r"\boxed{1+\boxed{2", None),
        (r"\boxed{a{b\boxed{7}", "7"),
        (r"\boxed{7}</think>", None),
        (r"\boxed{7}</think>\boxed{8}", "8"),
        (r"\boxed{7}</think>no</think>\boxed{8}", "8"),
        (r"\boxed{7}</think>\boxed{8}</think>none", None),
        (r"\boxed{7</think>8}", None),
        (r"\boxed{7}<think>", None),
        ("\\boxed{7\n}", "7\n"),
        (rf"\boxed{{{LONGEST}}}", LONGEST),
        (rf"\boxed{{{LONGEST}9}}", None),
        (rf"\boxed{{7}}\boxed{{{LONGEST}9}}", "7"),
        (r"\boxed{7}\boxed{\boxed{", "7"),
        (r"\boxed{7}\boxed{\boxed{\boxed{", None),
    ],
)
def test_which_box_counts(response, answer):
    r"""The last closed \boxed{} after the last </think>, of 512 characters at most, of three."""
    assert extract_answer(response) == answer


@pytest.mark.parametrize(("why", "answer", "gold"), flat(CORRECT))
def test_golden_correct(why, answer, gold):
    """Equal in either order, and as a response."""
    assert is_equivalent(answer, gold), why
    assert is_equivalent(gold, answer), why
    assert grade(rf"so \boxed{{{answer}}}.", gold).outcome is Outcome.CORRECT, why


@pytest.mark.parametrize(("why", "answer", "gold"), flat(WRONG))
def test_golden_wrong(why, answer, gold):
    """Different in either order, and wrong as a response (where its braces close)."""
    assert not is_equivalent(answer, gold), why
    assert not is_equivalent(gold, answer), why
    assert grade(rf"so \boxed{{{answer}}}.", gold).outcome is Outcome.WRONG, why


@pytest.mark.parametrize("outcome", RESPONSES)
def test_golden_responses(outcome):
    """Each response has its outcome; only one that is not scored has a reason."""
    for why, response, gold in flat(RESPONSES[outcome]):
        graded = grade(response, gold)
        assert graded.outcome == outcome, (why, response)
        assert (graded.answer is None) == (outcome == "no_answer"), (why, response)
        assert bool(graded.reason) == (outcome == "not_scored"), (why, response)


def test_the_golden_table_is_large():
    """At least 200 graded pairs, none twice."""
    pairs = [row[1:] for row in flat(CORRECT) + flat(WRONG)]
    pairs += [("response", *row[1:]) for table in RESPONSES.values() for row in flat(table)]
    assert len(set(pairs)) == len(pairs) >= 250


@pytest.mark.parametrize(("response", "answer", "gold"), FLEXIBLE)
def test_flexible_takes_box_hashes_or_number(response, answer, gold):
    """A box, else what follows ####, else the last plain number; after thinking, all the same."""
    assert extract_answer(response, flexible) == answer
    expected = Outcome.NO_ANSWER if answer is None else Outcome.CORRECT
    assert [g.outcome for g in grade_flexible([(response, gold)])] == [expected]


def test_policies_are_tried_in_order():
    """first_of is the first that finds something; `boxed` alone finds less."""
    response = "\\boxed{7}\n#### 8"
    assert extract_answer(response, first_of(after_hashes, boxed)) == "8"
    assert extract_answer(response, first_of(boxed, after_hashes)) == "7"
    assert extract_answer("#### 8", boxed) is None


def test_none_and_long_texts():
    """No answer equals nothing; over 512 characters, a text equals itself alone."""
    assert not any(is_equivalent(None, gold) for gold in ("7", "None", ""))
    assert is_equivalent("0" * 513, "0" * 513)
    assert not is_equivalent("0" * 513, "0" * 514)


def test_numbers_are_exact():
    """64 digits are compared in full, which no float could; 65 are text."""
    assert not is_equivalent("1" * 64, "1" * 63 + "2")
    assert is_equivalent("0" + "1" * 63, "1" * 63)
    assert isinstance(read("1" * 64), Number)
    assert not isinstance(read("1" * 65), Number)


# --- laws -----------------------------------------------------------------------------------------

ALPHABET = [
    r"\boxed{", "{", "}", "</think>", "<think>", "7", "12", ",", "000", "/", "-", "\\", "x" * 257,
    "\uff17", r"\frac", r"\{", r"\}", "(", ")", "[", "]", "$", "%", ".", " ", r"\text{", "cm", "^",
    "_",    r"\cup", r"\left", "####", "\ud800", "\x00", "°", "million", r"\sqrt", "9" * 65, "{,}",
]  # fmt: skip
pieces = st.lists(st.sampled_from(ALPHABET) | st.text(max_size=5), max_size=30).map("".join)
integers = st.integers(-(10**9), 10**9)
quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@quick
@given(pieces)
def test_any_text_gives_an_answer_that_stands_in_it(response):
    """Never an exception; an answer is short, and found boxed after the last </think>."""
    answer = extract_answer(response)
    if answer is not None:
        assert rf"\boxed{{{answer}}}" in response.rpartition("</think>")[2]
        assert len(answer) <= MAX_ANSWER_CHARACTERS
    for policy in (after_hashes, answers.last_number, flexible):
        found = extract_answer(response, policy)
        assert found is None or found in response


@quick
@given(pieces, pieces)
def test_grading_never_raises(response, gold):
    """Any two texts have one of the four outcomes, by any policy."""
    for graded in grade_boxed([(response, gold)]) + grade_flexible([(response, gold)]):
        assert graded.outcome in Outcome


@quick
@given(pieces, pieces)
def test_equivalence_is_reflexive_and_symmetric(first, second):
    """Any text equals itself, spaces around it or not, whichever comes first."""
    assert is_equivalent(first, first)
    assert is_equivalent(first, second) == is_equivalent(second, first)
    if len(first) < MAX_ANSWER_CHARACTERS - 1:
        assert is_equivalent(f" {first}\n", first)


@quick
@given(pieces, st.sampled_from(["7", r"\frac12", "(1,2)", r"\text{(C)}"]), pieces)
def test_what_was_thought_does_not_matter(thought, answer, after):
    """The outcome depends on nothing before the last </think>."""
    said = rf"so \boxed{{{answer}}}" + after
    assert grade(f"{thought}</think>{said}", answer) == grade(f"</think>{said}", answer)


@quick
@given(integers, st.integers(1, 10**6))
def test_a_number_in_every_spelling(numerator, denominator):
    """n/d in all its spellings is one number, and differs from (n + 1)/d in each."""

    def spelled(n):
        fractions = [f"{n}/{denominator}", rf"\dfrac{{{n}}}{{{denominator}}}"]
        whole = [str(n), f"{n:,}", f"{n}.0", rf"{n} \text{{ cm}}", f"{n:,}".replace(",", "{,}")]
        return [*fractions, rf"\frac{{{3 * n}}}{{{3 * denominator}}}"], whole

    for ours, others in zip(spelled(numerator), spelled(numerator + 1), strict=True):
        for one in ours:
            assert all(is_equivalent(one, other) for other in ours)
            assert not any(is_equivalent(one, other) for other in others)


@quick
@given(st.lists(integers, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_only_sets_forget_their_order(numbers, random):
    """A set equals its permutations; a tuple equals itself, and no other order of its entries."""
    shuffled = random.sample(numbers, len(numbers))
    first, second = (", ".join(map(str, each)) for each in (numbers, shuffled))
    assert is_equivalent(rf"\{{{first}\}}", rf"\{{{second}\}}")
    assert is_equivalent(f"({first})", f"({second})") == (numbers == shuffled)


# --- hostile text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_graded_in_few_steps(response, monkeypatch):
    """No text makes the verifier look at more than its bounds: brackets, values and boxes."""
    steps = {"values": 0, "characters": 0}

    def counted(function, key, size):
        def run(*args):
            steps[key] += size(args)
            return function(*args)

        return run

    monkeypatch.setattr(equivalence, "_value", counted(equivalence._value, "values", lambda _: 1))
    split = counted(equivalence._split, "characters", lambda args: len(args[0]))
    monkeypatch.setattr(equivalence, "_split", split)
    closed = counted(answers._closed, "characters", lambda args: len(args[0]))
    monkeypatch.setattr(answers, "_closed", closed)
    read.cache_clear()
    outcomes = grade_hostile(response)
    assert set(outcomes) <= set(Outcome)
    reads, boxes = 1 + len(outcomes), (1 + len(outcomes)) * answers.BOXES_LOOKED_AT
    assert steps["values"] <= reads * 4 * equivalence.MAX_ENTRIES
    most = reads * 2 * (equivalence.MAX_LEVELS + 1) + boxes
    assert steps["characters"] <= most * (MAX_ANSWER_CHARACTERS + 1)


def test_hostile_answers_are_not_right():
    """None of them is the number that its gold asks for, but the boxes that do say 7."""
    right = {name for name, r in HOSTILE.items() if grade(r, "7").outcome is Outcome.CORRECT}
    assert right == {"100,000 closing braces"}
