"""Names on a hub: found in its cache by branch or commit, and one clear line where they are not."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from kdjax import models
from kdjax.errors import DataError
from kdjax.models.hf import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch, student_folder):
    """A hub cache that holds one commit of lab/student, laid out as the hub's library does."""
    repository = tmp_path / "hub" / "models--lab--student"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(student_folder.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    hub.snapshot.cache_clear()
    return snapshot


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        models.find(name)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ["lab/student", "lab/student@main", f"lab/student@{COMMIT}"])
def test_a_cached_model_is_found_offline(cache, student, student_folder, name):
    """By its branch or its commit; weights behind the cache's links load, with one identity."""
    assert models.find(name) == cache
    assert models.load(name)[0].config == student[0].config
    assert models.identity(models.find(name)) == models.identity(student_folder)


@pytest.mark.parametrize("name", ["lab/absent", "lab/student@v2", f"lab/student@{COMMIT[::-1]}"])
def test_what_is_not_cached_is_one_clear_line(cache, name):
    """Offline: what was looked for, that the hub can't be reached, and what to do."""
    message = refusal(name)
    repository, _, revision = name.partition("@")
    assert f"no local folder {name}; looked on the hub for model {repository}" in message
    assert f"at revision {revision or 'main'}:" in message
    assert "offline (HF_HUB_OFFLINE) or can't be reached" in message
    assert "give the folder, or set HF_HUB_CACHE" in message


def test_without_a_network_it_is_the_same_line(cache, monkeypatch):
    """Online by its settings, but no host answers: the cache serves, else the same refusal."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert models.find("lab/student") == cache
    assert "can't be reached" in refusal("lab/absent")


def test_a_local_folder_comes_first(cache, tmp_path, student_folder):
    """A folder of the name is that folder, whatever the hub holds."""
    local = shutil.copytree(student_folder, tmp_path / "lab" / "student")
    assert models.find("lab/student").resolve() == local


def test_a_link_out_of_the_repository_is_refused(cache, tmp_path):
    """A snapshot may link to its repository's blobs, not beyond."""
    (tmp_path / "outside").write_text("{}")
    (cache / "config.json").unlink()
    (cache / "config.json").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"config\.json: links out of the model folder"):
        models.load("lab/student")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.GatedRepoError, "it is gated"),
        (errors.RepositoryNotFoundError, "there is none of that name that you may see"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.IncompleteSnapshotError, "does not hold it"),
        (OSError, "OSError (disk full now); try again"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, kind, says):
    """Each refusal of the hub is a DataError with its own remedy."""

    def refuse(*args, **kwargs):
        error = kind.__new__(kind)
        error.args = ("disk full\nnow",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert says in refusal("lab/other")


def test_only_what_a_model_needs_is_fetched(monkeypatch):
    """The wanted files of a real listing; other formats and folders stay behind."""
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: asked.update(kwargs) or "."
    )
    models.find("lab/listed@v1")
    assert asked.pop("revision") == "v1"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    other = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "README.md"]
    kept = huggingface_hub.utils.filter_repo_objects([*wanted, *other], **asked)
    assert list(kept) == wanted


@pytest.mark.parametrize("name", ["absent", "a/b/c", "../lab/student", "/lab/student", "kdjax:x"])
def test_other_names_are_not_looked_up(cache, name):
    """Paths and single words are no hub names: the error lists what a name may be."""
    message = refusal(name)
    assert "no model folder" in message
    assert "org/model@revision" in message
    assert "kdjax:student" in message
