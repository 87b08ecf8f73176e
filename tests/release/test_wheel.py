"""The wheel, in an environment of its own and a folder that holds a folder named kdjax."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment with the wheel; what it needs is read from this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (own,) = (folder / "env" / "lib").glob("python*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def ran(python: Path, folder: Path, *arguments: str) -> str:
    """What a command prints there; packages other than kdjax are this environment's."""
    (folder / "kdjax").mkdir(exist_ok=True)  # as a clone beside one's own scripts
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_all_that_it_needs(installed, tmp_path):
    """It is that wheel's package that is imported; configs, models and templates came along."""
    said = ran(
        installed, tmp_path, "-c", "import kdjax; print(kdjax.__file__, kdjax.Config().steps)"
    )
    assert Path(said.split()[0]).is_relative_to(installed.parents[1])
    assert "quickstart" in ran(installed, tmp_path, "-m", "kdjax", "list", "configs")
    assert ran(installed, tmp_path, "-m", "kdjax", "--version").startswith("kdjax ")
    said = ran(
        installed, tmp_path, "-m", "kdjax", "train", "methods/gkd", "--steps", "2",
        "--data.problems", "96", "--evaluation.problems", "4", "--evaluation.samples", "1",
        "--evaluation.k", "1",
    )  # fmt: skip
    assert "Avg@1" in said
    assert (tmp_path / "runs" / "methods" / "gkd" / "report.html").stat().st_size > 10_000


def test_a_clone_beside_ones_script_does_not_hide_it(tmp_path):
    """An editable install is found from a folder that holds a folder named kdjax."""
    (tmp_path / "kdjax").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import kdjax; print(kdjax.Config().steps)"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "120\n", done.stderr
