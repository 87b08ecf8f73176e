"""Students of some of a teacher's layers: the same tensors, and a config.json that says so."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails
from release import by_default
from runs import assert_bitwise_equal
from safetensors import safe_open
from shapes import OF_EACH_FAMILY, SHAPES
from tiny import lively, tiny_config

from kdjax import models
from kdjax.__main__ import main
from kdjax.models.hf.shards import write_folder
from kdjax.models.pruned import evenly_spaced, init_student

V = 279


@pytest.fixture
def teacher_of(tmp_path, tokenizer_folder):
    """teacher_of(layers, **shape): a folder of a lively model."""

    def make(layers: int, dtype=jnp.float32, **shape):
        config = tiny_config(V, **{"num_hidden_layers": layers, **shape})
        models.create(tmp_path / "fresh", config, tokenizer_folder, seed=0)
        _, params = models.load(tmp_path / "fresh")
        write_folder(tmp_path / "teacher", lively(params), tmp_path / "fresh", dtype)
        return tmp_path / "teacher"

    return make


def tensors_of(folder) -> dict[str, bytes]:
    with safe_open(folder / "model.safetensors", framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)).tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", by_default(SHAPES, *OF_EACH_FAMILY))
def test_the_teachers_tensors(teacher_of, tmp_path, family):
    """Of every family, tied or not, layer i of the student is the teacher's i-th kept layer to the
    byte, and the rest is the rest; it loads, and computes."""
    folder, out = teacher_of(4, **SHAPES[family]), tmp_path / "student"
    assert init_student(folder, out, [0, 2, 3]) == (0, 2, 3)
    whole, found, wanted = tensors_of(folder), tensors_of(out), {}
    for name, tensor in whole.items():
        _, _, rest = name.partition("model.layers.")
        layer, _, inner = rest.partition(".")
        if not rest:
            wanted[name] = tensor
        elif int(layer) in (0, 2, 3):
            wanted[f"model.layers.{(0, 2, 3).index(int(layer))}.{inner}"] = tensor
    assert found == wanted
    model, params = models.load(out)
    assert model.config.num_hidden_layers == 3
    assert jnp.isfinite(model.hidden(params, jnp.ones((1, 3), jnp.int32))).all()


def test_bfloat16_stays(teacher_of, tmp_path):
    """A folder in bfloat16 is one in bfloat16, with the teacher's bits."""
    folder, out = teacher_of(2, jnp.bfloat16), tmp_path / "student"
    init_student(folder, out, 1)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    name = "model.embed_tokens.weight"
    assert tensors_of(out)[name] == tensors_of(folder)[name]


@pytest.mark.parametrize(
    ("count", "of", "wanted"),
    [
        (10, 30, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        (1, 6, (0,)), (2, 6, (0, 5)), (3, 6, (0, 3, 5)), (6, 6, (0, 1, 2, 3, 4, 5)),
    ],
)  # fmt: skip
def test_evenly_spaced(count, of, wanted):
    """The first and the last are among them, and the gaps differ by one at most."""
    assert evenly_spaced(count, of) == wanted


def test_lists_of_layers_are_shortened(teacher_of, tmp_path):
    """layer_types by its entries, max_window_layers by how many stay below it."""
    folder = teacher_of(4)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"layer_types": ["full_attention"] * 4, "max_window_layers": 3}
    (folder / "config.json").write_text(json.dumps(fields))
    init_student(folder, tmp_path / "student", [0, 1, 3])
    short = json.loads((tmp_path / "student" / "config.json").read_text())
    changed = {name for name in fields if short[name] != fields[name]}
    assert changed == {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert short["layer_types"] == ["full_attention"] * 3
    assert (short["num_hidden_layers"], short["max_window_layers"]) == (3, 2)


@pytest.mark.parametrize("turned", [[1, 1, 1, 1], [1, 0, 1, 1]])
def test_layers_without_rotary_positions_stay_so(teacher_of, tmp_path, turned):
    """no_rope_layers by its entries, where all of them have some, too."""
    folder = teacher_of(4, model_type="smollm3")
    fields = json.loads((folder / "config.json").read_text()) | {"no_rope_layers": turned}
    (folder / "config.json").write_text(json.dumps(fields))
    init_student(folder, tmp_path / "student", [0, 1, 3])
    short = json.loads((tmp_path / "student" / "config.json").read_text())
    assert short["no_rope_layers"] == [turned[layer] for layer in (0, 1, 3)]


def test_fresh_weights(teacher_of, tmp_path, capsys):
    """The command makes the shapes of the kept layers with weights of a seed, and the tokenizer."""
    folder = str(teacher_of(3, tie_word_embeddings=False))
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        rest = ["--layers", "2", "--fresh", "--seed", seed]
        assert main(["init-student", folder, str(tmp_path / name), *rest]) == 0
    assert f"2 fresh layers as wide as those of {folder}" in capsys.readouterr().out
    main(["init-student", folder, str(tmp_path / "kept"), "--layers", "0,2"])
    assert f"wrote {tmp_path / 'kept'}: layers 0, 2 of {folder}" in capsys.readouterr().out
    a, b, c, kept = (models.load(tmp_path / name)[1] for name in ("a", "b", "c", "kept"))
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, kept)
    assert_bitwise_equal(a, b)
    assert 0.018 < float(jnp.std(a["embed"])) < 0.022
    assert float(jnp.abs(a["embed"] - c["embed"]).max()) > 0.01
    names = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    for name in (name for name in names if (tmp_path / "teacher" / name).exists()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["4"], "--layers 4: {} has 3 layers; a student has 1 to 3"),
        (["0"], "a student has 1 to 3"),
        (["0,3"], "--layers 0,3: layers of {} are 0 to 2, each once, in rising order"),
        (["2,1"], "in rising order"),
        (["1,1"], "each once"),
        (["half"], "--layers is a number, such as 10, or a list, such as 0,3,6; got half"),
        ([], "usage: kdjax init-student TEACHER OUT --layers"),
        (["2", "--seed", "1"], "usage: "),
        (["2", "--fresh", "--seed", "x"], "--seed is a whole number, got x"),
    ],
)
def test_wrong_layers(tmp_path, teacher_folder, capsys, layers, said):
    """One line each, and nothing written."""
    arguments = ["--layers", *layers] if layers else []
    line = fails(capsys, 64, "init-student", teacher_folder, tmp_path / "out", *arguments)
    assert said.format(teacher_folder) in line
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_or_full(tmp_path, teacher_folder, capsys, monkeypatch):
    """Nothing is overwritten; a disk that fills up leaves nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    call = ("init-student", teacher_folder, tmp_path / "out", "--layers", "1")
    assert "exists and is not empty" in fails(capsys, 74, *call)
    shutil.rmtree(tmp_path / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    assert "No space left on device" in fails(capsys, 74, *call)
    assert not list(tmp_path.iterdir())
