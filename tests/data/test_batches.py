"""Problems -> batches: padding, stops and cuts by hand; a stream that is a function of position."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from kdjax.base import Problem
from kdjax.data.batches import (
    Source,
    _epoch_order,
    batch_at,
    encode_batch,
    file_source,
    index_at,
    require_solutions,
    rows_of_process,
    source_key,
    task_source,
    with_solutions,
)
from kdjax.data.tasks import problem
from kdjax.data.tokenizer import Wording, load_tokenizer
from kdjax.errors import ConfigError, DataError

ROWS = [
    {"prompt": "1+1=", "answer": "2", "solution": r"1+1=2;\boxed{2}"},
    {"prompt": 'say "a, b"', "answer": "1/2", "solution": r"\boxed{1/2}"},
    {"prompt": "中文\n二行", "answer": "x", "solution": r"\boxed{x}"},
]


def source_of(*problems: Problem) -> Source:
    return Source(len(problems), lambda index: problems[index], f"list:{problems}")


def write_rows(path, rows) -> None:
    """A dataset file as another program would write it."""
    import csv

    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_batch_by_hand(tokenizer):
    """Prompts and responses stand left, zeros right; a response ends with the first stop token."""
    source = source_of(
        Problem("p0", "1+1=", "2", r"\boxed{2}"), Problem("p1", "12+345=", "357", "12+345=357;")
    )
    batch = encode_batch(source, [1, 0], tokenizer, max_prompt_tokens=40, max_new_tokens=15)
    assert batch.prompt_bp.shape == (2, 40)
    assert batch.response_bt.shape == (2, 15)
    assert {x.dtype.name for x in jax.tree.leaves(batch)} == {"int32", "bool"}
    for row, index in enumerate([1, 0]):
        prompt = tokenizer.encode_prompt(source.problem(index).prompt)
        response = [*tokenizer.encode(source.problem(index).solution), tokenizer.stop_ids[0]]
        for ids, length, wanted in (
            (batch.prompt_bp[row], batch.prompt_length_b[row], prompt),
            (batch.response_bt[row], batch.response_length_b[row], response),
        ):
            assert length == len(wanted)
            assert ids[:length].tolist() == wanted
            assert not ids[length:].any()
    assert batch.row_b.tolist() == [1, 0]
    assert batch.response_truncated_b.tolist() == [False, False]


def test_responses_are_cut_at_the_limit(tokenizer):
    """A response over the limit is cut and flagged; one that just fits, stop included, is not."""
    solution = "12+34=46;"
    source = source_of(Problem("p", "12+34=", "46", solution))
    whole = [*tokenizer.encode(solution), tokenizer.stop_ids[0]]
    for limit in (1, len(whole) - 1, len(whole), len(whole) + 1):
        batch = encode_batch(source, [0], tokenizer, max_prompt_tokens=40, max_new_tokens=limit)
        assert batch.response_length_b.tolist() == [min(limit, len(whole))]
        assert batch.response_truncated_b.tolist() == [limit < len(whole)]
        assert batch.response_bt[0, : len(whole)].tolist() == whole[:limit]


def test_problems_without_solutions(tokenizer):
    """No worked response means length 0, and the dataset prefix refuses the source by name."""
    source = source_of(Problem("p", "1+1=", "2"))
    batch = encode_batch(source, [0, 0], tokenizer, max_prompt_tokens=40, max_new_tokens=4)
    assert batch.response_length_b.tolist() == [0, 0]
    assert not batch.response_bt.any()
    with pytest.raises(DataError, match="p has no worked response"):
        require_solutions(source, [0])
    require_solutions(source_of(Problem("p", "1+1=", "2", "2")), [0])


def test_too_long_prompts_are_named(tokenizer):
    """A prompt of just the limit passes; one token more is a DataError that names the problem."""
    source = source_of(Problem("short", "1=", "1"), Problem("the/long/one", "1+2+3+4=", "10"))
    length = len(tokenizer.encode_prompt("1+2+3+4="))
    encode_batch(source, [0, 1], tokenizer, max_prompt_tokens=length, max_new_tokens=4)
    with pytest.raises(DataError) as caught:
        encode_batch(source, [0, 1], tokenizer, max_prompt_tokens=length - 1, max_new_tokens=4)
    assert f"the/long/one has {length} tokens; the limit is {length - 1}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_that_only_one_model_knows_are_named(tokenizer):
    """A prompt or a worked response with a token beyond those in use is refused by its name."""
    last = tokenizer.token(tokenizer.size - 1)
    fewer = tokenizer._replace(size=tokenizer.size - 1)
    source = source_of(Problem("a", "1", "1", last))
    encode_batch(source, [0], tokenizer, max_prompt_tokens=40, max_new_tokens=4)
    with pytest.raises(DataError, match=f"a holds token '{last}', which only one"):
        encode_batch(source, [0], fewer, max_prompt_tokens=40, max_new_tokens=4)


def test_epochs_are_different_permutations():
    """Each epoch shows every problem once; epochs and seeds order them differently."""
    source = task_source("calc", "train", 50, (2,))
    orders = {
        (seed, epoch): [index_at(source.size, 50 * epoch + i, seed) for i in range(50)]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6
    assert list(range(50)) not in orders.values()


@pytest.mark.parametrize(
    ("size", "batch"), [(640, 24), (100, 48), (7, 5), (5, 5), (6, 4), (9, 1), (10, 4), (37, 19)]
)
def test_no_batch_holds_a_problem_twice(size, batch):
    """Also across an epoch's end, where a second row of a problem would be drawn with the same key;
    each epoch is a permutation still, and the same when a resume asks for a late one first."""
    groups, count = {"": np.arange(size)}, 12 * size // batch
    drawn = {n: batch_at(groups, n, batch, seed=2)[1] for n in reversed(range(count))}
    assert [len(set(drawn[n])) for n in range(count)] == [batch] * count
    stream = [row for n in range(count) for row in drawn[n]]
    epochs = [stream[i : i + size] for i in range(0, 11 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 6 or len({tuple(epoch) for epoch in epochs}) == 11
    _epoch_order.cache_clear()
    assert [batch_at(groups, n, batch, seed=2)[1] for n in range(count)] == list(drawn.values())[
        ::-1
    ]


def test_the_stream_is_a_pure_function_of_seed_and_position():
    """Positions asked for in any order, or first after a resume, give the same problems."""
    source = task_source("calc", "train", 7, (2,))
    forwards = [index_at(source.size, position, 3) for position in range(40)]
    again = task_source("calc", "train", 7, (2,))
    shuffled = np.random.default_rng(0).permutation(40)
    assert [index_at(again.size, int(p), 3) for p in shuffled] == [forwards[p] for p in shuffled]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_processes_share_a_batch(count):
    """Whatever their number: equal shares that are, in order, the batch; a step asked for anew, as
    after a resume, gives the same shares."""
    groups = {"": np.arange(50)}
    for number in (0, 3, 4, 17):  # 4: across an epoch's end
        _, batch = batch_at(groups, number, 12, seed=5)
        shares = [rows_of_process(batch, process, count) for process in range(count)]
        assert {len(share) for share in shares} == {12 // count}
        together = [row for share in shares for row in share]
        assert together == batch == batch_at(groups, number, 12, seed=5)[1]


def test_processes_that_cannot_share_a_batch():
    """A batch that does not divide, and a process that is not among them."""
    with pytest.raises(
        ConfigError, match="batch_size 3 can't be split among 2 processes; make it a"
    ):
        rows_of_process([1, 2, 3], 0, 2)
    for process in (-1, 2):
        with pytest.raises(ConfigError, match=rf"process must be in 0..1, got {process}"):
            rows_of_process([1, 2], process, 2)


def test_problems_with_solutions():
    """Those with a worked response, in order; a source of only such is itself; of none, refused."""
    source = source_of(*(Problem(f"p{n}", "1", "1", "s" if n % 2 else None) for n in range(5)))
    solved = with_solutions(source)
    assert [solved.problem(i).id for i in range(solved.size)] == ["p1", "p3"]
    assert solved.identity != source.identity
    assert with_solutions(solved) is solved
    assert "2 of 5 have a worked response" in solved.about
    with pytest.raises(DataError, match="p has no worked response"):
        with_solutions(source_of(Problem("p", "1", "1")))


def test_task_source_is_the_task():
    """A task source is the task's first problems, and its identity tells other contents apart."""
    source = task_source("lastdigit", "heldout", 5, (3, 4))
    assert source.size == 5
    assert [source.problem(i) for i in range(5)] == [
        problem("lastdigit", "heldout", i, (3, 4)) for i in range(5)
    ]
    others = [
        task_source(*arguments).identity
        for arguments in (
            ("calc", "heldout", 5, (3, 4)), ("lastdigit", "test", 5, (3, 4)),
            ("lastdigit", "heldout", 6, (3, 4)), ("lastdigit", "heldout", 5, (3,)),
        )
    ]  # fmt: skip
    assert len({source.identity, *others}) == 5
    assert task_source("lastdigit", "heldout", 5, (3, 4)).identity == source.identity
    with pytest.raises(DataError, match="calc/train has no problems"):
        task_source("calc", "train", 0, (2,))


def test_a_worked_response_that_brings_its_stop_has_one(tokenizer, tmp_path):
    """Rows dumped from rendered chats end as all others do; a stop within is text."""
    rows = ["1+1=2;\\boxed{2}<|im_end|>\n", "1+1=2;\\boxed{2}", "1<|im_end|>2"]
    lines = [json.dumps({"prompt": "1+1=", "answer": "2", "solution": s}) for s in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    source, stop = file_source(tmp_path / "p.jsonl"), tokenizer.stop_ids[0]
    batch = encode_batch(source, [0, 1, 2], tokenizer, max_prompt_tokens=40, max_new_tokens=40)
    ids = [row[:n].tolist() for row, n in zip(*batch[2:4], strict=True)]
    assert ids[0] == ids[1] == [*tokenizer.encode(rows[1]), stop]
    assert [row.count(stop) for row in ids] == [1, 1, 1]
    assert tokenizer.decode(ids[2]) == rows[2]


def test_source_key_names_the_wording(tokenizer, tokenizer_folder):
    """Another template, system prompt or thinking switch: trajectories are not each other's."""
    source = task_source("calc", "train", 5, (3,))
    wordings = [
        Wording(),
        Wording("Q: {prompt}"),
        Wording(system_prompt="s"),
        Wording(thinking=True),
    ]
    keys = [source_key(source, load_tokenizer(tokenizer_folder, w), 24) for w in wordings]
    assert keys[0] == source_key(source, tokenizer, 24)
    assert len({str(key) for key in keys}) == 4


def test_source_key_names_what_reaches_the_model(tokenizer):
    """Other problems, another vocabulary, template or prompt limit: each gives another key."""
    source = task_source("calc", "train", 5, (3,))
    keys = [
        source_key(source, tokenizer, 24),
        source_key(task_source("calc", "train", 5, (4,)), tokenizer, 24),
        source_key(source, tokenizer._replace(fingerprint="another"), 24),
        source_key(source, tokenizer._replace(encode_prompts=lambda prompts: [[1]]), 24),
        source_key(source, tokenizer._replace(render=lambda prompt: prompt), 24),
        source_key(source, tokenizer, 25),
    ]
    assert len({str(key) for key in keys}) == 6
    assert source_key(task_source("calc", "train", 5, (3,)), tokenizer, 24) == keys[0]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_give_their_rows(tmp_path, suffix):
    """Each format gives the rows that were written, in order, and an identity by contents."""
    path = tmp_path / f"problems.{suffix}"
    write_rows(path, ROWS)
    source = file_source(path)
    assert source.size == 3
    assert [source.problem(i)._asdict() for i in range(3)] == [
        {"id": f"problems.{suffix}/{i}", **row, "tag": "", "teacher_prompt": None}
        for i, row in enumerate(ROWS)
    ]
    write_rows(tmp_path / f"copy.{suffix}", ROWS)
    write_rows(tmp_path / f"other.{suffix}", ROWS[:2])
    assert file_source(tmp_path / f"copy.{suffix}").identity == source.identity
    assert file_source(tmp_path / f"other.{suffix}").identity != source.identity


def test_the_solution_column_may_be_absent(tmp_path):
    """Without a solution column problems have no worked response, and numbers become text."""
    path = tmp_path / "plain.jsonl"
    write_rows(path, [{"prompt": 12, "answer": 7}])
    assert file_source(path).problem(0) == Problem("plain.jsonl/0", "12", "7", None)


def test_rows_without_an_answer_are_left_out_and_said(tmp_path):
    """A null is not the text None; a file of nothing else is refused."""
    path = tmp_path / "holes.jsonl"
    write_rows(path, [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": None}])
    source = file_source(path)
    assert [source.problem(i).id for i in range(source.size)] == ["holes.jsonl/0"]
    assert source.about == "holes.jsonl: 2 rows, 1 problems (left out: 1 without an answer)"
    write_rows(path, [{"prompt": "", "answer": "1"}, {"prompt": "2", "answer": " "}])
    with pytest.raises(DataError, match="no row can be used: 2 rows, 0 problems"):
        file_source(path)


def directory(path):
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("absent.jsonl", None, "give an existing .jsonl, .json, .csv, .parquet or .arrow file, or"),
        ("folder.jsonl", directory, "the folder holds no .jsonl, .json, .csv, .parquet or .arrow"),
        ("data.txt", "prompt,answer\n1,1\n", "give an existing .jsonl, .json, .csv, .parquet or"),
        ("empty.jsonl", "", "the dataset is empty"),
        ("empty.csv", "", "the dataset is empty"),
        ("empty.parquet", "", "the dataset is empty"),
        ("header.csv", "prompt,answer\n", "the dataset is empty"),
        (
            "columns.jsonl",
            '{"question": "1", "answer": "1"}\n',
            "no column prompt; it has question, answer (say",
        ),
        ("columns.csv", "a,b\n1,2\n", "no column prompt; it has a, b (say"),
        ("broken.jsonl", '{"prompt": "1", "answer": \n', "line 1: not JSON"),
        ("broken.parquet", "this is not parquet at all", "can't read it as parquet"),
        ("binary.csv", b"\xff\xfe\x00\x01\xff\n" * 3, "can't read it as csv"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:15] else "",
)
def test_files_that_cannot_be_used(tmp_path, name, contents, says):
    """A DataError of one line that names the file and what is wrong with it."""
    path = tmp_path / name
    if callable(contents):
        contents(path)
    elif contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(DataError) as caught:
        file_source(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
