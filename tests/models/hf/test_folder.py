"""Folders that do harm or are damaged: each is refused with one line that names what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdjax import models
from kdjax.errors import DataError
from kdjax.runtime import files

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sharded_folder(student, student_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    models.write_folder(folder, student[1], student_folder, shard_bytes=20_000)
    return folder


@pytest.fixture
def folder(sharded_folder, tmp_path):
    """A copy of the tiny student in shards, free to be spoilt."""
    return shutil.copytree(sharded_folder, tmp_path / "model")


def index_of(folder) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def point(folder, tensor: str, shard) -> None:
    """The index says that the tensor is in this shard."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index_of(folder), tensor: shard}}))


def last(folder):
    """The shard that holds the final norm."""
    return folder / index_of(folder)[NORM]


def link_out(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.move(last(folder), outside)
    last(folder).symlink_to(outside)


def fifo(folder):
    last(folder).unlink()
    os.mkfifo(last(folder))


def lone_pickle(folder):
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def copy_tensor(folder):
    first = folder / min(index_of(folder).values())
    save_file({**load_file(last(folder)), **load_file(first)}, last(folder))


def raw_header(header: bytes, data: bytes = b"\0\0"):
    def spoil(folder):
        last(folder).write_bytes(struct.pack("<Q", len(header)) + header + data)

    return spoil


def shard_says(content: bytes):
    return lambda folder: last(folder).write_bytes(content)


def index_says(content: str):
    return lambda folder: (folder / INDEX).write_text(content)


def point_norm_at(shard):
    return lambda folder: point(folder, NORM, shard)


def grow_config(folder):
    os.truncate(folder / "config.json", files.MAX_JSON_BYTES + 1)


HOSTILE = {
    "shard missing": (lambda f: last(f).unlink(), "shards of the index are missing: model-000"),
    "shard truncated": (lambda f: os.truncate(last(f), 2000), "damaged or not safetensors"),
    "shard empty": (shard_says(b""), "damaged or not safetensors"),
    "web page": (shard_says(b"<html>403</html>" * 99), "it is a web page"),
    "lfs pointer": (shard_says(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "header of 2^60 bytes": (shard_says(struct.pack("<Q", 1 << 60) + b"{}"), "damaged"),
    "shape of -1": (
        raw_header(b'{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,2]}}'), "damaged",
    ),
    "deep header": (raw_header(b'{"a":' * 100_000), "damaged"),
    "two extents of one name": (
        raw_header(
            b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},'
            b'"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}', b"\0" * 4,
        ), "damaged",
    ),
    "path upwards": (point_norm_at("../../../etc/passwd.safetensors"), "not the plain name"),
    "absolute path": (point_norm_at("/etc/passwd.safetensors"), "not the plain name"),
    "backslashes": (point_norm_at("..\\x.safetensors"), "not the plain name"),
    "a NUL": (point_norm_at("a\0.safetensors"), "not the plain name"),
    "no name": (point_norm_at(7), "not the plain name"),
    "pickle in the index": (point_norm_at("pytorch_model.bin"), "not the plain name"),
    "link out": (link_out, "links out of the model folder"),
    "fifo": (fifo, "not a regular file"),
    "pickle alone": (lone_pickle, "pytorch_model.bin is a pickle"),
    "index cut": (index_says("{"), "not a readable JSON file"),
    "index deep": (index_says("[" * 200_000), "not a readable JSON file"),
    "index a list": (index_says("[]"), "a JSON object was expected"),
    "index empty": (index_says("{}"), "no weight_map"),
    "a key twice": (index_says('{"weight_map": {}, "weight_map": {}}'), "a key stands twice"),
    "tensor twice": (copy_tensor, "is also in model-00001"),
    "tensor in no shard": (
        lambda f: point(f, "ghost\n", last(f).name), "ghost\\n is in no shard, the index says",
    ),
    "tensor in another shard": (
        lambda f: point(f, NORM, min(index_of(f).values())), f"{NORM} is in model-",
    ),
    "config too large": (grow_config, "too many for a JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(folder, case):
    """One DataError of one line, short, that names the folder."""
    spoil, says = HOSTILE[case]
    spoil(folder)
    with pytest.raises(DataError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert says in message
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 2000


def test_all_disagreements_are_listed_up_to_twenty(folder):
    """Missing, unexpected, misshapen, unreadable: all in one error, the first 20 and a count."""
    path = last(folder)
    odd = {f"odd.{n:02d}": np.ones(1, np.float32) for n in range(30)}
    kept = {k: v for k, v in load_file(path).items() if k != NORM}
    name = min(kept)
    save_file({**odd, **kept, name: kept[name].astype(np.int32)}, path)
    index = {k: v for k, v in index_of(folder).items() if k != NORM}
    index |= dict.fromkeys(odd, path.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(DataError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert f"missing {NORM}; unexpected odd." in message
    assert message.count("unexpected") == 19
    assert message.endswith("; and 12 more")


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_dtypes_that_are_not_read(folder, dtype):
    """A tensor of whole or double numbers is no weight of these families: refused by name."""
    tensors = load_file(last(folder))
    save_file({**tensors, NORM: tensors[NORM].astype(dtype)}, last(folder))
    with pytest.raises(DataError, match=rf"{NORM} is [IF](32|64), readable are BF16, F16, F32$"):
        models.load(folder)


def test_a_config_of_absurd_depth_is_refused_at_once(folder):
    """A billion layers are not listed one by one."""
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 10**9}))
    with pytest.raises(DataError, match="1000000000 layers; at most 4096 are read"):
        models.load(folder)


def test_links_within_the_folder_are_followed(folder, student):
    """A link to another file of the same folder is that file."""
    last(folder).rename(folder / "blob")
    last(folder).symlink_to("blob")
    assert models.load(folder)[0].config == student[0].config


def test_the_whole_file_comes_before_the_index(folder, teacher_folder, teacher):
    """Where both are there, model.safetensors is read, as transformers does."""
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(teacher_folder / name, folder / name)
    _, params = models.load(folder)
    np.testing.assert_array_equal(params["embed"], teacher[1]["embed"])


def test_secrets_are_not_copied_into_an_export(folder, student, tmp_path):
    """A tokenizer file that links out of its folder is refused when it would be copied."""
    (tmp_path / "secret").write_text("key")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"merges\.txt: links out of the model folder"):
        models.write_folder(tmp_path / "out", student[1], folder)
    assert not (tmp_path / "out").exists()
