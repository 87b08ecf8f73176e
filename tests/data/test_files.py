"""Files as they are written: texts, numbers, columns and limits, whatever stands beside them."""

from __future__ import annotations

import json
import os
from decimal import Decimal

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kdjax.data.batches import file_source
from kdjax.data.sources import files, mapping
from kdjax.errors import DataError


def written(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def answers(path, *columns):
    source = file_source(path, columns)
    return [source.problem(index).answer for index in range(source.size)]


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        file_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "number",
    [
        "9007199254740993",  # no float64
        "123456789012345678901234567890",  # over 64 bits
        "3.141592653589793238462643",
        "0.50",
        "-12",
        "9" * 5000,  # Python's int refuses the text
    ],
)
@pytest.mark.parametrize("beside", ["", "0.5", "5"])
def test_numbers_are_what_is_written(tmp_path, number, beside):
    """Beside a blank, a half or a whole number, in CSV and in JSON lines."""
    table = written(tmp_path, "n.csv", f"prompt,answer\nA,{number}\nB,{beside}\n")
    rows = f'{{"prompt": "A", "answer": {number}}}\n{{"prompt": "B", "answer": {beside or "null"}}}'
    wanted = [number, beside] if beside else [number]
    assert answers(table) == answers(written(tmp_path, "n.jsonl", rows)) == wanted


def test_numbers_of_json_are_written_out(tmp_path):
    """Whole ones without a point, none by an exponent, which the verifier would not read; what has
    no end is none."""
    numbers = ["27.0", "1e2", "5e-7", "1e999999999", "NaN", "Infinity"]
    rows = "".join(f'{{"prompt": "{n}", "answer": {n}}}\n' for n in numbers)
    assert answers(written(tmp_path, "n.jsonl", rows)) == ["27", "100", "0.0000005"]


def test_texts_of_csv_are_texts(tmp_path):
    """None, NA, null, nan, True, 007 and 27.0 are what they are; an empty cell is none."""
    cells = ["None", "NA", "null", "nan", "True", "007", "27.0"]
    rows = "".join(f"p{n},{cell}\n" for n, cell in enumerate([*cells, "", '""']))
    path = written(tmp_path, "t.csv", "\ufeffprompt,answer\n" + rows + "NA,5\n")
    assert answers(path) == [*cells, "5"]


def test_dates_are_texts(tmp_path):
    """As a prompt and as a gold, in each row of a file."""
    rows = [{"prompt": f"2024-01-0{n}", "answer": f"2024-01-0{n + 1}"} for n in (1, 2)]
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert answers(path) == ["2024-01-02", "2024-01-03"]


def test_decimals_and_bytes_of_parquet(tmp_path):
    """DECIMAL columns are exact, and binary ones their text; bytes of no text are named."""
    kind, path = pyarrow.decimal128(10, 2), tmp_path / "d.parquet"
    golds = pyarrow.array([Decimal("1.50"), Decimal("42.00"), None], kind)
    prompts = [b"a", "é".encode(), b"c"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, "answer": golds}), path)
    assert answers(path) == ["1.50", "42"]
    assert file_source(path).problem(1).prompt == "é"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [b"\xff"], "answer": ["1"]}), path)
    assert "d.parquet/0: 'utf-8' codec can't decode" in refusal(path)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_of_a_folder_may_differ(tmp_path, suffix, order):
    """One without solutions, one with; one with a number, one with text: whatever comes first."""
    tables = [[{"prompt": "a", "answer": 1}], [{"prompt": "b", "answer": "x^2", "solution": "s"}]]
    for name, rows in zip("12"[::order], tables, strict=True):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif suffix == "csv":
            path.write_text("\n".join(",".join(map(str, c)) for c in (rows[0], rows[0].values())))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = file_source(tmp_path)
    found = [source.problem(index) for index in range(2)][::order]
    assert [(p.answer, p.solution) for p in found] == [("1", None), ("x^2", "s")]


def test_a_column_s_type_may_change_late(tmp_path):
    """A text after ten megabytes of numbers, a solution after as many nulls."""
    first = json.dumps({"prompt": "x" * 500_000, "answer": 1, "solution": None}) + "\n"
    last = json.dumps({"prompt": "last", "answer": "x^2", "solution": "s"})
    source = file_source(written(tmp_path, "late.jsonl", first * 21 + last))
    assert source.problem(1)[2:4] == ("x^2", "s")


def test_a_file_replaced_under_its_old_time_is_read_anew(tmp_path):
    """Same size, same time of change, as archives and copies leave them; in this process and, since
    nothing is cached, in the next."""
    for prompt in "ab":
        path = written(tmp_path, "s.jsonl", f'{{"prompt": "{prompt}", "answer": "1"}}\n')
        os.utime(path, ns=(10**18, 10**18))
        assert file_source(path).problem(0).prompt == prompt


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_numbers_of_few_bits_are_as_they_are_written(tmp_path, kind):
    """0.1 of 32 bits is no 0.10000000149011612, of 16 no 0.0999755859375."""
    path, numbers = tmp_path / f"rows.{kind}", [0.1, 2.0, None, 0.7]
    table = pyarrow.table(
        {
            "prompt": ["a", "b", "c", "d"],
            "answer": pyarrow.array(numbers, pyarrow.float32()),
            "tag": pyarrow.array(np.array([0.1, 2, 3, 0.5], np.float16)),
        }
    )
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    assert answers(path) == ["0.1", "2", "0.7"]
    assert [file_source(path).problem(index).tag for index in range(3)] == ["0.1", "2", "0.5"]


def test_hidden_files_are_no_data(tmp_path):
    """An editor's copies in a folder of dots, and a system's file beside the data."""
    row = '{"prompt": "1+1=", "answer": "%s"}\n'
    written(tmp_path, ".ipynb_checkpoints/train-checkpoint.jsonl", row % 3)
    written(tmp_path, "._train.jsonl", "\0\5")
    written(tmp_path, "train.jsonl", row % 2)
    assert answers(tmp_path) == ["2"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("gsm8kTrain.jsonl", "gsm8kTest.jsonl"),
        ("train/0.jsonl", "test/0.jsonl"),
        ("training_set.jsonl", "testing_set.jsonl"),
        ("train.jsonl", "eval.jsonl"),
        ("train.jsonl", "evaluation_set.jsonl"),
    ],
)
def test_a_folder_of_splits_gives_that_of_the_use(tmp_path, train, test):
    """Train for data, test for evaluation, each with its split in the name of its problems; a split
    that is not there is asked for by those that are; names that say one split are read whole."""
    row = '{"prompt": "p", "answer": "%s"}\n'
    folder = tmp_path / "f"
    written(folder, train, row % 1)
    assert answers(folder) == ["1"]
    assert file_source(folder, use="test").size == 1
    written(folder, test, row % 2)
    for use, answer in (("train", "1"), ("test", "2")):
        problem = file_source(folder, use=use).problem(0)
        assert (problem.id, problem.answer) == (f"f:{use}/0", answer)
    (folder / test).rename(folder / "dev.jsonl")
    with pytest.raises(DataError, match="of split test; it has train, validation"):
        file_source(folder, use="test")


def test_a_file_beside_a_split_is_asked_for(tmp_path):
    """What heldout.jsonl beside train.jsonl is for is not known: it is not trained on."""
    row = '{"prompt": "p", "answer": "1"}\n'
    written(tmp_path, "train.jsonl", row)
    written(tmp_path, "heldout.jsonl", row)
    says = "train.jsonl says the split train, and heldout.jsonl none; give one file"
    for use in ("train", "test"):
        with pytest.raises(DataError, match=says):
            file_source(tmp_path, use=use)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"prompt": "\\ud800", "answer": "1"}\n', "/0: 'utf-8' codec can't encode"),
        ("a.jsonl", '{"prompt": "a", "answer": 1, "answer": 2}\n', "line 1: not JSON (a key sta"),
        ("a.json", '[{"prompt": "a", "answer": 1}, 2]', "row 2: a row must be a JSON object"),
        ("a.csv", 'prompt,answer\n"a,1\nb,2\n', "can't read it as csv (unexpected end of data)"),
        ("a.csv", "prompt,answer\na,1,2\n", "line 2: 3 cells, where the header has 2"),
        ("a.csv", "prompt,answer,answer\na,1,2\n", "the column answer stands twice"),
        ("a.jsonl", '{"prompt": "%s", "answer": 1}\n' % ("a" * 2**20), "line 1: a row of more tha"),
        ("a.json", '[{"prompt": "%s", "answer": 1}]' % ("a" * 2**20), "row 1: a row of more than"),
        ("a.csv", "prompt,answer\n%s,1\n" % ("a" * 2**21), "field larger than field limit"),
        ("a.csv", ",".join(map(str, range(2000))) + "\n", "2000 columns, and at most 1000 are"),
        ("a.jsonl", json.dumps(dict.fromkeys(map(str, range(2000)), 1)), "2000 columns, and at mo"),
        ("a.csv", ",".join(map(str, range(99))) + "\n", "16, 17, 18, 19 and 79 more (say which"),
    ],
)
def test_rows_that_are_refused(tmp_path, monkeypatch, name, text, says):
    """Damaged, ambiguous or endless rows: one line that says which, with limits made small."""
    monkeypatch.setattr(files, "MOST_ROW_BYTES", 2**20)
    monkeypatch.setattr(mapping, "MOST_COLUMNS", 1000)
    assert says in refusal(written(tmp_path, name, text))


def test_an_escaped_pair_is_one_character(tmp_path):
    """JSON writes characters beyond the first plane in two halves."""
    path = written(tmp_path, "e.jsonl", json.dumps({"prompt": "😀", "answer": "1"}))
    assert file_source(path).problem(0).prompt == "😀"
