"""The configs that come along: found by name from any folder, listed without being run."""

from __future__ import annotations

import pytest

from kdjax.config import shipped
from kdjax.config.overrides import load_file
from kdjax.errors import ConfigError


@pytest.mark.parametrize("name", ["methods/gkd", "configs/methods/gkd.py", "methods/gkd.py"])
def test_by_name_from_another_folder(name, tmp_path, monkeypatch):
    """With and without configs/ before it and .py behind it."""
    monkeypatch.chdir(tmp_path)
    assert shipped.find(name) == shipped.folder() / "methods" / "gkd.py"
    assert load_file(name, "get_config").run == "runs/methods/gkd"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    """A path that is there is that file, whatever comes along under its name."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs"
    own.mkdir()
    (own / "student_mix.py").write_text(
        "from kdjax import Config\n\n\ndef get_config():\n    return Config(steps=7)\n"
    )
    assert load_file("configs/student_mix.py", "get_config").steps == 7
    assert load_file("student_mix", "get_config").steps == 120


def test_a_name_that_is_none(tmp_path, monkeypatch):
    """One line with the nearest name, or the command that lists them."""
    monkeypatch.chdir(tmp_path)
    for name, says in (("student_mx", "did you mean student_mix"), ("zzz", "kdjax list names")):
        with pytest.raises(ConfigError, match=says):
            shipped.find(name)


def test_every_one_says_what_it_is():
    """A first sentence each; studies and configs apart."""
    known = shipped.names()
    assert {"quickstart", "student_mix", "methods/gkd", "paper/qwen3_4b_to_06b"} <= {*known}
    assert "embedded/rebuild" not in known  # a script
    for name, path in known.items():
        assert len(shipped.about(path)) > 20, name
        assert shipped.holds(path, "config") != shipped.holds(path, "study"), name
