r"""`kdjax bench verifier`: how long grading takes, of ordinary answers and of hostile ones."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any, Literal

from kdjax.bench import Figure
from kdjax.errors import ConfigError
from kdjax.grading.answers import Outcome, extract_answer, flexible, grade, grade_boxed
from kdjax.grading.equivalence import read
from kdjax.grading.symbolic import open_symbolic

Pairs = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class VerifierBench:
    """Sizes of `kdjax bench verifier`: problems, responses to each, and measurements, of which the
    best counts (a grader has one core; another program's share of it is not its cost)."""

    problems: int = 2000
    samples: int = 8
    repeats: int = 5
    symbolic_problems: int = 100
    skip: tuple[Literal["exact", "hostile", "symbolic"], ...] = ()


def bench_verifier(sizes: VerifierBench) -> Iterator[Figure]:
    """Every figure, as it is measured. Errors: ConfigError for sizes that can't be."""
    if min(sizes.problems, sizes.samples, sizes.repeats, sizes.symbolic_problems) < 1:
        raise ConfigError("bench verifier: every size must be at least 1")
    parts = {"exact": _exact, "hostile": _hostile, "symbolic": _symbolic}
    for name, measure in parts.items():
        if name not in sizes.skip:
            yield from measure(sizes)


# --- ordinary answers -----------------------------------------------------------------------------

THINKING = "<think>\n" + "We add 12 to 30, carry nothing, and find 42. " * 40 + "\n</think>\n"

FORMS: dict[str, tuple[tuple[str, str], ...]] = {
    "integers": (("{n}", "{n}"), ("{n:,}", "{n}"), ("{n}.", "{n}"), (r"\${n}", "{n}")),
    "LaTeX": (
        (r"\dfrac{{{n}}}{{7}}", r"\frac{{{n}}}{{7}}"),
        (r"{n} \sqrt{{3}}", r"{n}\sqrt{{3}}"),
        (r"({n}, \frac12)", r"\left( {n}, \frac{{1}}{{2}} \right)"),
        (r"{n} \text{{ cm}}", "{n}"),
        (r"\text{{(C)}}", "C"),
        ("{n}x + 1", "{n}x+1"),
    ),
}
"""(what is boxed, the gold) of a random n, by kind of data set."""


def ordinary(kind: str, problems: int, samples: int) -> Pairs:
    """Responses of about 2,000 characters, half of them right, with their golds."""
    numbers = random.Random(0)
    pairs = []
    for problem in range(problems):
        said, gold = FORMS[kind][problem % len(FORMS[kind])]
        n = numbers.randrange(10, 10**6)
        for sample in range(samples):
            boxed = said.format(n=n + sample % 2)
            pairs.append((rf"{THINKING}The answer is \boxed{{{boxed}}}.", gold.format(n=n)))
    return pairs


def _exact(sizes: VerifierBench) -> Iterator[Figure]:
    for kind in FORMS:
        for samples in (sizes.samples, 1):
            pairs = ordinary(kind, sizes.problems, samples)
            each = _best(functools.partial(grade_boxed, pairs), sizes.repeats) / len(pairs)
            reach = 20.0 if samples > 1 or kind == "integers" else None
            name, rate = f"an answer, {kind}, {samples} a problem", f"{1 / each:,.0f} a second"
            yield Figure(name, 1e6 * each, "us", reach, rate)


def _best(run: Callable[[], object], repeats: int) -> float:
    """The least seconds of this process's core that a run takes, with nothing remembered."""
    return min(timeit.repeat(run, read.cache_clear, time.process_time, repeats, number=1))


# --- hostile answers ------------------------------------------------------------------------------

BOX = "\\boxed{"
_INSIDE = (
    "9**9**9", "9^{9^{9^9}}", "1000000!", "((10!)!)!", r"\binom{10^9}{10^8}", "(x+y+z+w)^{200}",
    r"\sum_{k=1}^{10^9} 1/k^2", r"\gcd(2^{10000000},6)", "{" * 64 + "7" + "}" * 64, "(" * 500,
    r"\frac{1}{" * 50 + "2" + "}" * 50, r"\frac{1}{" * 50, "1+" * 255 + "1", "1," * 255 + "1",
    "0." + "9" * 500, "9" * 512, "1/0", r"\infty", "nan", "1e999999999", r"\{" * 250, "(1," * 100,
    "(1," * 100 + ")" * 100, "((1,1),(1,1))," * 36, "," * 512, "$" * 512, "." * 512, "-" * 512,
    " " * 512, "1 " * 256, "1,000" * 100, "{,}" * 170, "1{,}" * 128, r"\text{" * 80,
    r"\text{a}" * 70, r"\cup" * 120, r"1\cup" * 100, r"\frac12" * 70, r"^\circ" * 80, "°" * 512,
    "\\\\" * 256, "7 " + "abcd " * 100, "7 " + "a" * 500, "((((((1,2),3),4),5),6),7)",
    "__import__('os').system('true')", "\x00\u202e\ud800\uff17", "(1)" * 170, "[{(" * 170,
)  # fmt: skip
_WHOLE = {
    "5,000 unclosed boxes": BOX * 5_000,
    "20,000 unclosed boxes": BOX * 20_000 + "7",
    "20,000 nested boxes": BOX * 20_000 + "}" * 20_000,
    "unclosed boxes of braces": (BOX + "{}" * 250 + "{") * 20,
    "unclosed boxes of closed ones": (BOX + "{" * 256 + "}" * 255) * 20,
    "100,000 digits in a box": BOX + "9" * 100_000 + "}",
    "100,000 digits": "9" * 100_000,
    "100,000 opening braces": BOX + "{" * 100_000,
    "100,000 deep braces": BOX + "{" * 100_000 + "}" * 100_001,
    "100,000 closing braces": BOX + "7" + "}" * 100_000,
    "100,000 backslashes": "\\" * 100_000,
    "100,000 letters": "a" * 100_000,
    "100,000 dollars": "$" * 100_000,
    "100,000 spaces": " " * 100_000,
    "100,000 hashes": "#" * 100_000,
    "spaces after hashes": "####" + " " * 100_000,
    "20,000 thoughts": (BOX + "7}</think>") * 20_000,
    "20,000 open thoughts": "<think>" * 20_000,
    "7,000 times the answer is": "the answer is " * 7_000,
    "a token loop": "12 " * 16_384,
    "a comma loop": "1,234," * 16_384,
}
HOSTILE = {**{f"box of {inside[:24]!r}": BOX + inside + "}" for inside in _INSIDE}, **_WHOLE}
"""Responses that hang or slow other verifiers, or try to be run."""


def _hostile(sizes: VerifierBench) -> Iterator[Figure]:
    taken = {
        name: _best(functools.partial(grade_hostile, response), sizes.repeats)
        for name, response in HOSTILE.items()
    }
    for name in list(taken)[:10]:
        yield Figure(f"hostile, {name}", 1e3 * taken[name], "ms", 1.0)
    slowest = max(taken, key=taken.__getitem__)
    yield Figure(f"slowest, {slowest}", 1e3 * taken[slowest], "ms", 1.0)


def grade_hostile(response: str) -> list[Outcome]:
    """Its outcomes against a number and, where it has an answer, against nearly the same text."""
    answer = extract_answer(response, flexible)
    golds = ["7"] if answer is None else ["7", f"{answer[:-1]}7"]
    return [grade(response, gold, flexible).outcome for gold in golds]


# --- symbolic answers -----------------------------------------------------------------------------

NUMBERS = {"integers": ("{n}", "{n}"), "fractions": (r"\frac{{{n}}}{{7}}", "{n}/7")}
SYMBOLIC = {
    "sums": ("{n}+x", "x+{n}"),
    "roots": (r"\sqrt{{{square}}}", r"{n}\sqrt{{3}}"),
    "pairs": (r"({n}\pi, 2)", r"(\pi\cdot{n}, 2)"),
}
"""(answer, gold) of n, and of 3 n^2."""


def _symbolic(sizes: VerifierBench) -> Iterator[Figure]:
    if importlib.util.find_spec("math_verify") is None:
        yield Figure("a symbolic answer", None, "ms", None, "not installed: kdjax[math]")
        return
    with open_symbolic(deadline_seconds=60.0) as grader:
        for name, forms in NUMBERS.items():
            runs = []
            for repeat in range(sizes.repeats):  # no gold is met twice
                pairs = _pairs(forms, sizes, 10**5 * repeat)
                asked = [{"answer": answer, "gold": gold} for answer, gold in pairs]
                runs.append(_wall(grader.workers.map, asked))
            yield _rate(f"math-verify in a worker, {name}", min(runs), sizes, 2.5)
        for name, forms in SYMBOLIC.items():
            pairs = [(rf"\boxed{{{answer}}}", gold) for answer, gold in _pairs(forms, sizes)]
            yield _rate(f"a symbolic answer, {name}", _wall(grader, pairs), sizes)
    with open_symbolic(deadline_seconds=1.0) as grader:
        grader([(r"\boxed{2+x}", "x+2")])
        taken = _wall(grader, [(r"\boxed{(x+y+z+w)^{200}}", "2x")])
        yield Figure("a hang, with a deadline of 1 s", taken, "s", 1.5, "then a fresh worker")


def _wall(run: Callable[[Any], object], given: Any) -> float:
    return timeit.timeit(lambda: run(given), number=1)


def _pairs(forms: tuple[str, str], sizes: VerifierBench, more: int = 0) -> Pairs:
    numbers = range(11 + more, 11 + more + sizes.symbolic_problems)
    first, second = ([f.format(n=n, square=3 * n * n) for n in numbers] for f in forms)
    return list(zip(first, second, strict=True))


def _rate(name: str, taken: float, sizes: VerifierBench, reach: float | None = None) -> Figure:
    each = taken / sizes.symbolic_problems
    return Figure(name, 1e3 * each, "ms", reach, f"{1 / each:,.0f} a second and worker")
