"""One writer of a report: the same numbers as a page, in Markdown and as CSV."""

from __future__ import annotations

from synthetic import VERDICTS, a_run, a_study

from kdjax.report.folder import write_report
from kdjax.report.page import render_page
from kdjax.report.results import Cell
from kdjax.report.text import render_results, to_csv


def test_what_each_kind_of_folder_holds(tmp_path):
    """A run's three files, a study's under its own names with verdicts, an evaluation's two."""
    about, one, study = {"seed": 0}, [Cell("r", [a_run("r", 0, 0.5, steps=4)])], a_study(seeds=1)
    write_report(tmp_path / "run", "Run r", one, about)
    names = {"markdown": "results.md", "table": "table.csv"}
    write_report(tmp_path / "study", "Study s", study, about, VERDICTS, **names)
    write_report(tmp_path / "evaluation", "Evaluation of r", one, about, table=None)
    written = {f"{path.parent.name}/{path.name}": path.read_text() for path in tmp_path.glob("*/*")}
    assert written == {
        "run/report.html": render_page("Run r", one, about),
        "run/report.md": render_results("Run r", one, about),
        "run/report.csv": to_csv(one),
        "study/report.html": render_page("Study s", study, about, VERDICTS),
        "study/results.md": render_results("Study s", study, about, VERDICTS),
        "study/table.csv": to_csv(study),
        "evaluation/report.html": render_page("Evaluation of r", one, about),
        "evaluation/report.md": render_results("Evaluation of r", one, about),
    }
