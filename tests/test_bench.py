"""kdjax bench: figures that are measured, with what they belong to."""

from __future__ import annotations

import json

import pytest

from kdjax.__main__ import main
from kdjax.base import ConfigError
from kdjax.bench import Figure, show_figures
from kdjax.bench.head import HeadBench, bench_head

SMALL = HeadBench(
    tokens=32, vocabulary=97, student_width=8, teacher_width=12, chunk=8, repeats=1,
    memory_tokens=2048, targets=("here",), skip=("precision",),
)  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return {figure.name: figure for figure in bench_head(SMALL)}


def test_the_head_is_exact(figures):
    """Every loss is within 1e-11 of dense autodiff in float64."""
    errors = [f for name, f in figures.items() if name.startswith("float64 error")]
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
    skip = ["--skip", "precision", "memory", "time"]
    assert main(["bench", "head", "--out", str(out), *skip]) == 0
    said = json.loads(out.read_text())
    assert [f["name"] for f in said["figures"]] == [
        line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]
    ]
    assert said["sizes"]["chunk"] == 256
    assert said["versions"]["jax"]
    assert main(["bench", "head", "--out", str(out), *skip]) == 74


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["bench"], "usage: kdjax bench head"),
        (["bench", "steps"], "unknown bench 'steps'; there is: head"),
        (["bench", "head", "--repeat", "3"], "did you mean repeats?"),
        (["bench", "head", "--masked", "2"], "masked lie in"),
    ],
)
def test_mistakes_are_one_line(args, said, capsys):
    """A wrong bench or field is exit code 64 and one line."""
    assert main(args) == 64
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_figures_go_to_a_file_in_order(tmp_path, capsys):
    """What a verdict says: met, NOT MET, or nothing."""
    lines = [Figure("a", 1.0, "s", 2.0), Figure("b", 3.0, "s", 2.0), Figure("c", None, "s")]
    show_figures(iter(lines), SMALL, tmp_path / "x.json")
    printed = capsys.readouterr().out.splitlines()[1:]
    assert ["NOT MET" in line for line in printed] == [False, True, False]
    assert "not measured" in printed[2]
