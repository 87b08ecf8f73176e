"""A config's evaluation is resumable: killed and gone on with, it says what it would have said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from kdjax import evaluate as evaluate_module
from kdjax.base import Sampling
from kdjax.config import Config, Data, Evaluation, Rollouts
from kdjax.grading.eval_report import EvalReport
from kdjax.losses.objectives import negative_log_likelihood
from kdjax.rollouts.levels import levels
from kdjax.rollouts.sampler import row_bytes
from kdjax.runtime import console
from kdjax.storage import run_folder
from kdjax.training import evaluation
from kdjax.training.parts.build import Parts, build


@pytest.fixture
def parts(student_folder, tmp_path) -> Parts:
    """An evaluation of three chunks: 10 problems, 8 samples, 32 rows a chunk."""
    config = Config(
        student=str(student_folder), teacher=None, objective=negative_log_likelihood,
        prefix="student", cache=str(tmp_path / "cache"), rollouts=Rollouts(rows=8),
        data=Data(terms=(2,), max_prompt_tokens=24),
        evaluation=Evaluation(problems=10, samples=8, k=(1, 8), max_new_tokens=8, batch_size=16),
    )  # fmt: skip
    return build(config)


def numbers(result: EvalReport) -> EvalReport:
    return result._replace(seconds=0.0)


def test_killed_and_gone_on_with(parts, tmp_path, monkeypatch, capsys):
    """The chunk in flight is drawn again, finished ones are not; report and records are those of an
    evaluation that nothing stopped, bit for bit; nothing is left behind."""
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    whole = evaluation.evaluate_params(parts, parts.student.trained)
    lines = [line for line in capsys.readouterr().out.splitlines() if ": response " in line]
    assert lines[0].startswith("evaluation: response 8/80, ")
    assert ", 0 scored, " in lines[0]
    assert lines[-1].startswith("evaluation: response 80/80, 0 s left, 80 scored, ")
    assert [*(tmp_path / "cache" / "evaluations").iterdir()] == []
    scored, calls = evaluate_module._scored, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(evaluate_module, "_scored", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_params(parts, parts.student.trained)
    (folder,) = (tmp_path / "cache" / "evaluations").iterdir()
    assert {p.name for p in folder.iterdir()} == {"chunk-00000", "chunk-00001"}
    result, records = evaluation.evaluate_params(parts, parts.student.trained)
    assert len(calls) == 4
    assert numbers(result) == numbers(whole[0])
    assert result.seconds > 0
    assert records == whole[1]
    assert len(records) == 80
    assert not folder.exists()


@pytest.fixture
def killed_after_one_chunk(monkeypatch):
    """Evaluations that end at the first row of their second chunk."""
    scored = evaluate_module._scored

    def killed(*args):
        if args[4].row_b[0] > 0:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(evaluate_module, "_scored", killed)


@pytest.mark.usefixtures("killed_after_one_chunk")
def test_chunks_of_others_are_not_taken(parts, tmp_path):
    """Other weights, sampling, seed or size of a chunk have a folder of their own."""
    config = parts.config
    warm = dataclasses.replace(config.evaluation, max_new_tokens=7)
    others = [
        parts,
        parts._replace(config=dataclasses.replace(config, seed=1)),
        parts._replace(config=dataclasses.replace(config, evaluation=warm)),
        parts._replace(config=dataclasses.replace(config, rollouts=Rollouts(rows=64))),
    ]
    for each in others:
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate_params(each, parts.student.trained)
    moved = jax.tree.map(lambda x: x + 1, parts.student.trained)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_params(parts, moved)
    assert len([*(tmp_path / "cache" / "evaluations").iterdir()]) == 5


def test_one_chunk_is_not_written(parts):
    """A small evaluation leaves no trace in the cache."""
    config = dataclasses.replace(parts.config, rollouts=Rollouts(rows=128))
    alone = parts._replace(config=config)
    evaluation.evaluate_params(alone, parts.student.trained)
    assert not Path(parts.config.cache).exists()


@pytest.mark.usefixtures("killed_after_one_chunk")
def test_what_is_decoded_together_is_kept_together(parts, tmp_path):
    """A cache for eight rows (one a device): chunks of 32 of the 80 responses are kept, as with
    rollouts.rows 8, although that is 512."""
    a_row = row_bytes(parts.programs.student.sampler, levels(8)[-1].slots(24))
    config = dataclasses.replace(parts.config, rollouts=Rollouts(cache_gib=1.5 * a_row / 2**30))
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_params(parts._replace(config=config), parts.student.trained)
    (folder,) = (tmp_path / "cache" / "evaluations").iterdir()
    (chunk,) = folder.iterdir()
    assert len(run_folder.read_chunk(folder, 0)["records"]) == 32
    assert chunk.name == "chunk-00000"


def test_few_responses_are_scored_as_few(parts, monkeypatch):
    """Ten responses are one batch of sixteen rows, on eight devices, whatever the batch may be."""
    small = dataclasses.replace(parts.config.evaluation, samples=1, k=(1,), batch_size=128)
    config = dataclasses.replace(parts.config, evaluation=small, rollouts=Rollouts(rows=64))
    scorer, shapes = evaluation._scorer, []

    def seen(*args):
        score = scorer(*args)
        return lambda rollout, problems: (
            shapes.append(len(rollout.tokens_bs)),
            score(rollout, problems),
        )[1]

    monkeypatch.setattr(evaluation, "_scorer", seen)
    _, records = evaluation.evaluate_params(parts._replace(config=config), parts.student.trained)
    assert shapes == [16]
    assert len(records) == 10


def test_several_temperatures_are_the_evaluations_one_by_one(parts, tmp_path):
    """The report and its records are those without the others; each of the others is what an
    evaluation of that sampling alone says; chunks of one are not taken for another's."""

    def evaluated(**changes) -> tuple[EvalReport, list]:
        settings = dataclasses.replace(parts.config.evaluation, **changes)
        config = dataclasses.replace(parts.config, evaluation=settings)
        return evaluation.evaluate_params(parts._replace(config=config), parts.student.trained)

    own = Sampling(0.9, top_k=50)
    result, records = evaluated(sampling=own, temperatures=(0.0, 0.5))
    alone, alone_records = evaluated(sampling=own)
    assert numbers(result)._replace(also=()) == numbers(alone)
    assert records == alone_records
    assert [report.sampling for report in result.also] == [
        Sampling(0.0, top_k=50), Sampling(0.5, top_k=50),
    ]  # fmt: skip
    for other in result.also:
        single, _ = evaluated(sampling=other.sampling)
        assert numbers(other) == numbers(single)
    lengths = {tuple(report.tokens) for report in (result, *result.also)}
    assert len(lengths) == 3
    assert [*(tmp_path / "cache" / "evaluations").iterdir()] == []
