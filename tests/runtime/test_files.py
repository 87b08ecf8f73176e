"""Files and folders are whole or not at all, whatever ends their writer; JSON is read strictly."""

from __future__ import annotations

import pytest

from kdjax.errors import StorageError
from kdjax.runtime import files


def fail_in(place, write, kind=ValueError):
    """Write to a place, and fail before the end."""
    with place as partial:
        write(partial)
        raise kind("half")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    """A writer that fails leaves the old file and nothing beside it."""
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ValueError, match="half"):
        fail_in(files.whole_file(path), lambda partial: partial.write_text("ne"))
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(StorageError, match="can't write"):
        files.write_text(tmp_path / "a.txt" / "inside", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_whole_or_absent(tmp_path):
    """A writer that fails leaves nothing; one that finds a full folder in the place does not touch
    it, and an empty one is filled."""
    place = tmp_path / "folder"
    with pytest.raises(ValueError, match="half"):
        fail_in(files.whole_folder(place), lambda partial: (partial / "a").write_text("x"))
    assert not [*tmp_path.iterdir()]
    place.mkdir()
    with files.whole_folder(place) as partial:
        (partial / "a").write_text("first")
    with pytest.raises(OSError, match="not empty"), files.whole_folder(place) as partial:
        (partial / "a").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (place / "a").read_text() == "first"


def test_what_the_killed_left_is_of_its_folder_alone(tmp_path):
    """Partials of this folder go, of others they stay, also of names that begin alike."""
    own = {"model.partial", "model.1a2b3c4d.partial"}
    others = {"model", "model2.partial", "model.v2.1a2b3c4d.partial", "amodel.partial"}
    for name in own | others:
        (tmp_path / name).mkdir()
    files.remove_partials(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == others


def test_a_model_folder_clears_what_was_left(tmp_path):
    """Before it is written: what a killed export left may be as large as the model."""
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "half").write_text("killed")
    with files.new_folder(tmp_path / "model") as partial:
        assert {p.name for p in tmp_path.iterdir()} == {partial.name}
    with pytest.raises(StorageError, match=r"can't write the model folder .*half"):
        fail_in(files.new_folder(tmp_path / "other"), lambda partial: None, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
