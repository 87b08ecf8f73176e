"""Files and folders are whole or not at all, whatever ends their writer; JSON is read strictly."""

from __future__ import annotations

import json
import math
import os

import pytest

from kdjax.errors import DataError, StorageError
from kdjax.runtime import files
from kdjax.storage.orbax import read_json as read_saved


def fail_in(place, write, kind=ValueError):
    """Write to a place, and fail before the end."""
    with place as partial:
        write(partial)
        raise kind("half")


def test_what_is_no_number_is_null(tmp_path):
    """JSON has no NaN and no infinity: null, however deep it stands; all else as it was."""
    value = {"a": [math.nan, 1.5, (math.inf, "NaN")], "b": {"c": -math.inf, "d": None, "e": True}}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": [None, 1.5, [None, "NaN"]], "b": {"c": None, "d": None, "e": True}}


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


def test_text_is_utf8(tmp_path):
    """Half of a surrogate pair, which UTF-8 has not, is as JSON escapes it."""
    files.write_text(tmp_path / "a", '["\u2016\u00e4\ud800"]')
    assert (tmp_path / "a").read_bytes() == b'["\xe2\x80\x96\xc3\xa4\\ud800"]'
    assert files.read_json(tmp_path / "a") == ["\u2016\u00e4\ud800"]


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
    """Partials of this folder go, of others they stay, also of names that begin alike, and what a
    user has named so."""
    own = {"model.00000000.partial", "model.1a2b3c4d.partial"}
    others = {"model", "model.partial", "model2.1a2b3c4d.partial", "model.v2.1a2b3c4d.partial"}
    for name in own | others:
        (tmp_path / name).mkdir()
    files.remove_partials(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == others


def test_a_model_folder_clears_what_was_left(tmp_path):
    """Before it is written: what a killed export left may be as large as the model."""
    (tmp_path / "model.1a2b3c4d.partial").mkdir()
    (tmp_path / "model.1a2b3c4d.partial" / "half").write_text("killed")
    with files.new_folder(tmp_path / "model") as partial:
        assert {p.name for p in tmp_path.iterdir()} == {partial.name}
    with pytest.raises(StorageError, match=r"can't write the model folder .*half"):
        fail_in(files.new_folder(tmp_path / "other"), lambda partial: None, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "a": 2}', "a key stands twice"),
        (b'{"a": {"b": 1, "b": 1}}', "a key stands twice"),
        (b'{"a": "\xff"}', "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b" " * 65 + b"1", "66 bytes are too many for a JSON file"),
    ],
)
def test_one_reader_is_strict_for_all(tmp_path, monkeypatch, content, says):
    """A run's file, a model's and a checkpoint's are refused alike, each in its own words."""
    if len(content) == 66:
        monkeypatch.setattr(files, "MAX_JSON_BYTES", 65)
    path = tmp_path / "metadata"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_saved(tmp_path)
    with pytest.raises(DataError, match=f"is damaged .*{says}"):
        files.read_json(path)
    with pytest.raises(DataError, match=f"not a readable JSON file .*{says}"):
        files.json_object(tmp_path, "metadata")


def test_what_has_no_end_is_not_read(tmp_path):
    """A pipe in a file's place, and a folder."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="no regular file"):
            files.strict_json(tmp_path / name)
        with pytest.raises(DataError, match="no regular file"):
            files.read_json(tmp_path / name)
