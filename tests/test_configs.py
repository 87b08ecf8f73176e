"""What users type and import: every config is valid, every public name is there."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kdjax
from kdjax import losses
from kdjax.config import Config, Study
from kdjax.config.as_json import as_dict
from kdjax.config.validation import validate

ROOT = Path(__file__).parent.parent
INIT = (ROOT / "kdjax/__init__.py").read_text()
SCRIPTS = ("rebuild.py", "rebuild_study.py", "rehearse.py")
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name not in SCRIPTS)


def test_public_names_are_what_they_say():
    """Every name of kdjax.__all__ is there, and none is hidden by a module of the same name."""
    modules = {p.stem for p in (ROOT / "kdjax").glob("*.py")} - {"tasks"}  # which is that module
    for name in kdjax.__all__:
        assert getattr(kdjax, name) is not None
        assert name not in modules
    imports = [n for n in ast.walk(ast.parse(INIT)) if isinstance(n, ast.ImportFrom)]
    declared = {
        (n.module, a.name) for n in imports if n.module.startswith("kdjax") for a in n.names
    }
    homes = {(f"kdjax.losses.{home}", "*") for home in losses.HOMES}  # all that is in their tables
    assert {one for one in declared if one[1] == "*"} == homes
    names = {name for _, name in declared - homes} | set(losses.named(*losses.TABLES))
    assert names == set(kdjax.__all__)


def test_the_front_page_is_quick():
    """What is not on it, or is a module, is looked up without jax."""
    code = (
        "import sys, kdjax; from kdjax import errors; assert not hasattr(kdjax, '__wrapped__');"
        "assert 'jax' not in sys.modules; assert not hasattr(kdjax, 'nothing');"
        "from kdjax import *; assert callable(clip) and 'math' not in dir()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_names_that_users_import():
    """The tasks and a study's claims have their own short names; what is none is no attribute."""
    from kdjax.claims import paper_claims
    from kdjax.config.claims import paper_claims as defined
    from kdjax.tasks import TASKS

    assert paper_claims is defined
    assert kdjax.tasks.TASKS is TASKS
    assert not hasattr(kdjax, "no.name")
