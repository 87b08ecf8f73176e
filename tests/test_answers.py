r"""Answers: which \boxed{} counts, which texts are equal, and that hostile text is harmless."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.answers import MAX_ANSWER_CHARACTERS, extract_answer, is_equivalent

LONGEST = "9" * MAX_ANSWER_CHARACTERS


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"3+4=7;\boxed{7}", "7"),
        (r"\boxed{7} and on", "7"),
        (r"\boxed{}", ""),
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
        (r"\boxed{1+\boxed{2}}", "2"),
        (r"\boxed{1+\boxed{2", None),
        (r"\boxed{a{b\boxed{7}", "7"),
        (r"\boxed{7}</think>", None),
        (r"\boxed{7}</think>\boxed{8}", "8"),
        (r"\boxed{7}</think>no</think>\boxed{8}", "8"),
        (r"\boxed{7}</think>\boxed{8}</think>none", None),
        (r"\boxed{7</think>8}", None),
        ("\\boxed{7\n}", "7\n"),
        (rf"\boxed{{{LONGEST}}}", LONGEST),
        (rf"\boxed{{{LONGEST}9}}", None),
        (rf"\boxed{{7}}\boxed{{{LONGEST}9}}", "7"),
    ],
)
def test_which_box_counts(response, answer):
    r"""The last closed \boxed{} after the last </think>, of 512 characters at most."""
    assert extract_answer(response) == answer


EQUAL = [
    ("7", "7"), (" 7\n", "7"), ("07", "7"), ("007", "7.0"), ("+7", "7"), ("-7", "-7"), ("-0", "0"),
    ("7.50", "7.5"), ("1/2", "0.5"), ("2/4", "1/2"), ("-1/2", "-0.5"), ("+6/3", "2"),
    ("x+1", "x+1"), ("", ""), ("0.1", "1/10"), ("1/3", "2/6"), ("7 apples", " 7 apples "),
    (r"\pi", r"\pi"),
]  # fmt: skip

UNEQUAL = [
    ("7", "8"), ("-7", "7"), ("70", "7"), ("7.0000001", "7"), ("0.3333333333333333", "1/3"),
    ("6*7", "42"), ("6+1", "7"), ("2**3", "8"), ("14/2/1", "7"), ("--7", "7"), ("1e1", "10"),
    ("7.", "7"), (".5", "0.5"), ("1,000", "1000"), ("1_000", "1000"), ("1 000", "1000"),
    ("0x7", "7"), ("1 /2", "0.5"), ("1/0", "0"), ("1/-2", "-0.5"), ("1/02", "0.5"),
    ("0.5/1", "0.5"), ("", "0"),
    ("\uff17", "7"), ("\uff17", "07"), ("\u0667", "7"), ("\u00b2", "2"),
    ("\u00bd", "1/2"), ("\u22127", "-7"), ("7\u20e3", "7"),
    ("inf", "Infinity"), ("nan", "NaN"), ("True", "1"), ("x + 1", "x+1"), ("__import__('os')", "0"),
    ("0" * 65 + "7", "7"), (None, "7"), (None, "None"), (None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_numbers_and_equal_texts(answer, gold):
    """The same exact rational number, or the same text; the order of the two is no matter."""
    assert is_equivalent(answer, gold)
    assert is_equivalent(gold, answer)


@pytest.mark.parametrize(("answer", "gold"), UNEQUAL)
def test_everything_else_is_wrong(answer, gold):
    """Nothing is evaluated or rounded; only ASCII digits are digits; None is no answer."""
    assert not is_equivalent(answer, gold)


def test_numbers_are_exact():
    """64 digits are compared in full, which no float could."""
    assert not is_equivalent("1" * 64, "1" * 63 + "2")
    assert is_equivalent("0" + "1" * 63, "1" * 63)


pieces = st.lists(
    st.sampled_from([r"\boxed{", "{", "}", "</think>", "7", "/", "-", "\\", "x" * 257, "\uff17"])
    | st.text(max_size=5)
).map("".join)
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@quick
@given(pieces)
def test_any_text_gives_an_answer_that_stands_in_it(response):
    """Never an exception; an answer is short, balanced, and found boxed after the last </think>."""
    answer = extract_answer(response)
    if answer is not None:
        assert rf"\boxed{{{answer}}}" in response.rpartition("</think>")[2]
        assert len(answer) <= MAX_ANSWER_CHARACTERS
        assert answer.count("{") == answer.count("}")


@quick
@given(st.text(alphabet="0123456789+-/.{}", max_size=20), pieces)
def test_equivalence_is_reflexive_and_symmetric(first, second):
    """Any text equals itself, and a comparison never raises nor depends on the order."""
    assert is_equivalent(first, first)
    assert is_equivalent(first, second) == is_equivalent(second, first)


@quick
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_a_fraction_and_its_multiples_are_equal(numerator, denominator):
    """n/d = 3n/3d, and differs from (n + 1)/d."""
    fraction = f"{numerator}/{denominator}"
    assert is_equivalent(fraction, f"{3 * numerator}/{3 * denominator}")
    assert not is_equivalent(fraction, f"{numerator + 1}/{denominator}")


BOX = r"\boxed{"
HOSTILE = {
    "5,000 unclosed boxes": BOX * 5_000,
    "20,000 unclosed boxes": BOX * 20_000 + "7",
    "20,000 nested boxes": BOX * 20_000 + "}" * 20_000,
    "100,000 digits": BOX + "9" * 100_000 + "}",
    "100,000 digits, unclosed": BOX + "9" * 100_000,
    "100,000 opening braces": BOX + "{" * 100_000,
    "100,000 deep braces": BOX + "{" * 100_000 + "}" * 100_001,
    "100,000 closing braces": BOX + "7" + "}" * 100_000,
    "100,000 backslashes": "\\" * 100_000,
    "20,000 thoughts": (BOX + "7}</think>") * 20_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_quick(text):
    """A tenth of a million characters are read and compared in well under a second."""
    start = time.process_time()
    extract_answer(text)
    is_equivalent(text, text)
    is_equivalent(text[len(BOX) : -1], "7")
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("separator", ["/", "."])
def test_long_numbers_are_texts(separator):
    """Numbers of more than 64 digits are compared as texts: quickly, and without an exception."""
    long = "9" * 50_000 + separator + "9" * 50_000
    start = time.process_time()
    assert is_equivalent(long, long)
    assert not is_equivalent(long, "0" + long)
    assert time.process_time() - start < 0.5
