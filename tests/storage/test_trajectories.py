"""Teacher trajectories: drawn once, kept to the bit, and never read half-written or damaged."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.base import Samples, TopK, Trajectories
from kdjax.errors import ConfigError, DataError, StorageError
from kdjax.storage.trajectories import (
    fill,
    fill_pieces,
    identity,
    lacking,
    open_trajectories,
    place_of,
    read_settings,
    reader,
    require_complete,
)

CHUNK, SIZE, LENGTH = 4, 10, 3
SETTINGS = {
    "weights": "abc", "temperature": 1.0, "stop_ids": [1, 2],
    "rows": SIZE, "chunk_rows": CHUNK, "max_new_tokens": LENGTH,
}  # fmt: skip


def samples_of(rows: np.ndarray, salt: int = 0) -> Samples:
    """What a teacher would have drawn for these rows; other values for every row."""
    each = [np.random.default_rng([salt, int(row)]) for row in rows]
    floats = [
        np.stack([rng.normal(size=LENGTH) for rng in each]).astype(np.float32) for _ in range(3)
    ]
    tokens = np.stack([rng.integers(0, 99, LENGTH) for rng in each]).astype(np.int32)
    lengths = np.array([rng.integers(0, LENGTH + 1) for rng in each], np.int32)
    inside = np.arange(LENGTH)[None] < lengths[:, None]
    tokens, *floats = (np.where(inside, x, 0).astype(x.dtype) for x in (tokens, *floats))
    return Samples(tokens, lengths, *floats, np.where(lengths == LENGTH, -1, 7))


class Teacher:
    """A drawing function that remembers which rows it was asked for."""

    def __init__(self, salt: int = 0):
        self.asked, self.salt = [], salt

    def __call__(self, rows: np.ndarray) -> Trajectories:
        self.asked.append(rows.tolist())
        return Trajectories(samples_of(rows, self.salt))


def read_with(cache, teacher, rows, settings=SETTINGS, needed=range(SIZE)) -> Samples:
    place, places = place_of(cache, settings), np.array(needed)
    return open_trajectories(place, settings, teacher, lambda: places)(np.array(rows)).samples


def piece_with(folder, row: int) -> Path:
    """The piece of a cache's folder that was drawn for this row."""
    pieces = [p for p in folder.glob("rows-*") if not p.name.endswith(".partial")]
    (found,) = (p for p in pieces if row in datasets.load_from_disk(str(p))["row"])
    return found


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


NEEDED = [9, 0, 5, 3, 7, 1, 8]


def test_what_a_run_needs_is_drawn_in_its_order(tmp_path, capsys):
    """A chunk's number of rows at a time, in the order of the run, when the first of them is asked
    for, and told; nothing that the run does not need. A second reader, later, draws the rest."""
    teacher, asked = Teacher(), np.array(NEEDED)
    read = open_trajectories(place_of(tmp_path, SETTINGS), SETTINGS, teacher, lambda: asked)
    assert_same_samples(read(np.array([0, 9])).samples, [0, 9])
    assert teacher.asked == [[9, 0, 5, 3]]
    assert "drawing responses 1 to 4 of the 7 that are needed" in capsys.readouterr().out
    again = Teacher()
    assert_same_samples(read_with(tmp_path, again, [3, 5, 0], needed=NEEDED), [3, 5, 0])
    assert again.asked == []
    assert_same_samples(read_with(tmp_path, again, [8, 9], needed=NEEDED), [8, 9])
    assert again.asked == [[7, 1, 8]]


def test_chunks_that_are_kept_are_read(tmp_path):
    """What `kdjax rollouts`, or a run of an earlier version, has filled is not drawn again; nor are
    two runs' pieces the same ones."""
    fill(place_of(tmp_path, SETTINGS), SETTINGS, Teacher(), share=(0, 2))  # rows 0 to 3, 8 and 9
    teacher = Teacher(salt=1)
    assert_same_samples(read_with(tmp_path, teacher, [0, 8, 9], needed=NEEDED), [0, 8, 9])
    assert teacher.asked == []
    assert_same_samples(read_with(tmp_path, teacher, [7], needed=NEEDED), [7], salt=1)
    assert teacher.asked == [[5, 7]]
    read_with(tmp_path, teacher, [7], needed=[0, 7])
    assert teacher.asked == [[5, 7], [7]]


def test_processes_draw_their_shares(tmp_path):
    """Piece n belongs to process n % count; each knows all pieces, and how many it lacks."""
    place, asked, teachers = tmp_path / "shared", np.array(NEEDED), [Teacher(), Teacher()]
    pieces = fill_pieces(place, SETTINGS, teachers[0], asked, (0, 2))
    assert [piece.tolist() for piece in pieces] == [[9, 0, 5, 3], [7, 1, 8]]
    assert lacking(place, pieces) == 1
    fill_pieces(place, SETTINGS, teachers[1], asked, (1, 2))
    assert [t.asked for t in teachers] == [[[9, 0, 5, 3]], [[7, 1, 8]]]
    assert lacking(place, pieces) == 0
    assert_same_samples(reader(place, SETTINGS, pieces)(asked).samples, NEEDED)


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
    """A half-written piece that a killed run left is ignored: its rows are drawn and kept."""
    read_with(tmp_path, Teacher(), [0])
    (folder,) = folders(tmp_path)
    piece = piece_with(folder, 0)
    piece.rename(folder / f"{piece.name}.4321abcd.partial")
    teacher = Teacher()
    assert_same_samples(read_with(tmp_path, teacher, [2]), [2])
    assert teacher.asked == [[0, 1, 2, 3]]
    assert sorted(p.name for p in folder.iterdir()) == [piece.name, "settings.json"]


def test_a_teacher_that_fails_leaves_nothing(tmp_path):
    """An error while drawing comes through, and the next reader draws the piece."""

    def failing(rows):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        read_with(tmp_path, failing, [0])
    assert sorted(p.name for p in folders(tmp_path)[0].iterdir()) == ["settings.json"]
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


def flip_a_bit(chunk):
    """In the middle of the last column's numbers, where Arrow has no check of its own."""
    (path,) = chunk.glob("*.arrow")
    content = bytearray(path.read_bytes())
    at = content.index(samples_of(np.array([5])).entropy_bt[0, :1].tobytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate_arrow, drop_state, empty, flip_a_bit]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_piece_is_named(tmp_path, damage):
    """A piece that can't be read is a DataError with its folder, never drawn over in silence."""
    read_with(tmp_path, Teacher(), [5])
    (folder,) = folders(tmp_path)
    piece = piece_with(folder, 5)
    damage(piece)
    teacher = Teacher()
    with pytest.raises(DataError) as caught:
        read_with(tmp_path, teacher, [5])
    assert str(piece) in str(caught.value)
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


def kept_of(rows: np.ndarray, dtype=np.float32, k: int | None = None) -> Trajectories:
    """Samples with a teacher's states of width 2 in a dtype, or with its top k."""
    samples = samples_of(rows)
    inside = np.arange(LENGTH)[None] < samples.length_b[:, None]
    rng = np.random.default_rng(3)
    wide = np.where(inside[..., None], rng.normal(size=(SIZE, LENGTH, k or 2))[rows], 0.0)
    if k is None:
        return Trajectories(samples, states_btd=wide.astype(dtype))
    ids = rng.integers(0, 99, (SIZE, LENGTH, k))[rows] * inside[..., None]
    top_k = TopK(ids.astype(np.int32), wide.astype(np.float32), wide[..., 0].astype(np.float32))
    return Trajectories(samples, top_k_bt=top_k)


@pytest.mark.parametrize(
    "how", [dict(dtype=np.float32), dict(dtype=jnp.bfloat16), dict(k=5)], ids=str
)
def test_teacher_outputs_come_back_to_the_bit(tmp_path, how):
    """States (bfloat16 too) and top-k, of any rows in any order; engines may leave fields out."""

    def draw(rows):
        kept = kept_of(rows, **how)
        return kept._replace(samples=kept.samples._replace(logp_bt=None, entropy_bt=None))

    assert fill(tmp_path / "kept", SETTINGS, draw) == 3
    rows = np.array([9, 2, 2, 7])
    found, wanted = reader(tmp_path / "kept", SETTINGS)(rows), draw(np.arange(SIZE))
    wanted = jax.tree.map(lambda x: x[rows], wanted)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def test_shares_fill_a_folder_together(tmp_path):
    """Chunk n belongs to share n % count; what is there is not drawn again; incomplete folders are
    named with the command that completes them."""
    place, teachers = tmp_path / "shared", [Teacher(), Teacher(), Teacher()]
    assert fill(place, SETTINGS, teachers[1], share=(1, 2)) == 1
    with pytest.raises(DataError, match=f"2 of 3 chunks are missing; kdjax rollouts .*{place}"):
        require_complete(place, read_settings(place))
    with pytest.raises(DataError, match="2 of 3 chunks are missing"):
        identity(place)
    assert fill(place, SETTINGS, teachers[0], share=(0, 2)) == 2
    assert [t.asked for t in teachers[:2]] == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]]
    assert fill(place, SETTINGS, teachers[2]) == 0
    assert teachers[2].asked == []
    rows = list(range(SIZE))
    assert_same_samples(reader(place, read_settings(place))(np.array(rows)).samples, rows)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_trajectories import SETTINGS, Trajectories, fill, samples_of
from pathlib import Path

def draw(rows):
    if rows[0] == 8:
        print("drawing the last chunk", flush=True)
        time.sleep(600)
    return Trajectories(samples_of(rows))

fill(Path({place!r}), SETTINGS, draw)
"""


def test_a_killed_process_loses_the_chunk_in_flight(tmp_path):
    """kill -9 while the third chunk is drawn: the second process draws that one alone, and the
    folder is the one that nobody interrupted."""
    place, code = tmp_path / "killed", str(Path(__file__).parent)
    script = KILLED.format(tests=code, place=str(place))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert any("drawing the last chunk" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(place.glob("*.partial"))
    teacher = Teacher()
    assert fill(place, SETTINGS, teacher) == 1
    assert teacher.asked == [[8, 9]]
    assert not list(place.glob("*.partial"))
    fill(tmp_path / "whole", SETTINGS, Teacher())
    assert identity(place) == identity(tmp_path / "whole")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_redo_draws_the_damaged_chunks(tmp_path, damage):
    """Without redo a finished chunk is believed; with it the damaged one alone is drawn anew, and
    the folder has its old identity."""
    fill(tmp_path, SETTINGS, Teacher())
    before = identity(tmp_path)
    damage(tmp_path / "chunk-00001")
    teacher = Teacher()
    assert fill(tmp_path, SETTINGS, teacher) == 0
    assert fill(tmp_path, SETTINGS, teacher, redo=True) == 1
    assert teacher.asked == [[4, 5, 6, 7]]
    assert identity(tmp_path) == before
    assert_same_samples(reader(tmp_path, SETTINGS)(np.array([5])).samples, [5])


def test_identity_is_of_settings_and_contents(tmp_path):
    """Equal for what was drawn alike, elsewhere; another where a token or a setting differs."""
    places = {name: tmp_path / name for name in ("a", "b", "salt", "seed")}
    for name, place in places.items():
        settings = SETTINGS | ({"seed": 1} if name == "seed" else {})
        fill(place, settings, Teacher(salt=int(name == "salt")))
        time.sleep(0.01)
    first, same, *others = (identity(place) for place in places.values())
    assert same == first
    assert len({first, *others}) == 3


def test_other_settings_in_a_named_folder_are_refused(tmp_path):
    """The difference is named, and nothing is drawn or overwritten; so is a foreign folder."""
    fill(tmp_path / "f", SETTINGS, Teacher())
    teacher, before = Teacher(), identity(tmp_path / "f")
    with pytest.raises(ConfigError, match=r"other settings: temperature: 1\.0 -> 0\.7; choose"):
        fill(tmp_path / "f", SETTINGS | {"temperature": 0.7}, teacher)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"'thesis\.tex'\] but no trajectories"):
        fill(tmp_path / "g", SETTINGS, teacher)
    assert [p.name for p in (tmp_path / "g").iterdir()] == ["thesis.tex"]
    assert teacher.asked == []
    assert identity(tmp_path / "f") == before
    (tmp_path / "f" / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings\.json: not a readable JSON file"):
        read_settings(tmp_path / "f")
    with pytest.raises(DataError, match="holds no trajectories"):
        read_settings(tmp_path / "nowhere")


def test_a_full_disk_loses_nothing(tmp_path):
    """A chunk that can't be written whole is one line; the finished ones stay, nothing half-written
    does, and the same command goes on from there."""

    def draw(rows):
        kept, extra = kept_of(rows), 400_000 if rows[0] == 4 else 1
        return kept._replace(states_btd=np.repeat(kept.states_btd, extra, axis=-1))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"can't keep trajectories in .*make room") as caught:
            fill(tmp_path, SETTINGS, draw)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chunk-00000", "settings.json"]
    assert fill(tmp_path, SETTINGS, draw) == 2


def test_what_can_t_be_kept_is_not_drawn(tmp_path, monkeypatch):
    """The place of a chunk is made before it is drawn: a folder that lost its permissions is seen
    at once."""
    fill(tmp_path, SETTINGS, Teacher(), share=(0, 3))
    teacher = Teacher()

    def refused(*args, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StorageError, match="Permission denied"):
        fill(tmp_path, SETTINGS, teacher)
    assert teacher.asked == []
