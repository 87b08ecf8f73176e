"""A study trains its cells once, compares them on the same problems, and leaves a page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from test_train import tiny  # noqa: F401  (a fixture)

from kdjax import forward_kl, reverse_kl
from kdjax import study as study_module
from kdjax.base import ConfigError, Sampling
from kdjax.config import Study
from kdjax.evaluate import EvalReport
from kdjax.page import Row, gain, render_page, table
from kdjax.passk import Estimate, avg_at_k, pass_at_k


def a_report(correct: list[int], samples: int = 4, source: str = "s", **changes) -> EvalReport:
    share = Estimate(0.0, 0.0)
    fields = dict(
        problems=len(correct), samples=samples, sampling=Sampling(), max_new_tokens=8, seed=0,
        source=source, avg=avg_at_k(correct, samples),
        pass_at={k: pass_at_k(correct, samples, k) for k in (1, samples)},
        length=Estimate(5.0, 0.1), truncated=share, no_answer=share, entropy=0.5,
        grader="exact", not_scored=share, not_scored_reasons={},
        forward_kl=0.1, reverse_kl=None,
        correct=correct, seconds=1.0,
    )  # fmt: skip
    return EvalReport(**{**fields, **changes})


SAMPLE = {
    "problem": "p", "sample": 0, "prompt": "1+1=", "gold": "2", "response": "<b>2</b>",
    "answer": "2", "correct": True, "no_answer": False, "truncated": False, "tokens": 3,
}  # fmt: skip
METRICS = [{"step": s, "loss": 1.0 / s, "student_entropy": 0.5} for s in (1, 2, 3)]


def test_gains_are_paired():
    """The difference's error is over per-problem differences: exactly 0 for a constant gain."""
    base, better = a_report([0, 1, 2]), a_report([1, 2, 3])
    assert gain(better, base) == "+25.0 ± 0.0"
    assert gain(a_report([3, 1, 2]), base) == "+25.0 ± 25.0"
    assert gain(a_report([1, 2, 3], source="other"), base) == "not comparable"
    assert gain(a_report([1, 2, 3], grader="math"), base) == "not comparable"


def test_table_has_a_cell_for_every_header():
    """One run has no gain column; several have one, empty for the first."""
    header, cells = table([Row("a", a_report([1, 2]), [], [])])
    assert len(header) == len(cells[0])
    assert "gain over a" not in header
    header, cells = table([Row(n, a_report([1, 2]), [], []) for n in "ab"])
    assert [len(line) for line in cells] == [len(header)] * 2
    assert cells[0][header.index("gain over a")] == ""
    assert cells[1][header.index("KL(s‖t)")] == "-"


def test_page_is_self_contained_and_escaped():
    """No script, no request to elsewhere, model text shown as text, every plot drawn and named."""
    rows = [
        Row("start", a_report([1, 2], not_scored_reasons={"crash": 3}), [], [SAMPLE]),
        Row("run", a_report([2, 2]), METRICS, [{**SAMPLE, "correct": False, "not_scored": True}]),
    ]
    page = render_page("Study <x>", rows, {"jax": "0.0"})
    assert "graded exact" in page
    assert "(crash: 3) in start" in page
    assert page.count(">not scored<") == 1
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"http", page)
    assert "&lt;b&gt;2&lt;/b&gt;" in page
    assert "<b>2</b>" not in page
    assert "Study &lt;x&gt;" in page
    assert page.count("<svg") == page.count("<figcaption>") == 4
    assert page.count("training step") == 2


def test_study_trains_once_and_reports(tiny, monkeypatch):  # noqa: F811
    """Cells land in their folders; a second call reuses them; a changed cell is refused."""
    folder = Path(tiny.run).parent / "study"
    cells = {
        name: dataclasses.replace(tiny, token_loss=loss, steps=2)
        for name, loss in (("forward", forward_kl), ("reverse", reverse_kl))
    }
    rows = study_module.run_study(Study(str(folder), cells))
    assert [row.name for row in rows] == ["start", "teacher", "forward", "reverse"]
    assert rows[0].report.source == rows[3].report.source
    assert rows[1].report.forward_kl == 0.0
    assert rows[1].report.reverse_kl == 0.0
    assert (folder / "forward" / "metrics.jsonl").exists()
    assert "reverse" in (folder / "report.html").read_text()
    assert [line["run"] for line in json.loads((folder / "table.json").read_text())][2] == "forward"

    def must_not_train(config):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(study_module, "train", must_not_train)
        patched.setattr(study_module, "evaluate_params", must_not_train)
        again = study_module.run_study(Study(str(folder), cells))
    assert [row.report for row in again] == [row.report for row in rows]
    cells["forward"] = dataclasses.replace(cells["forward"], seed=5)
    with pytest.raises(ConfigError, match="seed: 0 -> 5"):
        study_module.run_study(Study(str(folder), cells))
    with pytest.raises(ConfigError, match="no cells"):
        study_module.run_study(Study(str(folder), {}))
