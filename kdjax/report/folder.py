"""The report of a run, an evaluation or a study in its folder: a page, its text, its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.report.page import render_page
from kdjax.report.results import Cell, Verdict
from kdjax.report.text import render_results, to_csv
from kdjax.runtime import files
from kdjax.storage.run_folder import MARKDOWN, PAGE, TABLE


def write_report(
    folder: Path,
    title: str,
    cells: Sequence[Cell],
    about: Mapping[str, Any],
    verdicts: Sequence[Verdict] = (),
    *,
    markdown: str = MARKDOWN,
    table: str | None = TABLE,
) -> None:
    """Write the page, the same in Markdown, and every run's numbers as CSV (None: no file of them).
    Errors: StorageError."""
    files.write_text(folder / PAGE, render_page(title, cells, about, verdicts))
    files.write_text(folder / markdown, render_results(title, cells, about, verdicts))
    if table is not None:
        files.write_text(folder / table, to_csv(cells))
