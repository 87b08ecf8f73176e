"""The check of a dataset: its contents, and its overlap with benchmarks (`kdjax data check`)."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from kdjax.data.sources.load import Loaded, load
from kdjax.data.sources.survey import normalised
from kdjax.data.tokenizer import Tokenizer

WORDS = 13
EXAMPLES = 3

RULE = (
    f"a prompt is in a benchmark too where a prompt there is the same but for case and space"
    f" (exact), or shares {WORDS} words in a row with one there (overlap); words are runs of"
    " letters and digits, and shorter prompts are compared whole"
)


class Contamination(NamedTuple):
    """The problems of a dataset that are in a benchmark too: how many by each test of RULE, and the
    ids of the first few of each."""

    benchmark: str
    exact: int
    overlap: int
    first_exact: tuple[str, ...]
    first_overlap: tuple[str, ...]


class Tokens(NamedTuple):
    """Tokens of the rendered prompts of a dataset."""

    median: int
    percentile_99: int
    longest: int


class Report(NamedTuple):
    """A dataset, its contamination by each benchmark, three examples, and its prompts' lengths by a
    student's tokenizer, if one is given."""

    dataset: Loaded
    against: tuple[Contamination, ...]
    examples: tuple[dict[str, str | None], ...]
    prompt_tokens: Tokens | None


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """The options of `kdjax data check`. student: a model folder or hub name, whose chat template
    prompts are shown in; the rest are as in `kdjax.config.Data`."""

    against: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    student: str | None = None
    prompt_template: str = "{prompt}"
    system_prompt: str | None = None
    thinking: bool = False
    chat_template: str | None = None


def check(
    text: str, columns: Sequence[str], against: Sequence[str], student: Tokenizer | None
) -> Report:
    """The check of a dataset by its name or path; every problem is read. Errors: as `load`, of it
    and of each benchmark."""
    dataset = load(text, columns, "train")
    benchmarks = [(name, load(name, (), "test")) for name in against]
    problems = [dataset.problem(index) for index in range(min(EXAMPLES, dataset.size))]
    examples = tuple(
        {
            "id": p.id,
            "prompt": student.render(p.prompt) if student else p.prompt,
            "gold": p.answer,
            "solution": p.solution,
        }
        for p in problems
    )
    tokens = None if student is None else _tokens(dataset, student)
    return Report(dataset, contamination(dataset, benchmarks), examples, tokens)


def _tokens(dataset: Loaded, student: Tokenizer) -> Tokens:
    prompts = [dataset.problem(index).prompt for index in range(dataset.size)]
    lengths = sorted(map(len, student.encode_prompts(prompts)))
    last = len(lengths) - 1
    return Tokens(lengths[last // 2], lengths[-(-last * 99 // 100)], lengths[last])


def contamination(
    dataset: Loaded, benchmarks: Iterable[tuple[str, Loaded]]
) -> tuple[Contamination, ...]:
    """The problems of a dataset that are in each benchmark, by RULE."""
    known = [(name, *_prompts(benchmark)) for name, benchmark in benchmarks]
    found: list[tuple[list[str], list[str]]] = [([], []) for _ in known]
    for index in range(dataset.size if known else 0):
        problem = dataset.problem(index)
        whole, runs = normalised(problem.prompt), set(word_runs(problem.prompt))
        for (_, prompts, theirs), (exact, overlap) in zip(known, found, strict=True):
            if whole in prompts:
                exact.append(problem.id)
            elif not runs.isdisjoint(theirs):
                overlap.append(problem.id)
    return tuple(
        Contamination(name, len(exact), len(overlap), *_first(exact, overlap))
        for (name, _, _), (exact, overlap) in zip(known, found, strict=True)
    )


def _first(*ids: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(some[:EXAMPLES]) for some in ids)


def word_runs(prompt: str) -> list[int]:
    """A hash of each WORDS words in a row.

    >>> print(len(word_runs("one " * 14)), len(word_runs("one " * 12)))
    2 0
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).casefold())
    return [hash(tuple(words[at : at + WORDS])) for at in range(len(words) - WORDS + 1)]


def to_json(report: Report) -> dict[str, Any]:
    """A report as JSON values."""
    dataset = report.dataset
    return {
        "dataset": dataset.about,
        "note": dataset.note,
        "identity": dataset.identity,
        "problems": dataset.size,
        "counts": dataset.counts._asdict(),
        "contamination": {"rule": RULE, "against": [c._asdict() for c in report.against]},
        "prompt_tokens": report.prompt_tokens and report.prompt_tokens._asdict(),
        "examples": list(report.examples),
    }


def _prompts(benchmark: Loaded) -> tuple[set[str], set[int]]:
    prompts = [benchmark.problem(index).prompt for index in range(benchmark.size)]
    return {normalised(p) for p in prompts}, {run for p in prompts for run in word_runs(p)}
