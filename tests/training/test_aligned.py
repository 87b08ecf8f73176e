"""Runs against a teacher of another tokenizer: what is trained on, told and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from revocabulary import byte_level, permuted
from runs import logged
from tiny import tiny_config

from kdjax import models, negative_log_likelihood, reverse_kl
from kdjax.config import Config, Evaluation, Layout
from kdjax.config.validation import validate
from kdjax.errors import ConfigError
from kdjax.plan.plan import plan
from kdjax.training import loop
from kdjax.training.parts.build import asked_of, build
from kdjax.training.parts.precompute import fill
from kdjax.training.parts.precomputed import parse_keep

SUMS = [f"{a}+{b}={a + b}\nuser assistant \\boxed{{{a + b}}}" for a in range(9) for b in range(9)]


def aligned(config: Config, teacher: Path, **changes) -> Config:
    changes = {"least_aligned": 0.2, "teacher": str(teacher)} | changes
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory) -> Path:
    """A tiny teacher with a BPE of its own, of more tokens, and another stop token."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = byte_level(folder / "tokenizer", SUMS, 320, stop="<|over|>")
    models.create(folder / "teacher", tiny_config(330), tokenizer, seed=3)
    return folder / "teacher"


def test_a_teacher_whose_tokens_have_other_ids_teaches_the_same(tiny, tmp_path):
    """Every metric of every step is that of the run with the teacher as it was, to rounding; all
    positions are aligned, and on devices of the teacher's own it is the same run again."""
    permuted(tiny.teacher, tmp_path / "other")
    loop.train(tiny)
    plain = logged(tiny)
    devices = Layout(teacher_devices=4)
    for name, changes in {"beside": {}, "apart": {"layout": devices}}.items():
        run = str(tmp_path / name)
        config = aligned(tiny, tmp_path / "other", run=run, least_aligned=1.0, **changes)
        loop.train(config)
        for before, now in zip(plain, logged(config), strict=True):
            assert now["aligned"] == 1
            for metric in ("loss", "gradient_norm", "forward_kl", "reverse_kl", "teacher_entropy"):
                np.testing.assert_allclose(now[metric], before[metric], rtol=1e-4, err_msg=metric)


@pytest.mark.parametrize("prefix", ["student", "dataset"])
def test_a_student_learns_from_another_tokenizer(tiny, other_teacher, prefix):
    """The loss falls; shares of positions and of the teacher's probability are in the start-up
    report, and those of the first step are those that were told; the evaluation has no KL."""
    config = aligned(tiny, other_teacher, prefix=prefix, steps=30, token_loss=reverse_kl)
    report = loop.train(config)
    records = logged(config)
    losses = [record["loss"] for record in records]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    told = (Path(config.run) / "startup.txt").read_text()
    first = records[0]
    assert 0.2 < first["aligned"] < 1
    assert 0 < first["teacher_shared"] < 1
    assert (
        f"{first['aligned']:.1%} of the tokens are aligned with the teacher's, and"
        f" {first['teacher_shared']:.2%} of its probability"
    ) in told
    assert "are one event, and so are the student's" in told
    assert report.forward_kl is None


def test_too_few_aligned_tokens_are_an_error_at_the_start(tiny, other_teacher):
    """One line with the share, before the first step."""
    with pytest.raises(ConfigError, match=r"least_aligned is 0.99, and of the first responses"):
        loop.train(aligned(tiny, other_teacher, least_aligned=0.99))
    assert not (Path(tiny.run) / "metrics.jsonl").exists()


def test_nobody_gets_it_by_accident(tiny, other_teacher):
    """Without the field, another tokenizer is refused as ever."""
    with pytest.raises(ConfigError, match="student and teacher tokenizers differ"):
        loop.train(dataclasses.replace(tiny, teacher=str(other_teacher)))


def test_what_is_kept_and_planned_is_of_one_tokenizer(tiny, other_teacher):
    """Outputs of such a teacher are not kept, and its step is not planned: one line each."""
    config = aligned(tiny, other_teacher, prefix="student")
    asked = asked_of(build(config), "student")[""]
    with pytest.raises(ConfigError, match="--keep top_k=4 is of the student's tokens"):
        fill(asked, None, parse_keep("top_k=4"), (0, 1), False)
    with pytest.raises(ConfigError, match="plan: a teacher of another tokenizer is not planned"):
        plan(config, "local")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"least_aligned": 0.0}, r"least_aligned must be a share in \(0, 1\], got 0.0"),
        ({"least_aligned": 1.5}, r"least_aligned must be a share in \(0, 1\], got 1.5"),
        ({"prefix": "teacher"}, "prefix teacher draws tokens of the teacher's own tokenizer"),
        ({"trajectories": "kept"}, "trajectories kept and least_aligned are both set"),
        ({"layout": Layout(tensor=2)}, "layout.tensor 2 shards one vocabulary"),
        ({"teacher": None, "objective": None}, "least_aligned is of a teacher's tokens"),
    ],
)
def test_what_it_can_not_be_combined_with(changes, said):
    """Each is one line, before anything is loaded."""
    config = Config(least_aligned=0.5, prefix="student", evaluation=Evaluation())
    if "objective" in changes:
        changes = changes | {"objective": negative_log_likelihood}
    with pytest.raises(ConfigError, match=said):
        validate(dataclasses.replace(config, **changes))
