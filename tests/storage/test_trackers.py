"""What shows a run elsewhere can fail or hang, and the run goes on."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from kdjax.runtime.console import announce
from kdjax.storage import run_folder
from kdjax.storage.trackers import Tracker, beside

NUMBERS = {"loss": 0.5, "entropy": 0.25}


def test_a_full_disk_ends_tensorboard_alone(tmp_path, monkeypatch, capsys):
    """Every record is in metrics.jsonl where none can be in the event file; it is said once, and
    closing waits for nothing."""
    announce.cache_clear()
    full = Path("/dev/full")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: full.open("wb"))
    writer = run_folder.open_metrics(tmp_path, 0)
    for step in range(1, 1001):
        writer.write(step, NUMBERS)
    writer.close()
    assert [r["step"] for r in run_folder.read_metrics(tmp_path)] == [*range(1, 1001)]
    said = capsys.readouterr().out
    assert said.count("TensorBoard ends here") == said.count("\n") == 1
    assert "No space left on device" in said


def test_tensorboard_reads_what_is_written(tmp_path):
    """The records of a resumed run, after a mark that drops what was beyond; by its own parser."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    writer = run_folder.open_metrics(tmp_path, 6)
    writer.write(7, {**NUMBERS, "warnings": ["not a number"]})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert ".tfevents." in file.name
    data, events = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    version, mark, record = events
    assert version.file_version == "brain.Event:2"
    assert (mark.step, mark.session_log.status) == (7, SessionLog.START)
    assert (record.step, record.wall_time > 1e9) == (7, True)
    assert {value.tag: value.simple_value for value in record.summary.value} == NUMBERS


def test_a_tracker_that_hangs_is_left_behind(capsys):
    """Neither its records nor its end are waited for longer than is said."""
    let_go = threading.Event()
    tracker = beside(Tracker(lambda step, numbers: bool(let_go.wait()), print), "slow", print, 0.02)
    for step in range(3):
        tracker.write(step, NUMBERS)
    tracker.close()
    assert "slow did not end within 0.02 s" in capsys.readouterr().out
    let_go.set()


def test_records_come_in_order_and_before_the_end():
    """What was written is shown when close returns."""
    shown: list = []
    tracker = beside(
        Tracker(lambda step, numbers: shown.append((step, numbers)), lambda: shown.append("end")),
        "list",
        print,
    )
    for step in range(100):
        tracker.write(step, {"loss": step})
    tracker.close()
    assert shown == [*((step, {"loss": step}) for step in range(100)), "end"]


def test_wandb_that_can_not_start(tmp_path, monkeypatch, capsys):
    """No key, no network: said, and the run goes on without it."""

    class Refusing:
        @staticmethod
        def init(**settings):
            raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", Refusing)
    writer = run_folder.open_metrics(tmp_path, 0, "mine")
    writer.write(1, NUMBERS)
    writer.close()
    assert "W&B can't be started (no API key); training goes on" in capsys.readouterr().out
    assert len(run_folder.read_metrics(tmp_path)) == 1
