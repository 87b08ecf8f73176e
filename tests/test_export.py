"""What an export holds beside the trained weights: the chat template of its training."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from transformers import AutoTokenizer

from kdjax.data.tokenizer import load_tokenizer
from kdjax.export import export
from kdjax.train.loop import train

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
