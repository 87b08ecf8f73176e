"""The decoder's laws (pieces, padding), folders that survive a round trip, strict reading."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_bitwise_equal
from safetensors.numpy import load_file, save_file
from tiny import extended, lively, tiny_config

from kdjax import models
from kdjax.errors import DataError, StorageError
from kdjax.models import parameter_count, read_config
from kdjax.models.decoder import build
from kdjax.models.parameters import init_params
from kdjax.sharding import make_mesh

V = 40
SHAPES = {
    "tied": {},  # five are no multiple of a round of the scan
    "untied five layers": {"tie_word_embeddings": False, "num_hidden_layers": 5},
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=SHAPES)
def decoder(request):
    """(Model with jitted functions, lively params) of each shape."""
    config = tiny_config(V, **SHAPES[request.param])
    model = build(config)
    jitted = model._replace(hidden=jax.jit(model.hidden), extend=jax.jit(model.extend))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jitted, lively(shapes)


@pytest.fixture
def folder(student_folder, tmp_path):
    """A copy of the tiny student's folder, free to be spoilt."""
    return shutil.copytree(student_folder, tmp_path / "copy")


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_extending_token_by_token_equals_the_whole(decoder):
    """11 tokens written one by one, in a cache with spare room, get the states of `hidden`."""
    model, params = decoder
    tokens = random_tokens(0, 2, 11)
    whole = model.hidden(params, tokens)
    np.testing.assert_allclose(extended(model, params, tokens, 16), whole, atol=2e-5)


def test_left_padding_equals_none(decoder):
    """Rows that begin at slots 0, 2 and 9 of a cache have the states they have from slot 0."""
    model, params = decoder
    tokens, start = random_tokens(1, 3, 12), [0, 2, 9]
    padded = extended(model, params, tokens, 12, start)
    plain = model.hidden(
        params, np.stack([np.roll(row, -k) for row, k in zip(tokens, start, strict=True)])
    )
    for row, first in enumerate(start):
        np.testing.assert_allclose(padded[row, first:], plain[row, : 12 - first], atol=2e-5)


def test_decoding_is_causal(decoder):
    """Other tokens (or padding) from position 6 on leave the states before it as they are."""
    model, params = decoder
    tokens = random_tokens(2, 3, 12)
    other = tokens.copy()
    other[:, 6:] = (other[:, 6:] + 1) % V
    before, after = model.hidden(params, tokens), model.hidden(params, other)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before[:, 6:] - after[:, 6:]).max(-1) > 1e-2).all()


def test_every_position_reads_its_past(decoder):
    """Another first token, or the first two exchanged, changes every later state."""
    model, params = decoder
    tokens = random_tokens(3, 3, 12)
    changed, exchanged = tokens.copy(), tokens.copy()
    changed[:, 0] = (tokens[:, 0] + 1) % V
    exchanged[:, :2] = tokens[:, 1::-1]
    assert (tokens[:, 0] != tokens[:, 1]).all()
    for other in (changed, exchanged):
        moved = np.abs(model.hidden(params, tokens) - model.hidden(params, other)).max(-1)
        assert (moved[:, 2:] > 1e-3).all()


def test_bfloat16_computes_in_bfloat16_from_float32_parameters(student_folder):
    """`dtype` is of the computation: states in bfloat16, near the float32 ones; params float32."""
    (model, params), (wide, _) = (
        models.load(student_folder, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = random_tokens(4, 2, 6)
    states = jax.jit(model.hidden)(params, tokens)
    assert states.dtype == jnp.bfloat16
    assert model.head(params).weight_vd.dtype == jnp.float32  # so that its gradient is float32 too
    expected = jax.jit(wide.hidden)(params, tokens)
    np.testing.assert_allclose(states.astype(jnp.float32), expected, atol=0.1)


def test_loading_on_a_mesh_replicates(student_folder, student):
    """With a mesh of 8 each device holds every parameter whole."""
    _, params = models.load(student_folder, make_mesh(8))
    for weight in jax.tree.leaves(params):
        assert weight.sharding.is_fully_replicated
        assert len(weight.sharding.device_set) == 8
    assert_bitwise_equal(params, student[1])


@pytest.mark.parametrize("tied", [True, False])
def test_written_then_loaded_is_bitwise_equal(tmp_path, student_folder, teacher_folder, tied):
    """write_folder and load are inverse to the bit, tied and untied; no .partial is left."""
    source = student_folder if tied else teacher_folder
    _, params = models.load(source)
    params = lively(params)
    models.write_folder(tmp_path / "written", params, source)
    model, loaded = models.load(tmp_path / "written")
    assert_bitwise_equal(loaded, params)
    assert ("head" in loaded) != tied
    assert model.config == read_config(source)
    assert [p.name for p in tmp_path.iterdir()] == ["written"]
    assert sorted(p.name for p in (tmp_path / "written").iterdir()) == sorted(
        p.name for p in source.iterdir()
    )


def test_a_tied_head_written_twice_is_read_once(folder, student):
    """Some exporters write the tied table as lm_head too; it is the same model."""
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / WEIGHTS)
    _, params = models.load(folder)
    assert_bitwise_equal(params, student[1])


def test_bfloat16_files_are_widened_exactly(folder, student):
    """A checkpoint in bfloat16 loads as the float32 values of its numbers."""
    import ml_dtypes

    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    _, params = models.load(folder)
    expected = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), student[1])
    assert_bitwise_equal(params, expected)


def test_wrong_tensors_are_listed_together(folder):
    """Missing, unexpected and misshapen tensors stand in one DataError of one line."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 17), np.float32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(DataError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "missing model.norm.weight" in message
    assert "missing model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected model.layers.2.self_attn.q_proj.bias" in message
    assert (
        "model.layers.0.self_attn.k_proj.weight has shape (16, 17), the config wants (16, 16)"
        in (message)
    )
    assert "\n" not in message


def cut_weights(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def garble_weights(folder):
    (folder / WEIGHTS).write_bytes(b"not a model" * 50)


def drop_weights(folder):
    (folder / WEIGHTS).unlink()


def drop_config(folder):
    (folder / "config.json").unlink()


def garble_config(folder):
    (folder / "config.json").write_text('{"architectures": [')


def list_for_config(folder):
    (folder / "config.json").write_text("[1, 2]")


def drop_hidden_size(folder):
    edit_config(folder, hidden_size=None)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_weights, "damaged or not safetensors"),
        (garble_weights, "damaged or not safetensors"),
        (drop_weights, "no model.safetensors"),
        (drop_config, "no config.json"),
        (garble_config, "not a readable JSON file"),
        (list_for_config, "a JSON object was expected"),
        (drop_hidden_size, "missing or 0: hidden_size"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_spoilt_folders(folder, spoil, says):
    """A folder that can't be read is a DataError of one line that names it."""
    spoil(folder)
    with pytest.raises(DataError) as caught:
        models.load(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel"),
        ({"architectures": None}, "architecture none"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map={'AutoModel': 'm.M'}"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "holds 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "1 entries, but there are 2 hidden layers"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling={'type': 'su'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling of type yarn needs a factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": None},
            "type yarn needs original_max_position_embeddings, or max_position_embeddings",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_scaling={'rope_type': 'default', 'partial_rotary_factor': 0.5}",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"num_attention_heads": 3}, "heads must be a multiple of key/value heads"),
        ({"head_dim": 7}, "head_dim even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_computed_differently_is_refused(folder, changes, says):
    """An architecture or option that this project does not have is a DataError that names it."""
    edit_config(folder, **changes)
    with pytest.raises(DataError) as caught:
        models.load(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_are_off_are_accepted(folder, student):
    """Options at values that mean nothing are accepted, and rope_parameters gives the base."""
    edit_config(
        folder, attention_bias=False, use_sliding_window=False, hidden_act="silu",
        rope_scaling=None, quantization_config=None,
    )  # fmt: skip
    assert models.load(folder)[0].config == student[0].config
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_theta"]
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    (folder / "config.json").write_text(json.dumps(fields))
    assert read_config(folder).rope_theta == 12345.0


def test_an_unknown_name_lists_the_shipped_ones(tmp_path):
    """A folder that is not there is a DataError of one line; nothing is fetched."""
    with pytest.raises(DataError, match=r"no model folder .*absent") as caught:
        models.load(tmp_path / "absent")
    assert "\n" not in str(caught.value)


def test_a_folder_with_contents_is_not_overwritten(folder, student, student_folder):
    """Writing to a folder that holds anything is a StorageError, and leaves it as it was."""
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(StorageError, match="exists and is not empty"):
        models.write_folder(folder, student[1], student_folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_file_in_the_place_of_the_folder(tmp_path, student, student_folder):
    """A file where the folder, or its parent, should stand is a StorageError; the file stays."""
    path = tmp_path / "taken"
    path.write_text("mine")
    for place in (path, path / "inside"):
        with pytest.raises(StorageError) as caught:
            models.write_folder(place, student[1], student_folder)
        assert str(place) in str(caught.value)
    assert path.read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path, student, student_folder):
    """An empty folder in the place, and the remains of a killed write, are no obstacle."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "half").write_text("killed")
    models.write_folder(tmp_path / "new", student[1], student_folder)
    assert_bitwise_equal(models.load(tmp_path / "new")[1], student[1])


def test_identity_is_of_the_contents(folder, student_folder, teacher_folder):
    """A copy is the same model; one flipped bit of a weight, or another template, is another."""
    first = models.identity(student_folder)
    assert models.identity(folder) == models.identity(student_folder) == first
    assert models.identity(teacher_folder) != first
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(weights))
    flipped = models.identity(folder)
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(weights))
    assert models.identity(folder) == first
    (folder / "chat_template.jinja").write_text("another")
    assert len({first, flipped, models.identity(folder)}) == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_count_is_the_actual_count(shape):
    """Layers and the final norm are counted; embedding and head are not."""
    config = tiny_config(V, **SHAPES[shape])
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    tables = [params.pop(name) for name in ("embed", "head") if name in params]
    assert len(tables) == 2 - config.tie_word_embeddings
    assert parameter_count(config) == sum(w.size for w in jax.tree.leaves(params))


def test_fresh_parameters(student_folder, tmp_path, tokenizer_folder, tokenizer):
    """A new model is random by its seed: kernels of deviation 0.02, norms 1, layers that differ."""
    config = tiny_config(tokenizer.size)
    models.create(tmp_path / "again", config, tokenizer_folder, seed=1)
    models.create(tmp_path / "other", config, tokenizer_folder, seed=2)
    assert models.identity(tmp_path / "again") == models.identity(student_folder)
    assert models.identity(tmp_path / "other") != models.identity(student_folder)
    _, params = models.load(student_folder)
    kernel = np.asarray(params["layers"]["0"]["mixer"]["q_proj"]["kernel"])
    assert 0.018 < kernel.std() < 0.022
    assert np.abs(kernel[0] - kernel[1]).max() > 0.02
    assert (np.asarray(params["layers"]["0"]["mixer"]["q_norm"]["scale"]) == 1).all()
    assert (np.asarray(params["norm"]) == 1).all()
