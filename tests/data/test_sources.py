"""Datasets by name: files of each one's schema, made here, come out as problems; every trap."""

from __future__ import annotations

import dataclasses
import errno
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from kdjax.base import Problem
from kdjax.config import Config, Curriculum, Data, Evaluation
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.data.batches import file_source, named_source
from kdjax.data.sources.known import KNOWN
from kdjax.data.sources.load import _load, is_path, load, load_name, load_path
from kdjax.data.sources.survey import Counts
from kdjax.errors import ConfigError, DataError, StorageError
from kdjax.training.parts import problems as parts_problems

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of"
    " the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What a patched library answered is of no other test."""
    yield
    _load.cache_clear()


def parquet(path, rows):
    """A file as the hub holds it; its path as text."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def named(tmp_path, dataset, rows, use="train", where="rows.parquet"):
    """The problems of a known dataset, read from a file of its schema."""
    return load_name(f"{dataset}={parquet(tmp_path / where, rows)}", (), use)


def problems(loaded):
    return [loaded.problem(index) for index in range(loaded.size)]


def refusal(error, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        load_name(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_gsm8k(tmp_path):
    """Gold after the last ####, without separators; calculator marks go; the gold ends the worked
    text in a box."""
    answer = "He buys 3*4=<<3*4=12>>12.\nHe has 1,200+12=<<1200+12=1212>>1,212.\n#### 1,212"
    rows = [
        {"question": "How many?", "answer": answer},
        {"question": "How much?", "answer": "#### no\nIt is #### $ 7 "},
        {"question": "Unanswered?", "answer": "nobody knows"},
    ]
    found = named(tmp_path, "openai/gsm8k", rows, "test")
    assert problems(found) == [
        Problem(
            "openai/gsm8k:test/0",
            "How many?",
            "1212",
            "He buys 3*4=12.\nHe has 1,200+12=1,212.\n\\boxed{1212}",
        ),
        Problem("openai/gsm8k:test/1", "How much?", "7", "#### no\nIt is\n\\boxed{7}"),
    ]
    assert found.counts == Counts(rows=3, no_answer=1, worked=2)
    assert found.note == "3 rows, where 1319 were expected"


def test_math_500(tmp_path):
    """LaTeX answers stay as they are; the published solution is the worked response."""
    row = {
        "problem": "Convert.",
        "solution": r"So \boxed{\left( 3, \frac{\pi}{2} \right)}.",
        "answer": r"\left( 3, \frac{\pi}{2} \right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    found = named(tmp_path, "HuggingFaceH4/MATH-500", [row], "test")
    assert problems(found) == [
        Problem("HuggingFaceH4/MATH-500:test/0", "Convert.", row["answer"], row["solution"])
    ]
    assert found.counts == Counts(rows=1, worked=1)


@pytest.mark.parametrize(
    ("dataset", "row", "answer"),
    [
        ("HuggingFaceH4/aime_2024", {"problem": "p", "solution": "s", "answer": "073"}, "073"),
        ("Maxwell-Jia/AIME_2024", {"Problem": "p", "Solution": "s", "Answer": 73}, "73"),
        ("math-ai/aime24", {"id": 1, "problem": "p", "solution": r"\boxed{73}"}, "73"),
        ("math-ai/aime25", {"id": "1", "problem": "p", "answer": "73"}, "73"),
        ("math-ai/amc23", {"id": 0, "question": "p", "answer": "73", "url": "u"}, "73"),
        ("math-ai/amc23", {"question": "p", "problem": "p ", "answer": 73.0}, "73"),
        ("AI-MO/aimo-validation-amc", {"id": 0, "problem": "p", "answer": 73.0}, "73"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_contests(tmp_path, dataset, row, answer):
    """Capitals, boxes, floats and leading zeros: all are one prompt and one answer."""
    (problem,) = problems(named(tmp_path, dataset, [row], "test"))
    assert (problem.prompt, problem.answer) == ("p", answer)


def test_two_prompts_that_differ_are_refused_by_row(tmp_path):
    """AMC copies hold problem and question: where they differ, which is meant is not guessed."""
    rows = [{"question": "a", "problem": "a", "answer": 1.0}]
    rows.append({"question": "b", "problem": "c", "answer": 2.0})
    path = parquet(tmp_path / "amc.parquet", rows)
    message = refusal(DataError, f"math-ai/amc23={path}", (), "test")
    assert "math-ai/amc23:test/1: two columns differ: 'b', 'c'; fix that row" in message


def dapo(problem: str, answer: str, index: str = "0"):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": problem, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def test_dapo(tmp_path):
    """Repeated rows count once, whatever their index; the built-in instruction is taken off; an
    answer that contradicts an earlier one is counted."""
    rows = [dapo(f"{BEFORE}What is {n}+1?{AFTER}", str(n + 1), str(n)) for n in range(3)] * 100
    rows += [dapo(f"{BEFORE}What is  2+1?{AFTER}", "4"), dapo(f"{BEFORE}Empty?{AFTER}", " ")] * 2
    found = named(tmp_path, "BytedTsinghua-SIA/DAPO-Math-17k", rows)
    assert [(p.prompt, p.answer, p.solution) for p in problems(found)] == [
        (f"What is {n}+1?", str(n + 1), None) for n in range(3)
    ]
    assert found.counts == Counts(rows=304, duplicates=299, conflicting=2, no_answer=2)
    assert "304 rows, 3 problems (left out: 2 without an answer, 299 dup" in found.about
    kept = load_path(
        tmp_path / "rows.parquet", ("prompt=prompt", "answer=reward_model.ground_truth")
    )
    assert problems(kept)[0].prompt == rows[0]["prompt"][0]["content"]


def test_half_a_dapo_instruction_is_refused(tmp_path):
    """Where only one side stands, the wrapper is another one than is known."""
    path = parquet(tmp_path / "dapo.parquet", [dapo(f"{BEFORE}What is 1+1?", "2")])
    message = refusal(DataError, f"BytedTsinghua-SIA/DAPO-Math-17k={path}", (), "train")
    assert "/0: DAPO's instruction stands on one side of the problem only" in message


def test_deepscaler(tmp_path):
    """An empty solution is none."""
    rows = [
        {"problem": "a", "answer": "1", "solution": ""},
        {"problem": "b", "answer": "2", "solution": r"\boxed{2}"},
    ]
    found = named(tmp_path, "agentica-org/DeepScaleR-Preview-Dataset", rows)
    assert [p.solution for p in problems(found)] == [None, r"\boxed{2}"]


def open_r1(problem, kind="math-word-problem", **changes):
    row = {
        "problem": problem, "solution": "s", "answer": "2", "question_type": kind,
        "generations": ["first", "second", "third"],
        "is_reasoning_complete": [True, True, True],
        "correctness_math_verify": [False, False, True], "correctness_llama": None,
    }  # fmt: skip
    return row | changes


def test_open_r1_math(tmp_path):
    """Of several traces, the first that is complete and verified, by either check; proofs and
    multiple choice are left out; a row of none keeps its problem."""
    never = [False, False, False]
    rows = [
        open_r1("by rule"),
        open_r1("cut off", is_reasoning_complete=[True, True, False]),
        open_r1("by judge", correctness_math_verify=never, correctness_llama=[False, True, True]),
        open_r1("one", generations=["only"], is_reasoning_complete=[True],
                correctness_math_verify=[True]),
        open_r1("Prove it.", "proof"),
        open_r1("Choose.", "MCQ"),
    ]  # fmt: skip
    found = named(tmp_path, "open-r1/OpenR1-Math-220k", rows)
    assert [(p.prompt, p.solution) for p in problems(found)] == [
        ("by rule", "third"), ("cut off", None), ("by judge", "second"), ("one", "only"),
    ]  # fmt: skip
    assert found.counts == Counts(
        rows=6, left_out=2, several_traces=3, unverified_traces=1, worked=3
    )


def test_deepmath(tmp_path):
    """The first of three traces that ends with the answer."""
    wrong, right = r"so \boxed{3}", r"so \boxed{2.0}"
    names = ("r1_solution_1", "r1_solution_2", "r1_solution_3")
    rows = [
        {"question": f"q{n}", "final_answer": "2", "difficulty": 5.0, "topic": "t"}
        | dict(zip(names, traces, strict=True))
        for n, traces in enumerate([(wrong, right, right), (wrong, wrong, None)])
    ]
    found = named(tmp_path, "zwhe99/DeepMath-103K", rows)
    assert [p.solution for p in problems(found)] == [right, None]
    assert found.counts == Counts(rows=2, several_traces=2, unverified_traces=1, worked=1)
    assert "pinned" in found.note


def test_leaks_and_contradictions_are_counted(tmp_path):
    """A prompt that says its answer, a worked response that ends otherwise, an answer that can't be
    graded: counted, and used."""
    rows = [
        {"problem": r"Show that the answer is $\boxed{12}$.", "answer": "12", "solution": None},
        {"problem": "The answer is 120?", "answer": "12", "solution": r"\boxed{13}"},
        {"problem": "The answer is 12.5?", "answer": "12", "solution": r"\boxed{12}"},
        {"problem": "q", "answer": "x" * 600, "solution": None},
    ]
    found = named(tmp_path, "agentica-org/DeepScaleR-Preview-Dataset", rows)
    assert found.size == 4
    assert found.counts == Counts(rows=4, leaked=1, disagreeing=1, unverifiable=1, worked=2)


def test_answers_of_mixed_types(tmp_path):
    """Numbers and text are one kind of answer: text; what is neither is none."""
    path = tmp_path / "mixed.jsonl"
    answers = [27.0, "27", 0.5, None, True, "", [1], "x", 12345678901234567890]
    path.write_text(
        "".join(json.dumps({"prompt": f"p{n}", "answer": a}) + "\n" for n, a in enumerate(answers))
    )
    source = file_source(path)
    assert [source.problem(i).answer for i in range(source.size)] == [
        "27", "27", "0.5", "x", "12345678901234567890",
    ]  # fmt: skip
    assert "9 rows, 5 problems (left out: 4 without an answer)" in source.about


def test_chats_of_other_shapes(tmp_path):
    """Two user turns are refused by row; a chat without one, or of something else, is no prompt."""
    turn = {"role": "user", "content": "a"}
    for number, chat in enumerate(
        ([{"role": "system", "content": "s"}], ["a"], [{"role": "user"}])
    ):
        path = tmp_path / f"{number}.jsonl"
        rows = [{"prompt": [turn], "answer": 1}, {"prompt": chat, "answer": 1}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert load_path(path).counts == Counts(rows=2, no_prompt=1)
    path = parquet(tmp_path / "two.parquet", [{"prompt": [turn, turn], "answer": "1"}])
    with pytest.raises(DataError, match=r"two\.parquet/0: 2 user turns, and a prompt is one"):
        load_path(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "folder", "saved"])
def test_local_columns(tmp_path, kind):
    """A file of any kind, or a folder, with columns by name: of structs and chats too."""
    rows = [
        {"q": [{"role": "system", "content": "s"}, {"role": "user", "content": " 1+1=? "}],
         "gold": {"value": 2.0}, "work": r"\boxed{2}", "prompt": "no"},
        {"q": [{"role": "user", "content": "2+2=?"}], "gold": {"value": 4.0}, "work": "",
         "prompt": "no"},
    ]  # fmt: skip
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file:
            table = pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    elif kind == "folder":
        path.mkdir()
        parquet(path / "part-0.parquet", rows[:1])
        parquet(path / "part-1.parquet", rows[1:])
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        parquet(path, rows)
    found = file_source(path, ("prompt=q", "answer=gold.value", "solution=work"))
    assert [found.problem(i) for i in range(found.size)] == [
        Problem(f"rows.{kind}/0", " 1+1=? ", "2", r"\boxed{2}"),
        Problem(f"rows.{kind}/1", "2+2=?", "4", None),
    ]


def test_a_folder_s_split(tmp_path):
    """A folder as the hub lays it out gives the split that is asked for; so does a saved one."""
    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    for split, gold in {"train": 1, "test": 2}.items():
        rows = [{"question": split, "answer": f"a #### {gold}"}]
        parquet(folder / "main" / f"{split}-00000-of-00001.parquet", rows)
    for use in ("train", "test"):
        assert problems(load_name(f"openai/gsm8k={folder}", (), use))[0].prompt == use
    saved = tmp_path / "saved"
    rows = {use: [{"question": use, "answer": "a #### 1"}] for use in ("train", "test")}
    datasets.DatasetDict({use: datasets.Dataset.from_list(rows[use]) for use in rows}).save_to_disk(
        str(saved)
    )
    assert problems(load_name(f"openai/gsm8k={saved}", (), "test"))[0].prompt == "test"
    assert "no split extra; it has train, test" in refusal(
        DataError, f"openai/gsm8k:extra={saved}", (), "test"
    )


def test_a_slice_counts_problems(tmp_path):
    """[first:last] is of what is used, so two slices never share a problem that rows repeat."""
    rows = [{"question": f"q{n % 4}", "answer": f"#### {n % 4}"} for n in range(12)]
    path = parquet(tmp_path / "rows.parquet", rows)
    held, rest = (load_name(f"openai/gsm8k{cut}={path}", (), "train") for cut in ("[:1]", "[1:]"))
    assert [p.prompt for p in problems(held)] == ["q0"]
    assert [p.prompt for p in problems(rest)] == ["q1", "q2", "q3"]
    assert held.identity != rest.identity
    assert rest.about.endswith("[1:]")
    message = refusal(DataError, f"openai/gsm8k[9:]={path}", (), "train")
    assert "[9:]: that is none of its 4 problems" in message


def test_problems_are_a_function_of_the_contents(tmp_path):
    """Read twice, or from a copy, in another format: the same problems and identity; any changed
    field gives another identity."""
    rows = [{"prompt": f"p{n}", "answer": str(n), "solution": "s", "tag": "t"} for n in range(3)]
    one = file_source(parquet(tmp_path / "a.parquet", rows))
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = file_source(path)
    assert one.identity == other.identity
    assert [one.problem(i)[1:] for i in range(3)] == [other.problem(i)[1:] for i in (0, 1, 2)]
    identities = {one.identity}
    for field in rows[0]:
        changed = [dict(row) for row in rows]
        changed[2][field] += "!"
        identities.add(file_source(parquet(tmp_path / f"{field}.parquet", changed)).identity)
    assert len(identities) == 5


def test_a_file_s_rows_repeat_only_whole(tmp_path):
    """One's own file may show a prompt with several worked responses; equal rows count once."""
    rows = [{"prompt": "p", "answer": "1", "solution": s} for s in ("a", "b", "a")]
    source = file_source(parquet(tmp_path / "rows.parquet", rows))
    assert [source.problem(i).solution for i in range(source.size)] == ["a", "b"]


def test_a_changed_file_is_read_again(tmp_path):
    """What was read is kept only while the file is the same."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    assert file_source(path).problem(0).prompt == "a"
    path.write_text('{"prompt": "bb", "answer": "1"}\n')
    assert file_source(path).problem(0).prompt == "bb"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            ("prompt=question",),
            "no column answer; did you mean Answer_? it has question, Answer_ (say",
        ),
        (("prompt=qestion", "answer=Answer_"), "no column qestion; did you mean question? it has"),
        (("prompt=question", "answer=answer_"), "no column answer_; did you mean Answer_? it has"),
        (("prompt=question", "answer=Answer_", "solution=work"), "no column work; it has"),
        (("prompt=question", "answer=Answer_.gold"), "no column Answer_.gold; did you mean Ans"),
    ],
)
def test_a_missing_column_names_the_nearest(tmp_path, columns, says):
    """Which one is missing, the one most like it, and all that there are."""
    path = parquet(tmp_path / "rows.parquet", [{"question": "q", "Answer_": "1"}])
    with pytest.raises(DataError) as caught:
        file_source(path, columns)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_known_dataset_of_another_schema_is_refused(tmp_path):
    """A file that is not the dataset's is refused by the column it lacks."""
    path = parquet(tmp_path / "rows.parquet", [{"problem": "q", "Answer": "1"}])
    assert "no column Problem; did you mean problem?" in refusal(
        DataError, f"Maxwell-Jia/AIME_2024={path}", (), "test"
    )


def test_a_benchmark_without_answers(tmp_path):
    """Nothing that can be graded: one line with the counts."""
    path = parquet(tmp_path / "b.parquet", [{"problem": "q", "answer": None, "solution": "s"}] * 2)
    message = refusal(DataError, f"HuggingFaceH4/MATH-500={path}", (), "test")
    assert "no row can be used: 2 rows, 0 problems (left out: 2 without an answer)" in message


@pytest.mark.parametrize(
    ("name", "columns", "use", "says"),
    [
        ("HuggingFaceH4/MATH-500", (), "train", "has no train split; name the split to use it all"),
        ("zwhe99/DeepMath-103K", (), "test", "or take one of openai/gsm8k, HuggingFaceH4/MATH-500"),
        ("org/unknown", (), "train", "org/unknown is no dataset that kdjax knows (openai/gsm8k"),
        ("openai/gsm8k", ("prompt=a",), "train", "kdjax knows the columns of openai/gsm8k"),
        ("org/other", ("question=a",), "train", 'each is written "field=column" once, with the'),
        ("org/other", ("prompt=",), "train", "got 'prompt='"),
        ("org/other", ("prompt=a", "prompt=b"), "train", "got 'prompt=b'"),
        ("openai/gsm8k@v2=a.jsonl", (), "train", "a.jsonl is read as it is; leave out @v2"),
        ("gsm8k", (), "train", "'gsm8k' is no dataset's name; it is written ORG/DATASET[@REV"),
    ],
)
def test_names_that_cannot_be_used(name, columns, use, says):
    """One line: what is wrong with the name, and what to write."""
    assert says in refusal(ConfigError, name, columns, use)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", ["openai/gsm8k", "openai/gsm8k@abc123:test", "org/other:test"])
def test_without_the_hub_there_is_one_line(monkeypatch, tmp_path, name, online):
    """Offline by its setting, or with no host that answers: what was looked for, and how to go on
    with a file from elsewhere."""
    if online:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        error = ConnectionError("Couldn't reach\nthe Hub (LocalEntryNotFoundError)")
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(error))
    columns = ("prompt=a", "answer=b") if name.startswith("org") else ()
    message = refusal(DataError, name, columns, "test")
    dataset, revision = name.split(":")[0].split("@")[0], "abc123" if "@" in name else "main"
    assert f"{dataset}: looked on the hub for split test at revision {revision}: the hub is" in (
        message
    )
    assert "offline (HF_HUB_OFFLINE) or can't be reached" in message
    assert f"{dataset}=PATH, or --data.file PATH --data.columns prompt=... answer=..." in message


def test_the_hub_is_asked_for_what_is_written(monkeypatch):
    """Config, split and revision reach the library; a written revision replaces a pinned one."""
    asked = []

    def answer(*arguments, **options):
        asked.append((*arguments, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"Problem": "p", "Answer": 1, "question": "p",
                                            "answer": "#### 1"}])  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", answer)
    names = ("openai/gsm8k", "Maxwell-Jia/AIME_2024", "Maxwell-Jia/AIME_2024@v2:extra")
    said = [load_name(name, (), "test").about.rpartition(" ")[2] for name in names]
    pinned = KNOWN["Maxwell-Jia/AIME_2024"].revision
    assert said == ["main", pinned, "v2"]
    assert asked == [
        ("openai/gsm8k", "main", "test", None),
        ("Maxwell-Jia/AIME_2024", None, "train", pinned),
        ("Maxwell-Jia/AIME_2024", None, "extra", "v2"),
    ]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("Unknown split \"x\".\nShould be one of ['train']."), "Unknown split"),
        (FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "it is gated; accept"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, says):
    """Its reason, on the same line."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(error))
    assert says in refusal(DataError, f"openai/gsm8k@{says[:2]}", (), "test")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    """It is no fault of the data: 74, with the setting that moves it."""
    error = PermissionError(errno.EACCES, "Permission denied", "/somewhere")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(error))
    message = refusal(StorageError, "openai/gsm8k", (), "test")
    assert "set HF_HOME to a folder that can be written" in message


def test_a_local_file_needs_no_cache(monkeypatch, tmp_path):
    """What is read from a file is read by the library never."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    path = parquet(tmp_path / "a.parquet", [{"prompt": "q", "answer": "1"}])
    assert file_source(path).size == 1


def test_a_path_or_a_name(tmp_path, monkeypatch):
    """`data check` takes both: what exists or ends like a file is a path, and a name without the
    split that is asked for gives the one that it has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "folder").mkdir(parents=True)
    kinds = {"org/folder": True, "org/name": False, "a.jsonl": True, "org/name=a.jsonl": False}
    assert {text: is_path(text) for text in kinds} == kinds
    path = parquet(tmp_path / "m.parquet", [{"problem": "q", "answer": "1"}])
    assert load(f"HuggingFaceH4/MATH-500={path}", (), "train").size == 1
    assert named_source(f"HuggingFaceH4/MATH-500={path}", "test").problem(0).prompt == "q"


def test_a_config_s_problems(tmp_path):
    """Training, gate and evaluation each read what their fields name; where worked responses are
    trained on, problems without one are left out, and that is said."""
    rows = [
        {"question": f"q{n}", "answer": f"{'work ' if n % 2 else ''}#### {n}"} for n in range(6)
    ]
    gsm8k = parquet(tmp_path / "gsm8k.parquet", rows)
    test = parquet(tmp_path / "test.parquet", [{"q": "t", "answer": "1"}])
    config = Config(
        data=Data(name=f"openai/gsm8k[2:]={gsm8k}"),
        curriculum=Curriculum((8, 16), 0.1, heldout_name=f"openai/gsm8k[:2]={gsm8k}"),
        evaluation=Evaluation(file=test, columns=("prompt=q",)),
    )
    validate(config)
    trained, held, measured = (
        [source.problem(index).prompt for index in range(source.size)]
        for source in (
            parts_problems.training_source(config.data, timetable(config)),
            parts_problems.heldout_source(config.data, config.curriculum),
            parts_problems.test_source(config.data, config.evaluation),
        )
    )
    assert (trained, held, measured) == (["q2", "q3", "q4", "q5"], ["q0", "q1"], ["t"])
    worked = parts_problems.training_source(
        config.data, timetable(dataclasses.replace(config, prefix="dataset"))
    )
    assert [worked.problem(index).prompt for index in range(worked.size)] == ["q3", "q5"]
    assert "2 of 4 have a worked response, and are used" in worked.about


def test_every_known_dataset_says_where_it_is_used():
    """Each has a split for training or for testing, and a pinned one says why."""
    for name, mapping in KNOWN.items():
        assert mapping.train or mapping.test, name
        assert not mapping.revision or "pinned" in mapping.note, name
