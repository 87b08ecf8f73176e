"""What a report is made of: its tables in order, each with what a reader has to know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kdjax.report.results import Cell, Row, Verdict
from kdjax.report.tables import (
    are_comparable,
    at_temperatures,
    comparison,
    differences,
    equal_readings,
    flops_by_part,
    more_samples,
    responses,
    warned,
)
from kdjax.report.verdicts import verdict_table
from kdjax.runtime.console import Table


class Section(NamedTuple):
    """A table with what a reader has to know of it. words: its last column wraps, as text does."""

    title: str
    note: str
    table: Table
    words: bool = False


def sections(cells: Sequence[Cell], verdicts: Sequence[Verdict] = ()) -> list[Section]:
    """Every table that there is data for. Readings at equal cost need the start as first cell."""
    trained = [cell for cell in cells if cell.runs[0].report.training_flops is not None]
    found = [
        Section("Verdicts", VERDICTS, verdict_table(verdicts), words=True),
        Section("Comparison", setting_of(cells), comparison(cells)),
        Section("More samples", MORE_SAMPLES, more_samples(cells)),
        Section("Other temperatures", TEMPERATURES, at_temperatures(cells)),
        Section("Responses", RESPONSES, responses(cells)),
    ]
    alike = [cell for cell in trained if are_comparable(cell, trained[0])]
    if len(alike) > 1:
        found.append(Section(f"Differences to {alike[0].name}", DIFFERENCES, differences(alike)))
        tested = all(_is_tested(run) for cell in alike for run in cell.runs)
        if tested and cells[0] not in trained and are_comparable(cells[0], alike[0]):
            readings = equal_readings(alike, cells[0].runs[0])
            found.append(Section("At equal steps and at equal FLOPs", READINGS, readings))
    found.append(Section("Training FLOPs by part", FLOPS, flops_by_part(trained)))
    found.append(Section("Warnings", WARNED, warned(cells), words=True))
    return [section for section in found if section.table[1]]


def _is_tested(run: Row) -> bool:
    """Whether it was tested during training: from start and end alone, a reading at equal cost
    would be a straight line."""
    return any("test_correct" in record for record in run.metrics)


MORE_SAMPLES = (
    "In percent, with 95 % intervals over problems (and seeds, where there are several). Pass@k:"
    " one of k samples is right, unbiased. Maj@k: the most frequent answer of k is, in runs of k in"
    " the order drawn (of several seeds the mean alone)."
)
TEMPERATURES = (
    "The same students and problems, sampled otherwise; the first line of each is that of all other"
    " tables. A student of forward KL keeps more entropy, and at temperature 1 pays for it with"
    " answers. Shares in percent, length in tokens, ± one standard error."
)
RESPONSES = (
    "Every response is one of the first four, in percent; a truncated one may be any of them."
    " A length of 90 %: nine of ten responses are no longer, in tokens (means over seeds)."
)
VERDICTS = (
    "The difference is the mean of the first cells less that of the others, paired by problem and"
    " seed, with a 95 % interval of its own. p is that of no difference (or of just what the claim"
    " allows to lose), corrected for the number of claims in this table (Holm). A claim is"
    " supported where p is under 0.05 and the difference on its side, contradicted where it is on"
    " the other, and undecided otherwise, even where its own interval leaves out 0. Could be seen:"
    " the smallest difference that such a table shows in 80 % of all cases, where seeds and"
    " problems scatter as here. Of one seed all this is over problems alone: of these students,"
    " not of training again. One problem decides nothing."
)
DIFFERENCES = (
    "Paired by problem and seed, with 95 % intervals over problems (and seeds, where there are"
    " several), each by itself: of many, one in twenty leaves out 0 by chance."
)
READINGS = (
    "Avg of the finished students, and at the FLOPs of the cheapest of them (by seed, interpolated"
    " between the tests during training, which may draw fewer samples and so scatter more). The"
    " FLOPs of a student that began as another's hold what that one cost, and so does its line."
)
FLOPS = "Of the models, of real tokens, mean over seeds; what a teacher computed once counts once."
WARNED = (
    "Updates that were skipped, each kind of warning where it was first due, and what of the"
    " evaluation is to be doubted."
)


def setting_of(cells: Sequence[Cell]) -> str:
    """What the numbers of a comparison are, in words."""
    report, seeds = cells[0].runs[0].report, max(len(cell.runs) for cell in cells)
    errors = "problems" if seeds == 1 else f"problems and {seeds} seeds"
    return (
        f"{report.problems} test problems ({report.source}), {report.samples} samples a problem,"
        f" {report.sampling}, at most {report.max_new_tokens} tokens, graded {report.grader}."
        f" {_ungraded(cells)} Shares in percent, lengths in"
        f" tokens, ± one standard error over {errors}; gains are paired over the same problems."
        " Entropy and both KLs are token means in nats over a model's own responses, exact over the"
        " vocabulary: KL(t‖s) is forward, KL(s‖t) reverse. FLOPs and seconds hold those of what a"
        " cell began as, seconds also what was compiled."
    )


def _ungraded(cells: Sequence[Cell]) -> str:
    """Why answers were not scored, over all runs; most often none was."""
    reasons: Counter[str] = Counter()
    for run in (run for cell in cells for run in cell.runs):
        reasons.update(run.report.not_scored_reasons)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"Not scored: {said}." if said else "All answers were scored."
