"""Two evaluations beside each other: paired by problem, refused where they were not made alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthetic import a_report

from kdjax.base import Sampling
from kdjax.errors import ConfigError, DataError
from kdjax.grading.intervals import interval
from kdjax.report.compare import compare, read_result, table
from kdjax.report.results import to_json

NAMES = ("one", "other")
COUNTED = dict(tokens=[8, 12, 20], cut=[0, 1, 4])


def test_a_result_less_itself_is_nothing():
    """0, from 0 to 0, in every metric."""
    result = a_report([0, 1, 3], **COUNTED)
    found = compare(result, result, NAMES)
    names = ["Avg@4", "Pass@1", "Pass@2", "Pass@4", "length", "truncated"]
    assert [d.name for d in found] == names
    assert all(d.difference == (0.0, 0.0, 0.0) for d in found)


def test_by_hand():
    """Means, differences and their intervals of three problems; the other way round, less them."""
    first, second = (
        a_report([0, 1, 3], **COUNTED),
        a_report([2, 2, 4], tokens=[4, 8, 0], cut=[0] * 3),
    )
    found = {d.name: d for d in compare(first, second, NAMES)}
    assert (found["Avg@4"].first, found["Avg@4"].second) == pytest.approx((1 / 3, 2 / 3))
    assert found["Avg@4"].difference == interval(np.array([[0.5, 0.25, 0.25]]))
    assert found["Pass@4"].difference.estimate == pytest.approx(1 / 3)
    assert found["length"].difference == interval(np.array([[-1.0, -1.0, -5.0]]))
    assert found["truncated"].difference.estimate == pytest.approx(-5 / 12)
    for d in compare(second, first, NAMES):
        assert d.difference.estimate == -found[d.name].difference.estimate
    header, lines = table(list(found.values()))
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][:3] == ["Avg@4", "33.3", "66.7"]


def test_pairing_is_by_problem():
    """A constant gain has no uncertainty, however different the problems are."""
    found = compare(a_report([0, 1, 3]), a_report([1, 2, 4]), NAMES)
    assert found[0].difference == (0.25, 0.25, 0.25)
    unpaired = compare(a_report([0, 1, 3]), a_report([4, 1, 2]), NAMES)
    assert unpaired[0].difference.low < unpaired[0].difference.high


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
