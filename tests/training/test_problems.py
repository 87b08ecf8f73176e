"""The problems of a run: all prompts are measured before it begins."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kdjax.config import Config, Curriculum, Data, Evaluation
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.errors import DataError
from kdjax.training.loop import train
from kdjax.training.parts.problems import open_problems

FIELDS = {"training": "data.file", "held-out": "heldout_file", "test": "evaluation.file"}


@pytest.fixture
def config(tmp_path) -> Config:
    """Nine problems for each purpose, all of short prompts."""
    for name in FIELDS:
        write(tmp_path, name, "2+2=")
    return validate(
        Config(
            batch_size=8,
            data=Data(file=str(tmp_path / "training.jsonl")),
            curriculum=Curriculum((8, 16), 0.1, heldout_file=str(tmp_path / "held-out.jsonl")),
            evaluation=Evaluation(file=str(tmp_path / "test.jsonl")),
            run=str(tmp_path / "run"),
        )
    )


def write(folder, name, last):
    prompts = [*(f"1+{n}=" for n in range(8)), last]
    rows = "".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts)
    (folder / f"{name}.jsonl").write_text(rows)


@pytest.mark.parametrize("purpose", FIELDS)
def test_one_overlong_prompt_of_any_purpose(config, tmp_path, tokenizer, purpose):
    """Refused at once, whichever source it is in and however late its turn would be; or left out of
    it, which the source then says."""
    write(tmp_path, purpose, "1+" * 30 + "1=")
    with pytest.raises(DataError, match=f"1 of 9 {purpose} problems have prompts over data.max_p"):
        open_problems(config, timetable(config), {"": tokenizer}, tokenizer)
    data = dataclasses.replace(config.data, overlong_prompts="leave_out")
    asked = dataclasses.replace(config, data=data)
    found = open_problems(asked, timetable(asked), {"": tokenizer}, tokenizer)
    sources = dict(zip(FIELDS, (found.source, found.heldout, found.test), strict=True))
    assert {name: source.size for name, source in sources.items()} == {
        name: 8 if name == purpose else 9 for name in FIELDS
    }
    assert "1 of 9 left out: prompts over" in sources[purpose].about
    assert len(found.groups[""]) == found.source.size


def test_a_refused_run_leaves_no_folder(config, tmp_path):
    """So that the remedy, which changes the config, meets no run of another config."""
    write(tmp_path, "test", "1+" * 30 + "1=")
    with pytest.raises(DataError, match=r"or set data\.overlong_prompts leave_out"):
        train(config)
    assert not Path(config.run).exists()
