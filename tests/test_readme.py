"""The README is part of the product: its code runs, its links lead somewhere, its configs load."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

import kdjax
from kdjax.config import Config, Study
from kdjax.config_json import as_dict
from kdjax.validation import validate

ROOT = Path(__file__).parent.parent
INIT = (ROOT / "kdjax/__init__.py").read_text()
README = (ROOT / "README.md").read_text()
SCRIPTS = ("rebuild.py", "rebuild_study.py", "rehearse.py")
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name not in SCRIPTS)


def test_the_example_runs():
    """The composed loss trains as printed (two steps of its twenty)."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("range(20)", "range(2)"), names)
    assert int(names["state"].step) == 2
    assert float(names["metrics"]["loss"]) > 0


def test_the_loss_head_page_runs(capsys):
    """The three kinds of teacher of docs/loss_head.md give losses, top-k no more than the whole."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/loss_head.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    said = [line.rsplit(" ", 3) for line in capsys.readouterr().out.splitlines()]
    losses = {line[0]: float(line[1]) for line in said}
    assert losses["hidden states"] == losses["logits"] > losses["top 8"] > 0


def test_public_names_are_what_they_say():
    """Every name of kdjax.__all__ is there, and none is hidden by a module of the same name."""
    modules = {p.stem for p in (ROOT / "kdjax").glob("*.py")}
    for name in kdjax.__all__:
        assert getattr(kdjax, name) is not None
        assert name not in modules
    imports = [n for n in ast.walk(ast.parse(INIT)) if isinstance(n, ast.ImportFrom)]
    declared = {a.name for n in imports if n.module.startswith("kdjax") for a in n.names}
    assert declared == set(kdjax.__all__)


def test_links_lead_somewhere():
    """Every relative link and every configs/ path that the README names exists."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    paths = [link for link in links if "://" not in link] + re.findall(
        r"configs/[\w/]+\.py", README
    )
    assert len(paths) > 5
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_load(path):
    """Each config is valid and says in its docstring how it is run."""
    names = runpy.run_path(str(path))
    value = names["get_study" if "get_study" in names else "get_config"]()
    cells = value.cells.values() if isinstance(value, Study) else [value]
    assert all(isinstance(validate(c), Config) for c in cells)
    assert "kdjax " in names["__doc__"] or "python configs/" in names["__doc__"]


def test_the_quickstart_is_the_2x2_and_the_mix():
    """Cells differ in prefix and token loss only, and are those of the single configs."""
    study = runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_study"]()
    assert list(study.cells) == [
        "teacher_forward", "teacher_reverse", "student_forward", "student_reverse", "student_mix",
    ]  # fmt: skip
    for name, cell in study.cells.items():
        single = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()
        assert {**as_dict(cell), "run": ""} == {**as_dict(single), "run": ""}


def test_the_controls_differ_in_their_curriculum_alone():
    """Of the study's cells one is the curriculum's own config, the others change nothing else."""
    study = runpy.run_path(str(ROOT / "configs/curriculum_controls.py"))["get_study"]()
    assert list(study.cells) == ["long", "short", "ungated", "stop", "hold", "fall_back"]
    single = runpy.run_path(str(ROOT / "configs/curriculum.py"))["get_config"]()
    cells = {name: {**as_dict(cell), "run": ""} for name, cell in study.cells.items()}
    assert cells["stop"] == {**as_dict(single), "run": ""}
    for name in cells:
        assert {**cells[name], "curriculum": 0} == {**cells["stop"], "curriculum": 0}
    policies = {name: cells[name]["curriculum"]["policy"] for name in ("stop", "hold", "fall_back")}
    assert policies == {name: name for name in policies}
    assert cells["long"]["curriculum"]["lengths"] == [single.curriculum.lengths[-1]]
    assert cells["short"]["curriculum"]["lengths"] == [single.curriculum.lengths[0]]
    assert cells["ungated"]["curriculum"]["entropy_threshold_nats"] == 0.0
