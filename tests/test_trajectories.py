"""Teacher trajectories: drawn once, kept to the bit, and never read half-written or damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdjax import trajectories
from kdjax.base import DataError, Samples, StorageError
from kdjax.trajectories import open_trajectories

CHUNK, SIZE, LENGTH = 4, 10, 3
SETTINGS = {"weights": "abc", "temperature": 1.0, "stop_ids": [1, 2]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(trajectories, "CHUNK_ROWS", CHUNK)


def samples_of(rows: np.ndarray, salt: int = 0) -> Samples:
    """What a teacher would have drawn for these rows; other values for every row."""
    each = [np.random.default_rng([salt, int(row)]) for row in rows]
    floats = [
        np.stack([rng.normal(size=LENGTH) for rng in each]).astype(np.float32) for _ in range(3)
    ]
    tokens = np.stack([rng.integers(0, 99, LENGTH) for rng in each]).astype(np.int32)
    lengths = np.array([rng.integers(1, LENGTH + 1) for rng in each], np.int32)
    return Samples(tokens, lengths, *floats, np.where(lengths == LENGTH, -1, 7))


class Teacher:
    """A drawing function that remembers which rows it was asked for."""

    def __init__(self, salt: int = 0):
        self.asked, self.salt = [], salt

    def __call__(self, rows: np.ndarray) -> Samples:
        self.asked.append(rows.tolist())
        return samples_of(rows, self.salt)


def read_with(cache, teacher, rows, settings=SETTINGS) -> Samples:
    return open_trajectories(cache, settings, SIZE, teacher)(np.array(rows))


def assert_same_samples(found: Samples, rows, salt: int = 0):
    for name, value, wanted in zip(Samples._fields, found, samples_of(rows, salt), strict=True):
        assert value.dtype.kind == wanted.dtype.kind, name  # integers may come back wider
        assert value.astype(wanted.dtype).tobytes() == wanted.tobytes(), name


def folders(cache):
    return sorted((cache / "trajectories").iterdir())


def test_rows_come_back_to_the_bit_in_the_order_asked(tmp_path):
    """Rows of several chunks, repeated and unordered, are what was drawn for them."""
    rows = [9, 0, 5, 5, 3]
    assert_same_samples(read_with(tmp_path, Teacher(), rows), rows)


def test_chunks_are_drawn_once_and_when_needed(tmp_path):
    """Each chunk is drawn whole when first asked for; a second reader, later, draws nothing."""
    teacher = Teacher()
    read = open_trajectories(tmp_path, SETTINGS, SIZE, teacher)
    read(np.array([5]))
    assert teacher.asked == [[4, 5, 6, 7]]
    read(np.array([4, 9, 7]))
    assert teacher.asked == [[4, 5, 6, 7], [8, 9]]
    again = Teacher(salt=1)
    assert_same_samples(read_with(tmp_path, again, [6, 8]), [6, 8])
    assert again.asked == []
    read_with(tmp_path, again, [0])
    assert again.asked == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "changed", [{"temperature": 0.7}, {"weights": "abd"}, {"stop_ids": [1]}], ids=str
)
def test_other_settings_draw_anew(tmp_path, changed):
    """Any other setting is another folder; both keep their settings and their own contents."""
    other = {**SETTINGS, **changed}
    read_with(tmp_path, Teacher(), [0])
    teacher = Teacher(salt=1)
    assert_same_samples(read_with(tmp_path, teacher, [0], other), [0], salt=1)
    assert teacher.asked == [[0, 1, 2, 3]]
    assert_same_samples(read_with(tmp_path, Teacher(salt=2), [0]), [0])
    written = [json.loads((folder / "settings.json").read_text()) for folder in folders(tmp_path)]
    assert sorted(written, key=str) == sorted([SETTINGS, other], key=str)
    reordered = dict(reversed(SETTINGS.items()))
    assert_same_samples(read_with(tmp_path, Teacher(salt=2), [0], reordered), [0])


def test_a_killed_write_is_not_read(tmp_path):
    """A half-written chunk that a killed run left is ignored: its rows are drawn and kept."""
    read_with(tmp_path, Teacher(), [0])
    (folder,) = folders(tmp_path)
    (folder / "chunk-00000").rename(folder / "chunk-00000.4321.partial")
    teacher = Teacher()
    assert_same_samples(read_with(tmp_path, teacher, [2]), [2])
    assert teacher.asked == [[0, 1, 2, 3]]


def test_a_teacher_that_fails_leaves_no_chunk(tmp_path):
    """An error while drawing comes through, and the next reader draws the chunk."""

    def failing(rows):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        read_with(tmp_path, failing, [0])
    assert_same_samples(read_with(tmp_path, Teacher(), [0]), [0])


def truncate_arrow(chunk):
    for path in chunk.glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:40])


def drop_state(chunk):
    for path in chunk.glob("*.json"):
        path.unlink()


def empty(chunk):
    for path in chunk.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [truncate_arrow, drop_state, empty], ids=lambda f: f.__name__)
def test_a_damaged_chunk_is_named(tmp_path, damage):
    """A chunk that can't be read is a DataError with its folder, never drawn over in silence."""
    read_with(tmp_path, Teacher(), [5])
    (folder,) = folders(tmp_path)
    damage(folder / "chunk-00001")
    teacher = Teacher()
    with pytest.raises(DataError) as caught:
        read_with(tmp_path, teacher, [5])
    assert str(folder / "chunk-00001") in str(caught.value)
    assert "delete that folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert teacher.asked == []


def test_a_cache_that_cannot_be_written(tmp_path):
    """A file where the cache should be is a StorageError naming the folder and --cache."""
    place = tmp_path / "taken"
    place.write_text("a file")
    with pytest.raises(StorageError) as caught:
        read_with(place, Teacher(), [0])
    assert str(place) in str(caught.value)
    assert "--cache" in str(caught.value)
    assert "\n" not in str(caught.value)
