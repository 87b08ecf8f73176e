"""What the numbers of a run give reason to say: skipped updates, and what often goes wrong, with
the knob to turn. Records in, lines out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]
WARNINGS = "warnings"
"""Where a record keeps the lines that were said at it."""

COLLAPSED = 0.1  # of the first entropy
SPIKE, LEAST_RECORDS, RECENT = 10.0, 10, 50  # times the median of the recent records, of so many


class Update(NamedTuple):
    """What decides whether an update is made: its step (from 1), its loss, its gradient's norm."""

    step: int
    loss: Any
    gradient_norm: Any


def skipped(updates: Iterable[Update], in_a_row: int) -> tuple[list[str], list[int]]:
    """(a line for each update that was skipped, how many were in a row after each update), where
    in_a_row of them were before the first. Reads arrays of a device.

    >>> skipped([Update(7, 0.5, 1.0), Update(8, float("nan"), 1.0)], 0)
    (['step 8: loss is nan, its update was skipped'], [0, 1])
    """
    lines, rows = [], []
    for update in updates:
        numbers = {"loss": float(update.loss), "gradient_norm": float(update.gradient_norm)}
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        in_a_row = in_a_row + 1 if bad else 0
        rows.append(in_a_row)
        if bad:
            lines.append(f"step {update.step}: {' and '.join(bad)}, its update was skipped")
    return lines, rows


def warnings(earlier: Sequence[Record], new: Record) -> list[str]:
    """What a new record (with its `step`) gives reason to warn of, each thing once a run: as the
    lines that were said are in the earlier records, a resumed run does not say them again."""
    said = [line for record in earlier for line in record.get(WARNINGS, ())]
    found = ((name, check(earlier, new)) for name, check in CHECKS.items())
    return [
        f"step {new['step']}: {name}: {text}"
        for name, text in found
        if text is not None and not any(f": {name}: " in line for line in said)
    ]


def _collapse(earlier: Sequence[Record], new: Record) -> str | None:
    first = next((r["student_entropy"] for r in earlier if "student_entropy" in r), None)
    now = new.get("student_entropy")
    if first is None or now is None or now >= COLLAPSED * first:
        return None
    return (
        f"the student's {now:.3g} nats a token are under {COLLAPSED:.0%} of its first {first:.3g};"
        " more forward KL (token_loss), a shorter curriculum.lengths or a lower"
        " optimizer.learning_rate keeps more"
    )


def _truncation(earlier: Sequence[Record], new: Record) -> str | None:
    if new.get("truncated", 0.0) < 1.0:
        return None
    return (
        "no response of the batch ended before its limit of tokens, so no end is learned from it;"
        " raise curriculum.lengths"
    )


def _spike(earlier: Sequence[Record], new: Record) -> str | None:
    norms = [r["gradient_norm"] for r in earlier[-RECENT:] if "gradient_norm" in r]
    now = new.get("gradient_norm")
    if now is None or len(norms) < LEAST_RECORDS or now <= SPIKE * statistics.median(norms):
        return None
    return (
        f"{now:.3g} is over {SPIKE:.0f} times the median {statistics.median(norms):.3g} of the last"
        f" {len(norms)} records; lower optimizer.clip_norm or optimizer.learning_rate if it stays"
    )


CHECKS: dict[str, Callable[[Sequence[Record], Record], str | None]] = {
    "entropy collapse": _collapse,
    "all responses truncated": _truncation,
    "gradient-norm spike": _spike,
}
"""What is warned of, by the name that its line has: (earlier records, new record) -> why, or
None."""
