"""What an export holds beside the trained weights: chat template and stop ids of its training."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from revocabulary import permuted
from transformers import AutoTokenizer

from kdjax.data.tokenizer import load_tokenizer
from kdjax.export import export
from kdjax.training.loop import train

TURNS = [{"role": "user", "content": "1+1="}]


@pytest.mark.parametrize("named", ["plain", None])
def test_an_export_holds_the_template_of_its_training(tiny, tmp_path, named):
    """A student without one: that which is named, else its teacher's; any reader of the folder then
    renders the prompts that were trained on."""
    student = shutil.copytree(tiny.student, tmp_path / "base")
    own = (student / "chat_template.jinja").read_text()
    (student / "chat_template.jinja").unlink()
    data = dataclasses.replace(tiny.data, chat_template=named)
    train(dataclasses.replace(tiny, student=str(student), data=data, steps=1))
    export(tiny.run, tmp_path / "out")
    hf = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (hf.chat_template == own) == (named is None)
    rendered = hf.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered == load_tokenizer(tmp_path / "out").render("1+1=")
    assert (rendered == "1+1=\n") == (named == "plain")


@pytest.mark.parametrize("stops", ["raw", "merge"])
def test_an_export_stops_where_its_training_did(tiny, tmp_path, stops):
    """Merged, the student may write its teacher's stop token: any reader of the folder then stops
    at both; raw, at its own alone."""
    student = shutil.copytree(tiny.student, tmp_path / "base")
    end, pad = load_tokenizer(student).stop_ids
    for name, own in (("generation_config", {"eos_token_id": pad}), ("tokenizer_config", {})):
        path = student / f"{name}.json"
        fields = {"temperature": 0.7, "eos_token": "<|endoftext|>"} | own
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    train(dataclasses.replace(tiny, student=str(student), steps=1, stops=stops))
    export(tiny.run, tmp_path / "out")
    found = load_tokenizer(tmp_path / "out").stop_ids
    assert found == ((pad,) if stops == "raw" else (pad, end))
    declared = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert declared["temperature"] == 0.7


def test_an_export_has_no_stop_ids_of_another_vocabulary(tiny, tmp_path):
    """Of a teacher whose tokens have other ids, those of its stops are words of the student."""
    permuted(tiny.teacher, tmp_path / "other")
    other = dict(teacher=str(tmp_path / "other"), least_aligned=0.5)
    train(dataclasses.replace(tiny, **other, steps=1, stops="merge"))
    export(tiny.run, tmp_path / "out")
    stops = [load_tokenizer(folder).stop_ids for folder in (tiny.student, tmp_path / "other")]
    assert {*stops[0]} != {*stops[1]}
    assert load_tokenizer(tmp_path / "out").stop_ids == stops[0]
