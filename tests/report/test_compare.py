"""Two evaluations beside each other: paired by problem, refused where they were not made alike."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from synthetic import a_report

from kdjax.base import Sampling
from kdjax.errors import ConfigError, DataError
from kdjax.grading.intervals import interval
from kdjax.report.compare import compare, read_result, table
from kdjax.report.compare import to_json as to_json_of
from kdjax.report.results import Cell, Row, from_json, to_json
from kdjax.report.sections import sections
from kdjax.report.tables import at_temperatures
from kdjax.runtime import files

NAMES = ("one", "other")
COUNTED = dict(tokens=[8, 12, 20], cut=[0, 1, 4])


def test_a_result_less_itself_is_nothing():
    """0 in every metric, as far to one side as to the other: of three problems little is known."""
    result = a_report([0, 1, 3], **COUNTED)
    found = compare(result, result, NAMES)
    names = ["Avg@4", "Pass@1", "Pass@2", "Pass@4", "length", "truncated"]
    assert [d.name for d in found] == names
    for difference, low, high in (d.difference for d in found):
        assert difference == 0.0
        assert -low == high > 0


def test_by_hand():
    """Means, differences and their intervals of three problems; the other way round, less them."""
    first, second = (
        a_report([0, 1, 3], **COUNTED),
        a_report([2, 2, 4], tokens=[4, 8, 0], cut=[0] * 3),
    )
    found = {d.name: d for d in compare(first, second, NAMES)}
    assert (found["Avg@4"].first, found["Avg@4"].second) == pytest.approx((1 / 3, 2 / 3))
    assert found["Avg@4"].difference == interval(np.array([[0.5, 0.25, 0.25]]), (-1, 1))
    assert found["Pass@4"].difference.estimate == pytest.approx(1 / 3)
    assert found["length"].difference == interval(np.array([[-1.0, -1.0, -5.0]]), (-8, 8))
    assert found["truncated"].difference.estimate == pytest.approx(-5 / 12)
    for d in compare(second, first, NAMES):
        assert d.difference.estimate == -found[d.name].difference.estimate
    header, lines = table(list(found.values()))
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][:3] == ["Avg@4", "33.3", "66.7"]


def test_pairing_is_by_problem():
    """A constant gain is surer than one that is not, however different the problems are."""
    first, gains = [0, 1, 3] * 20, [1, 2, 4] * 20
    estimate, low, _ = compare(a_report(first), a_report(gains), NAMES)[0].difference
    assert estimate == 0.25
    assert low > 0.15
    unpaired = compare(a_report(first), a_report([4, 1, 2] * 20), NAMES)[0].difference
    assert unpaired.estimate == 0.25
    assert unpaired.low < 0.15


def test_one_problem_has_no_interval():
    """One problem: the difference alone."""
    found = compare(a_report([1]), a_report([2]), NAMES)
    assert found[0].difference.estimate == 0.25
    assert np.isnan(found[0].difference[1:]).all()
    assert table(found)[1][0] == ["Avg@4", "25.0", "50.0", "+25.0"]


def test_what_a_report_lacks_is_left_out():
    """Reports of older versions have no lengths by problem."""
    found = compare(a_report([0, 1, 3], **COUNTED), a_report([0, 1, 3]), NAMES)
    assert [d.name for d in found] == ["Avg@4", "Pass@1", "Pass@2", "Pass@4"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(source="t"), r"differ in source \(s and t\)"),
        (dict(samples=8), r"differ in samples \(4 and 8\)"),
        (dict(sampling=Sampling(0.5)), "differ in sampling"),
        (dict(max_new_tokens=9, grader="math"), r"max_new_tokens \(8 and 9\), grader \(exact and"),
        (dict(problems=2, correct=[1, 2]), r"differ in problems \(3 and 2\)"),
    ],
)
def test_other_settings_are_refused(changes, says):
    """What was not evaluated alike is named, with both values, on one line."""
    with pytest.raises(ConfigError, match=says) as error:
        compare(a_report([0, 1, 3]), a_report([0, 1, 3])._replace(**changes), NAMES)
    assert "\n" not in str(error.value)


def test_results_are_read_from_folders_and_files(tmp_path):
    """A run's folder, an evaluation's, a JSON file: one report."""
    result = a_report([0, 1, 3], **COUNTED)
    fields = json.loads(json.dumps(to_json(result)))
    (tmp_path / "evaluation.json").write_text(json.dumps({"key": {}, "report": fields}))
    (tmp_path / "r.json").write_text(json.dumps(fields))
    assert read_result(tmp_path) == read_result(tmp_path / "r.json") == result


def test_what_one_problem_does_not_know_is_null(tmp_path):
    """One problem's errors are null in JSON and not known when it is read again; a mean that is
    null is no evaluation."""
    result = a_report([1], tokens=[8], cut=[0])
    assert np.isnan(result.avg.standard_error)
    file = tmp_path / "one.json"
    files.write_json(file, to_json(result))
    assert '"standard_error": null' in file.read_text()
    found = read_result(file)
    assert found.avg.mean == 0.25
    assert np.isnan([found.avg.standard_error, found.pass_at[2].standard_error]).all()
    compared = to_json_of(compare(found, found, NAMES))
    files.write_json(tmp_path / "compared.json", compared)
    saved = json.loads((tmp_path / "compared.json").read_text(), parse_constant=pytest.fail)
    assert saved["Avg@4"]["low"] is None
    text = file.read_text().replace('"mean": 0.25', '"mean": null', 1)
    file.write_text(text)
    with pytest.raises(DataError, match="not all means are numbers"):
        read_result(file)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens": [8]}, "tokens has 1 of 2 problems"),
        ({"tokens": [8, None]}, "a number of tokens is not in 0..64"),
        ({"tokens": [8, 65]}, "a number of tokens is not in 0..64"),
        ({"cut": [0, 5]}, "a number of cut is not in 0..4"),
        ({"correct": [True, 1]}, "a number of correct is not in 0..4"),
        ({"correct": [], "problems": 0}, "it has no problems, samples or tokens"),
        ({"max_new_tokens": None}, "is no evaluation .TypeError"),
        ({"pass_at": {"5": {"mean": 0.5, "standard_error": 0.1}}}, "a k of Pass@k is not in 1..4"),
    ],
)
def test_numbers_that_no_evaluation_has(tmp_path, fields, says):
    """Of a file that was cut or edited: one line, not an error in the middle of the comparison."""
    whole = to_json(a_report([0, 3], tokens=[8, 64], cut=[0, 4])._replace(max_new_tokens=16))
    file = tmp_path / "r.json"
    for found, refused in ((whole, False), (whole | fields, True)):
        file.write_text(json.dumps(found))
        with pytest.raises(DataError, match=says) if refused else contextlib.nullcontext():
            read_result(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no evaluation .*; give a finished run"),
        ("{", "is damaged"),
        ("[]", "is no evaluation"),
        ('{"avg": 1}', "is no evaluation .*evaluate anew"),
        ("short", "correct has 2 of 3 problems"),
    ],
)
def test_no_result(tmp_path, text, says):
    """What is missing, damaged or something else is one line with the remedy."""
    file = tmp_path / "r.json"
    if text == "short":
        text = json.dumps(to_json(a_report([0, 1, 3])._replace(correct=[1, 2])))
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=says):
        read_result(file)


def test_reports_at_other_temperatures_are_kept_beside_it():
    """Written and read again; compared and listed by the report itself; without them nothing of
    them is written."""
    warm = a_report([2, 2, 4], sampling=Sampling(0.6), **COUNTED)
    result = a_report([0, 1, 3], also=(warm,), **COUNTED)
    assert "also" not in to_json(warm)
    assert from_json(json.loads(json.dumps(to_json(result)))) == result
    plain = result._replace(also=())
    assert compare(result, plain, NAMES) == compare(plain, plain, NAMES)
    assert sections([Cell("one", [Row("one", plain, [], [])])]) == [
        s for s in sections([Cell("one", [Row("one", result, [], [])])])
        if s.title != "Other temperatures"
    ]  # fmt: skip


def test_the_table_of_temperatures_by_hand():
    """A line a temperature, the report's own first; means and errors over problems and seeds;
    nothing of cells that have one temperature."""
    runs = [
        Row("r", a_report(own, also=(a_report(warm, sampling=Sampling(0.6), **COUNTED),),
                          tokens=[8, 12, 20], cut=[0, 0, 0]), [], [])
        for own, warm in (([0, 1, 3], [2, 2, 4]), ([0, 1, 1], [4, 2, 4]))
    ]  # fmt: skip
    alone = Cell("alone", [Row("alone", a_report([1, 1, 1], **COUNTED), [], [])])
    header, lines = at_temperatures([alone, Cell("two", runs)])
    assert header == ["run", "sampled at", "Avg@4", "Pass@4", "length", "truncated"]
    assert [line[:2] for line in lines] == [["two", "temperature 1.0"], ["two", "temperature 0.6"]]
    means = [[float(text.split(" ")[0]) for text in line[2:]] for line in lines]
    assert means == [[25.0, 66.7, 3.3, 0.0], [75.0, 100.0, 3.3, 41.7]]
    assert at_temperatures([alone])[1] == []
