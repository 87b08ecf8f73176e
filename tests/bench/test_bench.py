"""kdjax bench: figures that are measured, with what they belong to."""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lively

from kdjax.__main__ import main
from kdjax.base import Batch
from kdjax.bench import Figure, medians, show_figures
from kdjax.bench import rollout as rollout_bench
from kdjax.bench.baselines import scanned_decode, static_batches
from kdjax.bench.head import HeadBench, bench_head
from kdjax.bench.rollout import RolloutBench
from kdjax.bench.verifier import VerifierBench, bench_verifier, ordinary
from kdjax.errors import ConfigError
from kdjax.grading.answers import grade_boxed
from kdjax.models import DecoderConfig, unstacked
from kdjax.numerics import project
from kdjax.rollouts.sampler import generate

SMALL = HeadBench(
    tokens=32, vocabulary=97, student_width=8, teacher_width=12, chunk=8, repeats=1,
    memory_tokens=2048, targets=("here",), skip=("precision", "exact"),
)  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return {figure.name: figure for figure in bench_head(SMALL)}


@pytest.mark.release
def test_the_head_is_exact():
    """Every loss is within 1e-11 of dense autodiff in float64, which tests/step/test_head.py proves
    of the head itself."""
    figures = bench_head(dataclasses.replace(SMALL, skip=("precision", "memory", "time")))
    errors = [figure for figure in figures if figure.name.startswith("float64 error")]
    assert len(errors) == 6
    assert all(f.met and f.value > 0 for f in errors)


def test_memory_and_times_are_there(figures):
    """Temporaries of one pass are far under the naive ones; every ratio is of two times."""
    ours, naive = (figures[f"temporaries, {way}, here"].value for way in ("one pass", "naive"))
    assert 0 < ours < naive
    ratio = figures["one pass / naive"].value
    assert ratio == figures["time, one pass"].value / figures["time, naive"].value


def test_a_missing_compiler_is_said():
    """A target that can't be compiled for is a line without a value that says why."""
    sizes = HeadBench(skip=("exact", "precision", "time"), targets=("v9z:2x2",))
    (figure,) = bench_head(sizes)
    assert figure.value is None
    assert figure.met is None
    assert "can't compile for v9z:2x2" in figure.note


def test_sizes_that_cannot_be():
    """A chunk that does not divide the tokens is refused before anything is measured."""
    with pytest.raises(ConfigError, match="chunk must divide tokens"):
        next(bench_head(HeadBench(tokens=10, chunk=4)))


@pytest.mark.parametrize(
    ("value", "reach", "met"),
    [(1.0, 1.0, True), (1.1, 1.0, False), (None, 1.0, None), (1, None, None)],
)
def test_a_figure_is_met_at_most_at_its_reach(value, reach, met):
    """Equal is met; without a value or a reach there is no verdict."""
    assert Figure("x", value, "s", reach).met is met


def test_the_command_prints_and_writes(tmp_path, capsys):
    """`kdjax bench head --out FILE`: a line a figure, and JSON with sizes and versions; an existing
    file is left alone."""
    out = tmp_path / "head.json"
    skip = ["--skip", "precision", "memory", "exact", "--repeats", "1"]
    skip += ["--tokens", "32", "--vocabulary", "97", "--chunk", "8"]
    assert main(["bench", "head", "--out", str(out), *skip]) == 0
    said = json.loads(out.read_text())
    assert [f["name"] for f in said["figures"]] == [
        line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]
    ]
    assert said["sizes"]["chunk"] == 8
    assert said["versions"]["jax"]
    assert main(["bench", "head", "--out", str(out), *skip]) == 74


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["bench"], "usage: kdjax bench head"),
        (["bench", "steps"], "unknown bench 'steps'; there are head, rollout"),
        (["bench", "head", "--repeat", "3"], "did you mean repeats?"),
        (["bench", "head", "--masked", "2"], "masked lie in"),
        (["bench", "verifier", "--problems", "0"], "every size must be at least 1"),
    ],
)
def test_mistakes_are_one_line(args, said, capsys):
    """A wrong bench or field is exit code 64 and one line."""
    assert main(args) == 64
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_verifier_s_figures():
    """Half of the ordinary responses are right, in every form; every figure is there."""
    always_right = {"integers": 0, "LaTeX": 16}  # a choice has no number to get wrong
    for kind, more in always_right.items():
        outcomes = [graded.outcome for graded in grade_boxed(ordinary(kind, 48, 4))]
        assert outcomes.count("correct") == 96 + more
        assert outcomes.count("wrong") == 96 - more
    sizes = VerifierBench(problems=6, samples=2, repeats=1, skip=("symbolic",))
    figures = {figure.name: figure for figure in bench_verifier(sizes)}
    assert all(f.value > 0 and f.reach != 0 for f in figures.values())
    assert sum(name.startswith("slowest") for name in figures) == 1
    assert figures["an answer, integers, 2 a problem"].reach == 20


def test_figures_go_to_a_file_in_order(tmp_path, capsys):
    """What a verdict says: met, NOT MET, or nothing."""
    lines = [Figure("a", 1.0, "s", 2.0), Figure("b", 3.0, "s", 2.0), Figure("c", None, "s")]
    show_figures(iter(lines), SMALL, tmp_path / "x.json")
    printed = capsys.readouterr().out.splitlines()[1:]
    assert ["NOT MET" in line for line in printed] == [False, True, False]
    assert "not measured" in printed[2]


def test_runs_are_timed_in_turn():
    """A first round that does not count, then each run once a round: a busy minute hits all."""
    calls = []
    runs = {
        "slow": lambda: calls.append("slow") or time.sleep(0.02),
        "fast": lambda: calls.append("fast"),
    }
    taken = medians(runs, 3)
    assert calls == ["slow", "fast"] * 4
    assert taken["slow"] >= 0.02 > taken["fast"] > 0


TINY = RolloutBench(batches=(2,), window=64, rows=8, limit=32, prompt=8, soak=8, repeats=1)


@pytest.fixture(scope="module")
def rollout_figures():
    """Every figure of the sampler's bench, of a model of one narrow layer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rollout_bench, "SMALL", DecoderConfig(96, 16, 32, 1, 2, 1, 8))
        return {figure.name: figure for figure in rollout_bench.bench_rollout(TINY)}


@pytest.mark.release
def test_the_sampler_s_figures(rollout_figures):
    """Ratios are of what they say; sampler and scorer agree; nothing is left behind."""
    found = {name: figure.value for name, figure in rollout_figures.items()}
    assert all(value is not None and value >= 0 for value in found.values())
    assert 0 < found["batch occupancy"] <= 1
    assert rollout_figures["soak: sampler - scorer, largest"].met
    assert rollout_figures["soak: memory grown in its second half"].met
    modelled = [figure for name, figure in rollout_figures.items() if "H100 model" in name]
    assert len(modelled) == 6
    assert [figure.met for figure in modelled] == [True] * 2 + [None] * 4


def test_a_bench_of_an_unknown_model():
    """One line with the models that are known."""
    with pytest.raises(ConfigError, match=r"unknown model 'x'.*Qwen"):
        next(rollout_bench.bench_rollout(RolloutBench(model="x")))


def test_the_scanned_baseline_decodes_what_the_model_does(student):
    """Greedy tokens under scan are those of `extend`: it is slower, not another model."""
    model, params = student[0], lively(student[1])
    decode, start = scanned_decode(model, params, 3, 24, 8)
    token = jnp.array([3, 50, 7], jnp.int32)
    tokens = decode((token, *start[1:]))[2]
    cache, apart, extend = model.init_cache(3, 24), unstacked(params), jax.jit(model.extend)
    for number in range(8):
        states, cache = extend(apart, token, cache, 15 + number, jnp.zeros(3, jnp.int32))
        token = project(states, model.head(params)).argmax(-1).astype(jnp.int32)
        np.testing.assert_array_equal(tokens[:, number], token)


def test_static_batches_draw_what_levels_do(student):
    """The same responses, in batches of three that wait for their last row."""
    model, params = student[0], lively(student[1])
    rng, rows = np.random.default_rng(0), 6
    prompts = rng.integers(0, 90, (rows, 5)).astype(np.int32)
    none = np.zeros((rows, 1), np.int32)
    batch = Batch(
        prompts, np.array([5, 3, 1, 4, 5, 2], np.int32), none, none[:, 0], none[:, 0] > 0,
        np.arange(rows, dtype=np.int32),
    )  # fmt: skip
    stops, key = tuple(range(90, 125)), jax.random.key(4)
    tokens, lengths = static_batches(model, unstacked(params), batch, key, 20, stops, 3)
    samples = generate(model, params, batch, key, max_new_tokens=20, stop_ids=stops)
    np.testing.assert_array_equal(tokens, samples.tokens_bt)
    np.testing.assert_array_equal(lengths, samples.length_b)
    assert len(set(lengths.tolist())) > 2
