"""The real model of the tests in tests/real: where it is, if it was made, and texts for it."""

# ruff: noqa: RUF001 (as they are typed)

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = FOLDER / "kdjax" / "smollm2-135m-instruct"
HAS_REAL = importlib.util.find_spec("torch") is not None and (FOLDER / "config.json").is_file()
NO_REAL = f"LEFT OUT: the tests on SmolLM2 (no {FOLDER}; python launch/smollm2.py makes it)"

NAMES = (
    "Natalia",
    "Weng",
    "Betty",
    "Julie",
    "Mr. O’Brien",
    "José",
    "Ngọc Anh",
    "Zoë",
    "Toula",
    "李",
)
WORKED = (
    "{name} sold clips to {a} of her friends in April, and then she sold half as many clips in May."
    "  How many clips did {name} sell altogether in April and May?\n{name} sold {a}/2 ="
    " <<{a}/2={half}>>{half} clips in May.\n{name} sold {a}+{half} = <<{a}+{half}={sum}>>{sum}"
    " clips altogether in April and May.\n#### {sum}",
    "{name} earns ${b}.50 an hour for the first 40 hours—and 1.2 times her “regular” rate after"
    " that. If {name} worked {c} hours this week, how much are her earnings?\n40 x ${b}.50 ="
    " $<<40*{b}.5={pay}>>{pay:,}\nThe rest is {c} - 40 hours.\n#### {pay}",
    "There are {c} kids in {name}'s class; {b}% of them walk, 1/4 of the others cycle  and"
    " {a} ÷ 2 pay £{b} (≈ {a},000₫) for the bus. What's the *total*?\n\nLet x = {c} · {b}/100, so"
    " x ≤ {c}.\nThat's $\\frac{{{c}}}{{{b}}}$.\n#### {sum:,}",
)
"""Problems with worked answers, in the style of GSM8K (MIT): arithmetic in <<>>, and ####."""


def worded_problems(count: int) -> list[str]:
    """So many texts of each of WORKED, no two alike."""

    def text(pattern: str, n: int) -> str:
        a, b, c = 2 * n + 48, 3 * n + 7, 7 * n + 41
        half, name = a // 2, NAMES[n % len(NAMES)]
        return pattern.format(name=name, a=a, b=b, c=c, half=half, sum=a + half, pay=40 * b + 20)

    return [text(pattern, n) for n in range(count) for pattern in WORKED]
