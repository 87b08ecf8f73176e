"""Tokens for hubs, trackers and engines are written nowhere: canaries in the environment and in
URLs, looked for in everything that commands print and leave."""

from __future__ import annotations

import sys

import pytest
from commands import CONFIG
from serving import Reply, serving

from kdjax.__main__ import main
from kdjax.errors import SECRETS

CANARY = "canary-5ecret-t0ken"
SETTINGS: list[object] = []


class Tracker:
    """Stands in for W&B, and remembers what it is told."""

    @staticmethod
    def init(**settings):
        SETTINGS.append(settings)
        return Tracker

    @staticmethod
    def log(values, step):
        SETTINGS.append(values)

    @staticmethod
    def finish():
        pass


@pytest.fixture
def config_file(tmp_path, student_folder, teacher_folder, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setitem(sys.modules, "wandb", Tracker)
    path = tmp_path / "tiny.py"
    values = dict(run=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    path.write_text(
        CONFIG.format(student=str(student_folder), teacher=str(teacher_folder), **values)
    )
    return path


def looked_through(folder, capsys) -> str:
    """What was printed; asserts that neither it nor any file beneath the folder has a canary."""
    printed = "".join(capsys.readouterr())
    assert CANARY not in printed
    holding = [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert holding == []
    assert CANARY not in repr(SETTINGS)
    return printed


def test_a_run_and_its_evaluation_write_no_token(config_file, tmp_path, capsys):
    """Training with a tracker, evaluating and exporting, with every token in the environment."""
    run, out = str(tmp_path / "run"), str(tmp_path / "evaluated")
    assert main(["train", str(config_file), "--wandb_project", "mine"]) == 0
    assert SETTINGS
    assert main(["evaluate", run, "--out", out]) == 0
    assert main(["export", run, str(tmp_path / "exported")]) == 0
    assert "report: " in looked_through(tmp_path, capsys)


@pytest.mark.parametrize("field", ["student", "rollouts.engine", "data.file", "run", "cache"])
def test_a_password_in_a_url_is_not_repeated(config_file, tmp_path, capsys, monkeypatch, field):
    """Whichever field a URL with a password stands in: no line repeats it and no file has it."""
    monkeypatch.chdir(tmp_path)
    url = f"https://me:{CANARY}@host/x"
    command = ["train", str(config_file), f"--{field}", url, "--evaluation.file", "no.jsonl"]
    assert main(command) in (64, 65)
    assert looked_through(tmp_path, capsys).startswith("kdjax: ")
    assert not [p for p in tmp_path.rglob("*") if CANARY in p.name]


@pytest.mark.parametrize("query", ["?key={}", "#{}"])
def test_an_engine_with_a_key_in_its_url_is_refused(config_file, tmp_path, capsys, query):
    """A key behind the URL would be written into config.json."""
    url = "http://host/v1" + query.format(CANARY)
    assert main(["rollouts", str(config_file), "--rollouts.engine", url]) == 64
    assert "set OPENAI_API_KEY instead" in looked_through(tmp_path, capsys)


@pytest.mark.parametrize("status", [401, 400, 200])
def test_an_engine_that_repeats_its_key_is_not_quoted(config_file, tmp_path, capsys, status):
    """A server answers with the key that it was sent: the line has the variable's name."""
    said = {"error": {"message": f"no such key: {CANARY}-OPENAI_API_KEY"}}
    name = ["--rollouts.engine_model", "tiny", "--prefix", "teacher"]
    with serving(lambda body: Reply(said, status)) as server:
        command = ["rollouts", str(config_file), "--rollouts.engine", server.url, *name]
        assert main(command) == 69
        assert server.asked
    assert "kdjax: engine at" in looked_through(tmp_path, capsys)
