"""Checkpoints of vision models, as transformers makes them: their text part is read, trained and
exported alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kdjax import models
from kdjax.config import Evaluation
from kdjax.errors import DataError
from kdjax.export import export
from kdjax.models.pruned import init_student
from kdjax.numerics import project
from kdjax.training.loop import train

V = 279
TEXT = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
EYE = {"hidden_size": 8, "intermediate_size": 8, "patch_size": 4}


def gemma3() -> transformers.PreTrainedModel:
    text = TEXT | {
        "num_hidden_layers": 7, "num_key_value_heads": 1, "sliding_window": 5,
        "query_pre_attn_scalar": 24, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    eye = EYE | {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
    config = transformers.Gemma3Config(
        text_config=text | {"model_type": "gemma3_text"}, mm_tokens_per_image=4,
        vision_config=eye | {"model_type": "siglip_vision_model"}, image_token_index=V - 1,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5() -> transformers.PreTrainedModel:
    text = TEXT | {
        "num_hidden_layers": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0], "mrope_interleaved": True,
        },
    }  # fmt: skip
    eye = EYE | {"depth": 1, "num_heads": 1, "out_hidden_size": 16, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(
        text_config=text | {"model_type": "qwen3_5_text"}, vision_config=eye,
        tie_word_embeddings=True, image_token_id=V - 1,
    )  # fmt: skip
    return transformers.Qwen3_5ForConditionalGeneration(config)


MADE = {"gemma3": gemma3, "qwen3_5": qwen3_5}
LEFT = {
    "gemma3": "vision_tower.* (32), multi_modal_projector.* (2)",
    "qwen3_5": "), mtp.* (1)",
}


@pytest.fixture(scope="module", params=MADE)
def whole(request, tmp_path_factory, tokenizer_folder):
    """(a folder that transformers saved of a vision model, the model in torch, its name)."""
    torch.manual_seed(0)
    model, folder = MADE[request.param]().eval(), tmp_path_factory.mktemp("vision") / "model"
    shutil.copytree(tokenizer_folder, folder)
    model.save_pretrained(folder)
    if request.param == "qwen3_5":  # released ones hold a head of their own that predicts further
        tensors = load_file(folder / "model.safetensors")
        tensors["mtp.fc.weight"] = np.ones((2, 2), np.float32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in tokenizer_folder.iterdir():  # its generation_config.json was written over
        shutil.copy(path, folder)
    return folder, model, request.param


def assert_equal_logits(folder, reference) -> None:
    model, params = models.load(folder)
    tokens = np.random.default_rng(0).integers(0, V - 2, (2, 24))
    found = jax.jit(lambda p, ids: project(model.hidden(p, ids), model.head(p)))(params, tokens)
    with torch.no_grad():
        wanted = reference(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)


def alone(folder) -> transformers.PreTrainedModel:
    """The text model that transformers loads, from a folder that is one."""
    fields = json.loads((folder / "config.json").read_text())
    assert not {"text_config", "vision_config"} & {*fields}
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(about.values())
    assert type(model).__name__ == fields["architectures"][0]
    return model.eval()


def test_the_text_part_computes_as_the_whole(whole, capsys):
    """Tokens alone have the logits of the whole model; what is not read is said."""
    folder, model, name = whole
    assert_equal_logits(folder, model)
    said = capsys.readouterr().out
    assert f"{folder}: only its text model is read; left out are the tensors " in said
    assert LEFT[name] in said


def test_a_student_of_some_layers(whole, tmp_path):
    """It is a text model alone, here and to transformers."""
    folder, _, _ = whole
    init_student(folder, tmp_path / "student", [0, 2, 3])
    assert_equal_logits(tmp_path / "student", alone(tmp_path / "student"))
    assert models.read_config(tmp_path / "student").num_hidden_layers == 3


def test_an_export_is_a_text_model(whole, tmp_path):
    """Written, loaded by transformers: the same logits, and another identity."""
    folder, _, _ = whole
    models.write_folder(tmp_path / "out", models.load(folder)[1], folder)
    assert_equal_logits(tmp_path / "out", alone(tmp_path / "out"))
    assert models.identity(tmp_path / "out") != models.identity(folder)
    assert models.read_config(tmp_path / "out") == models.read_config(folder)


@pytest.mark.release
def test_a_run_that_began_as_one_exports_a_text_model(whole, tiny, tmp_path):
    """Trained, exported, loaded by transformers, with the trained logits; what was not read is in
    the start-up report."""
    folder, model, name = whole
    short = Evaluation(problems=2, samples=1, k=(1,), max_new_tokens=4)
    train(dataclasses.replace(tiny, student=str(folder), steps=1, evaluation=short))
    export(tiny.run, tmp_path / "out")
    assert_equal_logits(tmp_path / "out", alone(tmp_path / "out"))
    assert LEFT[name] in (Path(tiny.run) / "startup.txt").read_text()
    before = model.get_output_embeddings().weight.detach().numpy()
    assert not np.array_equal(models.load(tmp_path / "out")[1]["embed"], before)


def test_two_tensors_of_one_name(whole, tmp_path):
    """A text model's tensor beside the larger model's: neither is taken for the other."""
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(16, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"two tensors are model\.norm\.weight of its text model"):
        models.load(folder)
