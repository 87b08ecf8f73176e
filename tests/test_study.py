"""A study trains its cells once, compares them on the same problems, and leaves a page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_train import tiny  # noqa: F401  (a fixture)

from kdjax import forward_kl, reverse_kl
from kdjax import study as study_module
from kdjax.base import ConfigError
from kdjax.config import Study


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
