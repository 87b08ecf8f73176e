"""What a run writes: whole or not at all, and without what an interruption rolled back."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from kdjax.errors import ConfigError, DataError, StorageError
from kdjax.runtime import files
from kdjax.runtime.console import announce
from kdjax.storage import run_folder
from kdjax.storage.hold import LOCK


def test_metrics_survive_an_interruption(tmp_path):
    """Records after the resumed step are dropped, a line cut by a kill too, and new ones follow."""
    first = run_folder.open_metrics(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / run_folder.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    second = run_folder.open_metrics(tmp_path, 2)
    second.write(3, {"loss": 30.0})
    second.close()
    assert [(r["step"], r["loss"]) for r in run_folder.read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_metrics_that_can_not_be_written(tmp_path):
    """A file that can't grow is one error that names it, also where it is closed after that."""
    writer = run_folder.open_metrics(tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(StorageError, match=r"can't write .*metrics\.jsonl: .* too large"):
            writer.write(1, {"loss": 1.0, "text": ["x" * 2**21]})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def opened(folder) -> None:
    """A run folder is opened, and closed again."""
    with run_folder.open_run_folder(folder):
        pass


def test_what_a_kill_left_unfinished_is_no_foreign_file(tmp_path):
    """A process that was killed in its very first write has begun a run, and leaves nothing; what
    only has such a name, as kdjax has never made it, stays."""
    (tmp_path / "config.json.0a1b2c3d.partial").write_text('{"run": ')
    opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    (tmp_path / "film.mkv.partial").write_text("a download of the user's")
    (tmp_path / "config.json.0a1b2c3d.partial").write_text('{"run": ')
    with pytest.raises(StorageError, match=r"holds \['film.mkv.partial'\] but no run"):
        opened(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / run_folder.CONFIG).write_text(json.dumps(RUN))
    (tmp_path / "exported.0a1b2c3d.partial").mkdir()
    (tmp_path / "report.html.partial").symlink_to(tmp_path / "film.mkv.partial")
    opened(tmp_path)
    others = {"film.mkv.partial", "exported.0a1b2c3d.partial", "report.html.partial"}
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "config.json", *others}
    assert (tmp_path / "film.mkv.partial").read_text() == "a download of the user's"


RUN = {"run": "r", "student": "s", "token_loss": "forward_kl", "steps": 3}


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen3", "architectures": []}, {}, [RUN], RUN, None]
)
def test_a_config_is_a_runs_by_its_fields(tmp_path, config):
    """A model folder has a config.json too: it is no run, and is left as it is. A run whose config
    is damaged is known by what lies beside it."""
    place = tmp_path / run_folder.CONFIG
    place.write_text("{" if config is None else json.dumps(config))
    if config is None:
        with pytest.raises(StorageError, match=r"holds \['config.json'\] but no run"):
            opened(tmp_path)
        (tmp_path / run_folder.VERSIONS).write_text("{}")
        (tmp_path / "checkpoints").mkdir()
    if config in (RUN, None):
        opened(tmp_path)
    else:
        with pytest.raises(StorageError, match=r"holds \['config.json'\] but no run"):
            opened(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", [run_folder.METRICS, run_folder.EVALUATION, "stacks_0.txt", LOCK])
def test_the_files_of_a_run_are_no_links(tmp_path, name):
    """What is elsewhere would be read as the run's own, or written over; a folder may be a link."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    (run / run_folder.CONFIG).write_text(json.dumps(RUN))
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    opened(run)
    other.write_text("text")
    (run / LOCK).unlink()
    (run / name).symlink_to(other)
    with pytest.raises(StorageError, match=f"{name} is a link; a run's files are files of its own"):
        opened(run)
    assert other.read_text() == "text"


def test_files_are_whole_or_absent(tmp_path):
    """A folder in a file's place is a StorageError, and leaves what was there."""
    files.write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="can't write"):
        files.write_json(tmp_path / "folder", {})
    assert (tmp_path / "folder" / "inside").is_dir()


def test_reading_what_is_not_there(tmp_path):
    """Missing and damaged files are told apart."""
    with pytest.raises(DataError, match=r"holds no config\.json"):
        files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        files.read_json(tmp_path / "config.json")


def test_metrics_are_what_the_checkpoint_has_kept(tmp_path, capsys):
    """A digit that changed, a line that is gone or no record, and no file: each is told, and the
    file written anew; what comes after the checkpoint is no damage."""
    announce.cache_clear()
    kept = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    whole = "".join(json.dumps(record) + "\n" for record in kept)
    place = tmp_path / run_folder.METRICS
    for text in (whole, whole + '{"step": 4, "loss": 0.0}\n{"st'):
        place.write_text(text)
        assert run_folder.restored_metrics(tmp_path, 3, kept) == kept
        assert place.read_text() == text
    assert capsys.readouterr().out == ""
    for text in (whole.replace("2.0", "2.5"), whole[:26] + whole[52:], "}\n" + whole, "", None):
        place.unlink() if text is None else place.write_text(text)
        assert run_folder.restored_metrics(tmp_path, 3, kept) == kept
        assert place.read_text() == whole
        assert "was not what this run has written; up to step 3" in capsys.readouterr().out
        announce.cache_clear()
    assert run_folder.restored_metrics(tmp_path, 2, None) == kept[:2]
    place.write_text("}\n}\n")  # of a run that has saved nothing
    assert run_folder.restored_metrics(tmp_path, 0, []) == run_folder.read_metrics(tmp_path) == []


def test_the_commit_is_of_the_packages_own_checkout(tmp_path, monkeypatch):
    """A package in the environment of another project has not the project's commit, and what the
    shell says of git is not asked."""
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}

    def repository(folder, *more):
        folder.mkdir(exist_ok=True)
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "m", "--allow-empty"]):
            subprocess.run(["git", "-C", folder, *name, *command], check=True, env=environment)

    project, package = tmp_path / "project", tmp_path / "project" / "lib" / "kdjax" / "storage"
    repository(project)
    package.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    assert run_folder.git_commit() == "unknown"
    monkeypatch.setenv("GIT_DIR", str(project / ".git"))
    assert run_folder.git_commit() == "unknown"
    repository(project / "lib")
    assert re.fullmatch("[0-9a-f]{12}", run_folder.git_commit())


def test_wandb_is_used_only_when_asked_for(tmp_path, monkeypatch):
    """A stand-in sees project and records; without the package the remedy is named."""
    logged = []

    class Stand:
        @staticmethod
        def init(**settings):
            logged.append(settings["project"])
            return Stand

        @staticmethod
        def log(values, step):
            logged.append((step, values))

        @staticmethod
        def finish():
            logged.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Stand)
    writer = run_folder.open_metrics(tmp_path, 0, "mine")
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert logged == ["mine", (1, {"loss": 2.0}), "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run_folder.open_metrics(tmp_path, 0, "mine")


def test_chunks_are_kept(tmp_path):
    """What is there whole is read, as it was written; a damaged or cut file is none."""
    folder = tmp_path / "new"
    value = {"x": 0.1 + 0.2, "pair": ("\N{SNOWMAN}", None)}
    first = run_folder.write_chunk(folder, 0, value)
    assert (
        first == run_folder.read_chunk(folder, 0) == {"x": 0.1 + 0.2, "pair": ["\N{SNOWMAN}", None]}
    )
    run_folder.write_chunk(folder, 1, 3)
    assert run_folder.read_chunk(folder, 1) == 3
    assert run_folder.read_chunk(folder, 2) is None
    file = folder / "chunk-00000"
    whole = file.read_bytes()
    for damaged in (whole.replace(b"0.3", b"0.4"), whole[:-1], b"", b"x", b"\xff"):
        file.write_bytes(damaged)
        assert run_folder.read_chunk(folder, 0) is None


def test_a_kill_loses_the_chunk_in_flight_alone(tmp_path):
    """A process that is killed outright at the last moment of writing the third chunk: the two
    before are there, and no third."""
    code = """
import os, pathlib, signal, sys
from kdjax.storage import run_folder
from kdjax.storage.hold import LOCK

folder = pathlib.Path(sys.argv[1])
run_folder.write_chunk(folder, 0, ["chunk", 0])
run_folder.write_chunk(folder, 1, ["chunk", 1])
pathlib.Path.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
run_folder.write_chunk(folder, 2, ["chunk", 2])
"""
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert [run_folder.read_chunk(tmp_path, n) for n in range(3)] == [
        ["chunk", 0],
        ["chunk", 1],
        None,
    ]
