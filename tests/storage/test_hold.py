"""One run at a time has a folder, and what was killed has none."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from kdjax.errors import BusyError, StorageError
from kdjax.runtime import console
from kdjax.storage import hold as hold_module
from kdjax.storage.hold import LOCK, hold

HOLDER = """
import fcntl, pathlib, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write('{"process": 17, "host": "h1", "since": "then"}')
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    """It is told who holds the folder, and nothing is touched; SIGKILL leaves no lock."""
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / LOCK)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as first:
        assert first.stdout.readline() == b"held\n"
        before = contents(tmp_path)
        with pytest.raises(BusyError, match=r"process 17 on h1 \(since then\) trains in") as caught:
            hold(tmp_path).__enter__()
        assert caught.value.exit_code == 75
        assert contents(tmp_path) == before
        first.send_signal(signal.SIGKILL)
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert contents(tmp_path) == {LOCK: b""}


def test_two_in_one_process(tmp_path):
    """Also from another thread or a notebook: a hold is of a `with` block, not of a process."""
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
        with pytest.raises(BusyError, match=f"process {os.getpid()} on "):
            hold(tmp_path / "run").__enter__()
    with hold(tmp_path / "run"):
        pass


def test_a_folder_that_got_nothing_is_removed(tmp_path):
    """A run that fails before it has written anything leaves no folder; an old one stays."""
    old = tmp_path / "old"
    old.mkdir()
    for folder in (tmp_path / "new", old):
        with pytest.raises(ValueError, match="fails"), hold(folder):
            raise ValueError("fails")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_lock_that_was_removed_is_none(tmp_path, monkeypatch):
    """Who opens the file as another removes it takes the new one: two would hold one folder."""
    opened, real = [], os.open

    def late(path, *args):
        opened.append(real(path, *args))
        if len(opened) == 1:
            os.unlink(path)
        return opened[-1]

    monkeypatch.setattr(os, "open", late)
    with hold(tmp_path):
        monkeypatch.undo()
        assert len(opened) == 2
        with pytest.raises(BusyError):
            hold(tmp_path).__enter__()


def test_what_is_said_where_no_lock_tells(tmp_path, monkeypatch, capsys):
    """A file system without locks; a run on another host that did not end of itself; after one of
    this host nothing is."""
    console.announce.cache_clear()
    own = {"process": 3, "host": socket.gethostname(), "since": "then"}
    for host in (socket.gethostname(), "far"):
        (tmp_path / LOCK).write_text(json.dumps(own | {"host": host}))
        with hold(tmp_path):
            pass
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "process 3 on far (since then) trained here last and did not end of itself" in said[0]

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(hold_module.fcntl, "flock", no_locks)
    with hold(tmp_path):
        assert "this file system has no locks (No locks available)" in capsys.readouterr().out


def test_a_link_is_no_lock(tmp_path):
    """What it leads to is not written."""
    (tmp_path / "other").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(StorageError, match="can't write the run folder"):
        hold(tmp_path / "run").__enter__()
    assert (tmp_path / "other").read_text() == "text"
