"""The printed data check: a table of counts, and three problems."""

from __future__ import annotations

from kdjax.data.sources.check import RULE, Report
from kdjax.data.sources.survey import Counts

SHOWN_CHARACTERS = 600

MEANING: dict[str, str] = {
    "rows": "rows read",
    "left_out": "left out by the dataset's own rule",
    "no_prompt": "left out: no prompt",
    "no_answer": "left out: no usable answer",
    "duplicates": "left out: duplicates",
    "conflicting": "same prompt as an earlier row, other answer",
    "unverifiable": "answer that the verifier could not grade",
    "leaked": "prompt says the answer",
    "disagreeing": "worked response ends with another answer",
    "several_traces": "several worked responses, one is chosen",
    "unverified_traces": "worked responses, none verified: not used",
    "worked": "with a worked response",
}


def show(report: Report) -> None:
    """Print a report."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, dataset = Console(markup=False, emoji=False), report.dataset

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(dataset.about)
    if dataset.note:
        say(f"note: {dataset.note}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("what")
    table.add_column("rows", justify="right", no_wrap=True)
    for what, count in table_rows(report):
        table.add_row(what, f"{count:,}")
    console.print(table)
    if report.against:
        say(f"rule: {RULE}")
    if report.prompt_tokens is not None:
        median, most, longest = report.prompt_tokens
        say(f"prompt tokens: median {median}, 99 % up to {most}, longest {longest}")
    for example in report.examples:
        say(f"\n{example['id']}")
        for field in ("prompt", "gold", "solution"):
            say(f"{field}: {_short(example[field])}")


def table_rows(report: Report) -> list[tuple[str, int]]:
    """(what is counted, how often), the problems that are used last."""
    counts = report.dataset.counts
    rows = [(MEANING[name], getattr(counts, name)) for name in Counts._fields]
    for one in report.against:
        for test in ("exact", "overlap"):
            first = getattr(one, f"first_{test}")
            of = f", such as {first[0]}" if first else ""
            rows.append((f"in {one.benchmark} too, {test}{of}", getattr(one, test)))
    return [*rows, ("problems that are used", report.dataset.size)]


def _short(text: str | None) -> str:
    if text is None:
        return "none"
    cut = len(text) > SHOWN_CHARACTERS
    return repr(text[:SHOWN_CHARACTERS]) + (f" ... ({len(text)} characters)" if cut else "")
