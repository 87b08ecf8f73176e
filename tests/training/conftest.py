"""Runs whose pages have no figures: to draw them takes a third of a tiny run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def figures_are_left_out(monkeypatch):
    """tests/report draws them, and so do the runs of tests/test_study.py and tests/test_main.py; a
    test of this folder that is to see one calls monkeypatch.undo()."""
    monkeypatch.setattr("kdjax.report.page.draw", lambda figure, looks: "")
