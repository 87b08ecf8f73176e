"""Weights in and out: every family to the bit, dealt over meshes, without a second copy on the
host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from release import by_default
from runs import assert_bitwise_equal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shapes import OF_EACH_FAMILY, SHAPES
from tiny import lively, tiny_config

from kdjax import models
from kdjax.errors import ConfigError, DataError
from kdjax.models import read_config
from kdjax.models.decoder import build
from kdjax.models.hf import weights
from kdjax.models.hf.config import to_fields
from kdjax.models.hf.identity import _digest
from kdjax.models.hf.tensors import tensors
from kdjax.models.layers.linear import LoRA
from kdjax.models.parameters import abstract_params, init_params
from kdjax.sharding import make_mesh

V = 40
INDEX = "model.safetensors.index.json"
EXPERTS = "qwen3_moe, weights renormalised"
MESHES = {"1 x 2 x 4": (8, 2, 4), "2 x 4 x 1": (8, 4, 1), "1 x 1 x 2": (2, 1, 2)}


@pytest.fixture
def family(tmp_path):
    """make(name) -> (a source folder with config.json alone, lively parameters of it)."""

    def make(name: str):
        config = tiny_config(V, **SHAPES[name])
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "config.json").write_text(json.dumps(to_fields(config)))
        shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return tmp_path / "source", lively(shapes)

    return make


def read(folder, dtype=jnp.float32, mesh=None):
    return weights.read_params(folder, read_config(folder), dtype, mesh)


@pytest.mark.parametrize("shape", by_default(SHAPES, *OF_EACH_FAMILY))
def test_written_then_read_is_bitwise_equal(family, tmp_path, shape):
    """Single and in shards, and dealt over a mesh: what is read is what was written."""
    source, params = family(shape)
    models.write_folder(tmp_path / "single", params, source)
    models.write_folder(tmp_path / "shards", params, source, shard_bytes=6000)
    assert not (tmp_path / "single" / INDEX).exists()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for folder in (tmp_path / "single", tmp_path / "shards"):
        assert_bitwise_equal(read(folder), params)
    assert_bitwise_equal(read(tmp_path / "shards", mesh=make_mesh(8, fsdp=2, tensor=2)), params)


@pytest.mark.parametrize("sizes", by_default(MESHES, "1 x 2 x 4"))
@pytest.mark.parametrize("shape", [EXPERTS, "qwen3, biases, linear rope, window"])
def test_parameters_lie_where_the_rules_say(family, tmp_path, shape, sizes):
    """Each device holds its piece of every parameter."""
    source, params = family(shape)
    models.write_folder(tmp_path / "model", params, source)
    mesh = make_mesh(*MESHES[sizes])
    found = read(tmp_path / "model", mesh=mesh)
    assert_bitwise_equal(found, params)
    wanted = abstract_params(read_config(source), jnp.float32, mesh)
    for w, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert w.sharding == like.sharding
    assert not found["layers"]["0"]["mixer"]["q_proj"]["kernel"].sharding.is_fully_replicated


def test_weights_that_are_not_finite_are_said(student_folder, tmp_path, capsys):
    """A NaN anywhere is said where a model is loaded, with the array that has it."""
    folder = tmp_path / "model"
    shutil.copytree(student_folder, folder)
    models.load(folder)
    assert "not finite" not in capsys.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.inf
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    models.load(folder)
    said = capsys.readouterr().out
    assert f"warning: {folder}: 2 of its arrays hold numbers that are not finite (" in said
    assert "layers.0.up_proj.kernel, ...)" in said


@pytest.mark.parametrize("devices", [None, (8, 1, 1), (8, 2, 1)], ids=str)
def test_blocks_of_any_size_give_the_same(family, tmp_path, monkeypatch, devices):
    """Tensors read a few lines at a time, the last block shorter, are the same tensors."""
    source, params = family(EXPERTS)
    models.write_folder(tmp_path / "model", params, source)
    monkeypatch.setattr(weights, "PIECE_BYTES", 320)  # 5 lines of 16
    mesh = None if devices is None else make_mesh(*devices)
    assert_bitwise_equal(read(tmp_path / "model", mesh=mesh), params)


def test_a_device_reads_its_own_slice_once():
    """On a mesh no piece is read whole, and what several devices hold is read once."""
    asked = []

    class Tensor:
        def __getitem__(self, index):
            asked.append(index)
            return np.zeros([i.stop - i.start for i in index], np.float32)

    mesh = make_mesh(8, fsdp=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    piece = weights._piece(Tensor(), (slice(6, 10), slice(0, 8)), sharding)
    assert piece.shape == (4, 8)
    assert sorted(i[1].start for i in asked) == [0, 2, 4, 6]
    assert {(i[0].start, i[0].stop) for i in asked} == {(6, 10)}


def test_a_program_is_compiled_once_a_shape(family, tmp_path):
    """One program for all layers and experts of a parameter."""
    source, params = family(EXPERTS)
    models.write_folder(tmp_path / "model", params, source)
    weights._writer.cache_clear()
    read(tmp_path / "model")
    shapes = {(w.shape, path[-1].key) for path, w in jax.tree_util.tree_leaves_with_path(params)}
    writers = [weights._writer(None, turned, 0) for turned in (True, False)]
    assert sum(w._cache_size() for w in writers) <= len(shapes)


@pytest.mark.parametrize("wide", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtypes_are_converted_as_numpy_does(student_folder, tmp_path, stored, wide):
    """Any stored dtype into any parameter dtype: NumPy's rounding, no detour."""
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    (tmp_path / "config.json").write_bytes((student_folder / "config.json").read_bytes())
    rng = np.random.default_rng(0)
    held = {
        k: rng.normal(size=v.shape).astype(dtype)
        for k, v in load_file(student_folder / "model.safetensors").items()
    }
    save_file(held, tmp_path / "model.safetensors")
    _, params = models.load(tmp_path, params_dtype=wide)
    kernel = held["model.layers.1.mlp.up_proj.weight"].astype(np.dtype(wide)).T
    found = np.asarray(params["layers"]["0"]["up_proj"]["kernel"][1])
    assert found.dtype == np.dtype(wide)
    assert found.tobytes() == np.ascontiguousarray(kernel).tobytes()


def test_loading_passes_on_how_the_model_computes(student_folder):
    """Mesh, dtype and `how` go to the decoder; what it does not know is refused by it."""
    mesh, config = make_mesh(2), read_config(student_folder)
    model, _ = models.load(student_folder, mesh, jnp.bfloat16, remat="full")
    assert model is build(config, jnp.bfloat16, mesh=mesh, remat="full")
    with pytest.raises(ConfigError, match="unknown remat"):
        models.load(student_folder, remat="som")


@pytest.mark.parametrize("shape", ["llama, untied, llama3 rope", "qwen2, tied, yarn"])
def test_a_sharded_export_follows_the_convention(family, tmp_path, shape):
    """Names, format, index and its size; a tied table stands once; files are as readable as any."""
    source, params = family(shape)
    folder = tmp_path / "out"
    models.write_folder(folder, params, source, dtype=jnp.bfloat16, shard_bytes=6000)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    n = len(files)
    assert files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert sorted(set(index["weight_map"].values())) == files
    assert ("lm_head.weight" in index["weight_map"]) == ("head" in params)
    held = {}
    for name in files:
        with safe_open(folder / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
        own = load_file(folder / name)
        assert sum(x.nbytes for x in own.values()) <= 6000
        assert all(index["weight_map"][k] == name for k in own)
        assert (folder / name).stat().st_mode == (folder / "config.json").stat().st_mode
        held |= own
    assert set(held) == set(tensors(read_config(source)))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
    assert {x.dtype.name for x in held.values()} == {"bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_bitwise_equal(read(folder), rounded)


def test_parameters_on_a_mesh_are_written(family, tmp_path):
    """Dealt over 8 devices, or already on the host: the same files, byte for byte."""
    source, params = family(EXPERTS)
    models.write_folder(tmp_path / "one", jax.device_get(params), source, shard_bytes=20_000)
    dealt = read(tmp_path / "one", mesh=make_mesh(8, fsdp=2, tensor=4))
    models.write_folder(tmp_path / "eight", dealt, source, shard_bytes=20_000)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "eight" / path.name).read_bytes()


def test_adapters_are_not_left_out_silently(student_folder, tmp_path):
    """Parameters that a checkpoint has no name for are an error, and nothing is written."""
    config = read_config(student_folder)
    made = jax.jit(lambda key: init_params(config, key, LoRA(2, 4.0, ("q_proj",))))
    params = made(jax.random.key(0))
    with pytest.raises(
        DataError, match=r"layers\.0\.mixer\.q_proj\.lora_a, layers\.0\.mixer\.q_proj\.lora_b; "
    ):
        models.write_folder(tmp_path / "out", params, student_folder)
    assert list(tmp_path.iterdir()) == []


def test_all_tokenizer_files_travel(student, student_folder, tmp_path):
    """An export holds each tokenizer file that its source holds, and no other; an old dtype key
    goes."""
    source = tmp_path / "source"
    source.mkdir()
    names = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
    for name in names:
        (source / name).write_text(f"the {name}")
    (source / "pytorch_model.bin").write_text("not this")
    fields = json.loads((student_folder / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float16"}))
    models.write_folder(tmp_path / "out", student[1], source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", *names,
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "out" / name).read_text() == f"the {name}"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "torch_dtype" not in written


def test_identity_covers_every_shard_and_is_remembered(student, student_folder, tmp_path):
    """Another bit in any shard, or another index, is another model; unchanged files are hashed
    once."""
    folder = tmp_path / "model"
    models.write_folder(folder, student[1], student_folder, shard_bytes=20_000)
    written_ns = 1_000_000_000 * 10**9  # long ago: a file written just now is hashed every time
    for path in folder.iterdir():
        os.utime(path, ns=(written_ns, written_ns))
    seen = {models.identity(folder)}
    hashed = _digest.cache_info().misses
    assert {models.identity(folder)} == seen
    assert _digest.cache_info().misses == hashed
    shards = sorted(folder.glob("*.safetensors"))
    for path in (*shards, folder / INDEX):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1 if path in shards else ord("\n") ^ ord(" ")
        path.write_bytes(bytes(content))
        written_ns += 1
        os.utime(path, ns=(written_ns, written_ns))
        seen.add(models.identity(folder))
    assert len(seen) == len(shards) + 2


WATCHED = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from kdjax.models import read_config
from kdjax.models.hf import weights

def anonymous_bytes():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

def watch():
    while not done.is_set():
        peaks.append(anonymous_bytes())
        time.sleep(0.002)

folder, done = Path(sys.argv[1]), threading.Event()
jax.block_until_ready(jnp.zeros(4) + 1)
before, peaks = anonymous_bytes(), []
watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(weights.read_params(folder, read_config(folder), jnp.float32))
done.set()
watcher.join()
own = sum(w.nbytes for w in jax.tree.leaves(params))
print(json.dumps({"own": own, "extra": max(peaks) - before - own}))
"""


def test_the_host_holds_no_second_copy(tmp_path):
    """Reading some hundred MB takes the parameters' own memory, the largest tensor and 100 MB."""
    config = tiny_config(
        32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6,
        num_attention_heads=16, head_dim=64,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(to_fields(config)))
    index, rng = {}, np.random.default_rng(0)
    for number, (name, place) in enumerate(tensors(config).items()):
        shard = f"model-{number}.safetensors"
        numbers = 0.02 * rng.standard_normal(place.shape, dtype=np.float32)
        save_file({name: numbers.astype(ml_dtypes.bfloat16)}, tmp_path / shard)
        index[name] = shard
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert found["own"] > 400e6
    assert found["extra"] < 2 * 32768 * 1024 + 100e6


def head_apart(folder, source, change=lambda head: head * 2, **extra):
    """A copy of a folder whose config.json ties its head, with an LM head in its weights."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    held = load_file(source / "model.safetensors")
    held |= {"lm_head.weight": change(held["model.embed_tokens.weight"]), **extra}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return held["lm_head.weight"]


def test_a_head_of_its_own_is_read_though_config_ties_it(student_folder, tmp_path, capsys):
    """As transformers reads it, everywhere: shapes, load, the head alone, a mesh, export and back;
    and a line is said."""
    head = head_apart(tmp_path / "apart", student_folder)
    mesh = make_mesh(8, fsdp=2, tensor=4)
    for folder in (tmp_path / "apart", tmp_path / "written"):
        config = read_config(folder)
        assert not config.tie_word_embeddings
        for where in (None, mesh):
            model, params = models.load(folder, where)
            assert_bitwise_equal(model.head(params).weight_vd, head)
        assert_bitwise_equal(weights.read_head(folder, config).weight_vd, head)
        if folder.name == "apart":
            models.write_folder(tmp_path / "written", params, folder)
    assert not json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"]
    said = " ".join(capsys.readouterr().out.split())
    assert "apart: config.json ties the LM head to the embedding, but lm_head.weight is" in said


def test_a_head_that_is_the_embedding_stays_tied(student_folder, tmp_path):
    """Written a second time, in a narrower dtype too where no number changes."""
    held = load_file(student_folder / "model.safetensors")["model.embed_tokens.weight"]
    exact = held.astype(ml_dtypes.bfloat16)
    same = {"model.embed_tokens.weight": exact.astype(np.float32)}
    head_apart(tmp_path / "again", student_folder, lambda head: exact, **same)
    assert read_config(tmp_path / "again").tie_word_embeddings
    _, params = models.load(tmp_path / "again")
    assert "head" not in params


def test_buffers_of_rotary_frequencies_are_left_aside(student_folder, tmp_path):
    """Llama 2's files hold them."""
    buffers = {
        f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for n in (0, 1)
    }
    head_apart(tmp_path / "old", student_folder, np.copy, **buffers)
    assert_bitwise_equal(read(tmp_path / "old"), read(student_folder))


def test_absurd_depth_is_refused_before_a_program_is_made(student_folder, tmp_path):
    """config.json is enough; and, for fewer layers, the weights' header."""
    head_apart(tmp_path / "deep", student_folder, np.copy)
    path = tmp_path / "deep" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(DataError, match="1000000000 layers; at most 4096 are read"):
        read_config(tmp_path / "deep")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4000}))
    with pytest.raises(DataError, match="4000 layers, but 25 tensors"):
        read_config(tmp_path / "deep")


def test_norms_of_a_narrow_teacher_are_those_of_its_student(student_folder, tmp_path):
    """A float32 checkpoint computed in bfloat16: the teacher is, to the bit, what the student's
    masters are narrowed to."""
    config = read_config(student_folder)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    models.write_folder(tmp_path / "fine", lively(shapes), student_folder)
    teacher, student = read(tmp_path / "fine", jnp.bfloat16), read(tmp_path / "fine")
    assert_bitwise_equal(teacher, models.narrow(student, jnp.bfloat16))
    assert teacher["norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("gemma3", "qwen3"),
        ("qwen3_5", "qwen3"),
        ("olmo3", "llama"),
        ("qwen3", "llama"),
        ("qwen3", "qwen3_5"),
    ],
)
def test_weights_of_another_family(said, stored, family, tmp_path):
    """A folder whose config.json is of one family and whose weights are of another: one line that
    names tensors that are missing or that it does not know."""
    of = {name.split(",")[0]: name for name in reversed(OF_EACH_FAMILY)}
    source, params = family(of[stored])
    made = tmp_path / "made"
    models.write_folder(made, params, source)
    other = tiny_config(V, **SHAPES[of[said]])
    (made / "config.json").write_text(json.dumps(to_fields(other)))
    with pytest.raises(DataError, match=r"(missing|unexpected) model\.layers\.") as caught:
        models.load(made)
    assert "\n" not in str(caught.value)
