"""Checkpoints: bit for bit on any mesh, verified, kept by policy; a save that fails says so."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import bits, initial, like, state_of

from kdjax import export as export_module
from kdjax.errors import ConfigError, DataError, StorageError
from kdjax.storage import restore
from kdjax.storage.checkpoints import QUARANTINE, open_checkpoints
from kdjax.storage.orbax import read_arrays
from kdjax.storage.restore import (
    DamagedError,
    items_of,
    measured,
    read_about,
    read_params,
    read_state,
    saved_steps,
)


def save(folder: Path, *steps: int, devices: int = 1, tests=None, **policy) -> Path:
    checkpoints = open_checkpoints(folder, **policy)
    for step in steps:
        about = {"position": 10 * step, "tests": (tests or {}).get(step, {})}
        checkpoints.save(step, state_of(step, devices), about)
    checkpoints.close()
    return folder


def anything(about) -> None:
    """Accepts every checkpoint."""


def flip_a_value(step: Path, item: str) -> None:
    """A bit of an array's values, which Orbax does not notice: in the largest file."""
    path = max((step / item).rglob("d/*"), key=lambda file: file.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_another_mesh(tmp_path, devices):
    """A state of four devices, restored on other ones: the same bits, in their new places."""
    save(tmp_path, 3, devices=4)
    wanted = like(devices)
    state, about = open_checkpoints(tmp_path).newest(wanted, anything)
    assert bits(state) == bits(state_of(3))
    assert about["position"] == 30
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


LEAVES = sorted(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(like()))


@pytest.fixture(scope="module")
def third(tmp_path_factory) -> Path:
    """A folder with step 3, to be read."""
    return save(tmp_path_factory.mktemp("third"), 3)


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_at_its_initial_value_is_noticed(third, name, monkeypatch):
    """Any one array that comes back as it was at step 0 is named."""

    def replaced(place, item):
        first = items_of(initial())[place.name]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, old: old if named(place.name, path) == name else leaf,
            read_arrays(place, item),
            first,
        )

    def named(part, path):
        if part == "params":
            return f".params{jax.tree_util.keystr(path)}"
        return f".{path[0].key}{jax.tree_util.keystr(path[1:])}"

    monkeypatch.setattr(restore, "read_arrays", replaced)
    with pytest.raises(DamagedError) as caught:
        read_state(third, 3, like())
    assert f"values: {name} changed after it was saved" in str(caught.value)


def test_parameters_alone(tmp_path):
    """Without a file of the optimizer: the parameters, verified; the state is damaged."""
    save(tmp_path, 3)
    shutil.rmtree(tmp_path / "3" / "training")
    params = read_params(tmp_path, 3, like(2).params)
    assert bits(params) == bits(state_of(3).params)
    with pytest.raises(DamagedError, match=r"3 is damaged: training: "):
        read_state(tmp_path, 3, like())
    flip_a_value(tmp_path / "3", "params")
    with pytest.raises(DamagedError, match=r"values: \.params\['embed'\] changed"):
        read_params(tmp_path, 3, like().params)


def test_damage_is_said_and_moved_aside_and_the_step_saved_again(tmp_path, capsys):
    """The newest intact one is used after saying so; nothing is deleted, and the same step can be
    saved, and be damaged, again."""
    save(tmp_path, 1, 2, 3, last=3)
    for again in ("", ".again"):
        flip_a_value(tmp_path / "3", "training")
        checkpoints = open_checkpoints(tmp_path)
        state, about = checkpoints.newest(like(), anything)
        assert about["step"] == 2
        assert bits(state) == bits(state_of(2))
        assert (tmp_path / QUARANTINE / f"3{again}" / "training").is_dir()
        (said,) = capsys.readouterr().out.splitlines()
        assert f"{tmp_path}/3 is damaged: values: .opt_state" in said
        assert f"it is kept in {tmp_path}/{QUARANTINE}/3{again}" in said
        checkpoints.save(3, state_of(3), {})
        checkpoints.close()
        assert bits(read_state(tmp_path, 3, like())) == bits(state_of(3))


def test_none_is_intact(tmp_path):
    """One line, and the same line the next time: a run does not begin anew by itself."""
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "about" / "metadata").write_text("{}")
    for _ in range(2):
        with pytest.raises(DataError, match=r"no intact checkpoint: \[1, 2\] are in") as caught:
            open_checkpoints(tmp_path).newest(like(), anything)
        assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / QUARANTINE)
    assert open_checkpoints(tmp_path).newest(like(), anything) is None


def test_another_config_is_no_damage(tmp_path):
    """What does not fit, or is refused, is an error of its own, and stays where it is."""
    save(tmp_path, 1, 2)
    narrow = like()._replace(params={**like().params, "norm": jnp.ones(4)})
    half = like()._replace(step=jax.ShapeDtypeStruct((), jnp.int16))

    def refuse(about):
        raise ConfigError(f"of another config: {about['position']}")

    for wanted, message in ((narrow, r"\['norm'\]: float32\[8\] -> float32\[4\]"), (half, "int16")):
        with pytest.raises(DataError, match=message) as caught:
            open_checkpoints(tmp_path).newest(wanted, anything)
        assert not isinstance(caught.value, DamagedError)
    with pytest.raises(ConfigError, match="of another config: 20"):
        open_checkpoints(tmp_path).newest(like(), refuse)
    assert saved_steps(tmp_path) == [1, 2]
    assert not (tmp_path / QUARANTINE).exists()


def test_a_step_under_another_name_and_a_changed_word_are_damage(tmp_path):
    """What was said about a state has a checksum, and belongs to its step."""
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "4")
    with pytest.raises(DamagedError, match="it is step 2 under another name"):
        read_about(tmp_path, 4)
    path = tmp_path / "1" / "about" / "metadata"
    saved = json.loads(path.read_text())
    saved["text"] = saved["text"].replace('"position": 10', '"position": 20')
    path.write_text(json.dumps(saved))
    with pytest.raises(DamagedError, match="it does not have its checksum"):
        read_about(tmp_path, 1)


def test_policies_on_disk(tmp_path):
    """Last, every and best together, across a resume; what goes is gone from the disk."""
    tests = {step: {"test_avg": value} for step, value in {1: 0.1, 2: 0.9, 3: 0.5}.items()}
    policy = dict(last=1, every_steps=5, best="highest test_avg")
    save(tmp_path, 1, 2, 3, tests=tests, **policy)
    assert saved_steps(tmp_path) == [2, 3]
    save(tmp_path, 4, 5, 6, **policy)
    assert saved_steps(tmp_path) == [2, 5, 6]
    assert measured(tmp_path)[2] == {"test_avg": 0.9}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def written() -> None:
    """Wait until Orbax has written, or failed to."""
    for thread in threading.enumerate():
        while thread.name == "save_finalize" and thread.is_alive():
            time.sleep(0.01)  # to join it raises what it failed of


@pytest.fixture
def full_disk():
    """A switch that ends files at 16 KiB, where a disk is full: the state's are longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_stops_the_run(tmp_path, full_disk, capfd):
    """One line at the next save, or at the end, with the knob; the last good one is whole."""
    save(tmp_path, 1)
    full_disk()
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(2, state_of(2), {})
    with pytest.raises(StorageError, match="step 2 was not saved") as caught:
        checkpoints.save(3, state_of(3), {})
    assert "\n" not in str(caught.value)
    assert "the last good one is 1" in str(caught.value)
    assert "checkpoints.failed_save go_on" in str(caught.value)
    checkpoints.close()
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(3, state_of(3), {})
    with pytest.raises(StorageError, match="File too large"):
        checkpoints.close()
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # nothing of what failed
    assert bits(open_checkpoints(tmp_path).newest(like(), anything)[0]) == bits(state_of(1))


def test_after_a_full_disk_a_run_that_goes_on_saves_again(tmp_path, full_disk, capfd):
    """Every failure is a line; when there is room the next save is whole, and what failed leaves
    nothing."""
    save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk()
    checkpoints = open_checkpoints(tmp_path, failed_save="go_on")
    for step in (2, 3):
        checkpoints.save(step, state_of(step), {})
        written()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints.save(4, state_of(4), {})
    checkpoints.save(5, state_of(5), {})
    checkpoints.close()
    said = capfd.readouterr()
    assert said.err == ""
    assert [line.split(" was")[0] for line in said.out.splitlines()] == ["step 2", "step 3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]
    assert bits(read_state(tmp_path, 5, like())) == bits(state_of(5))


@pytest.mark.parametrize("when", ["before a save", "during it", "after it"])
def test_a_vanished_folder(tmp_path, when, capfd):
    """It is not made anew, as a disk that is no longer mounted would be; training goes on."""
    folder = save(tmp_path / "run", 1)
    checkpoints = open_checkpoints(folder, failed_save="go_on")
    if when != "before a save":
        checkpoints.save(2, state_of(2), {})
    if when == "after it":
        written()
    while when == "during it" and not [*folder.glob("2*")]:  # or Orbax makes all of it anew
        time.sleep(0.001)
    folder.rename(tmp_path / "elsewhere")  # at once, as to delete it file by file is not
    for step in (3, 4):
        checkpoints.save(step, state_of(step), {})
    checkpoints.close()
    if when == "during it" and saved_steps(folder):  # Orbax made all of it anew: a folder like any
        assert saved_steps(folder)[-1] == 4
        return
    if when != "during it":  # there a write that Orbax left behind may come later still
        assert not folder.exists()
    said = capfd.readouterr().out
    assert "step 3 was not saved" in said
    assert "the folder is gone" in said
    assert "there is no other" in said
    other = save(tmp_path / "other", 1)  # into the first one a write may still be late
    stops = open_checkpoints(other)
    other.rename(tmp_path / "elsewhere, too")
    with pytest.raises(StorageError, match="the folder is gone"):
        stops.save(5, state_of(5), {})


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path, monkeypatch, capsys):
    """By the run, which trains on and keeps newer ones: the newest that is there then is exported,
    not one before, and no word of damage is said."""
    folder = save(tmp_path / "checkpoints", 1, 2)

    def read(folder, step, like):
        if step == 2:
            save(folder, 3, last=3)
            shutil.rmtree(folder / "2")
        return read_params(folder, step, like)

    monkeypatch.setattr(export_module, "read_params", read)
    found = export_module._params(tmp_path, "newest", None, like().params, anything)
    assert bits(found) == bits(state_of(3).params)
    assert capsys.readouterr().out == ""
    assert saved_steps(folder) == [1, 3]


def test_a_save_that_is_declined_is_an_error(tmp_path, monkeypatch):
    """Orbax returns False where it does not save, and says nothing."""
    import orbax.checkpoint as ocp

    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: False)
    with pytest.raises(StorageError, match="declined"):
        open_checkpoints(tmp_path).save(1, state_of(1), {})


@pytest.mark.release
def test_two_processes(tmp_path):
    """A step that one process can't read is passed over by both, moved aside once, saved again by
    both, and restored by one, bit for bit."""
    save(tmp_path, 1, 2, 3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parents[1] / "support"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / "checkpoint_process.py"), str(number), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for each in said:
        assert "SAW [2, 4, 2, 33, true, true]" in each, "\n".join(said)
    assert "another process could not read it" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", QUARANTINE]
    state, about = open_checkpoints(tmp_path).newest(like(8), anything)
    assert bits(state) == bits(state_of(3))
    assert about["position"] == 33
