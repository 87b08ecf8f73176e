"""`kdjax data check`: what a dataset holds, and what of it is in benchmarks too."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.__main__ import main
from kdjax.data.sources import show
from kdjax.data.sources.check import WORDS, Contamination, check, contamination, word_runs
from kdjax.data.sources.load import load_path
from kdjax.data.sources.show import table_rows

LONG = "If a train leaves at noon and goes 60 miles an hour, when is it 90 miles away?"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path, *texts):
    return load_path(write(path, [{"prompt": t, "answer": str(n)} for n, t in enumerate(texts)]))


def test_contamination_by_hand(tmp_path):
    """The same prompt but for case and space is exact; 13 words in a row are an overlap; 12 are
    not, nor is a short prompt inside another."""
    dataset = prompts(
        tmp_path / "train.jsonl",
        "if a TRAIN leaves at noon and goes 60 miles an hour, when is it 90  miles away?",
        "Ann asks: " + LONG.replace(",", " -") + " Explain.",
        "Bob asks: " + " ".join(LONG.split()[:12]),
        "What is 1+1? And more.",
        "what is 1+1?",
    )
    bench = prompts(tmp_path / "bench.jsonl", LONG, "What is 1+1?")
    other = prompts(tmp_path / "other.jsonl", "Nothing of it.")
    assert contamination(dataset, [("bench", bench), ("other", other)]) == (
        Contamination("bench", 2, 1, ("train.jsonl/0", "train.jsonl/4"), ("train.jsonl/1",)),
        Contamination("other", 0, 0, (), ()),
    )


around = st.lists(st.sampled_from("abcd"), max_size=3)


@settings(deadline=None, max_examples=300, database=None, derandomize=True)
@given(*[around] * 4, st.integers(WORDS - 3, WORDS + 2))
def test_word_runs_are_those_of_the_definition(before, after, ahead, behind, common):
    """Two texts share a run exactly where some 13 words of one stand in a row in the other."""
    core = [str(number) for number in range(common)]
    left, right = before + core + after, ahead + core + behind
    brute = any(
        left[i : i + WORDS] == right[j : j + WORDS]
        for i in range(len(left) - WORDS + 1)
        for j in range(len(right) - WORDS + 1)
    )
    shared = set(word_runs(" ".join(left))) & set(word_runs("-".join(right).upper()))
    assert bool(shared) == brute


@pytest.fixture
def files(tmp_path):
    """A training file of five rows, two of them in a benchmark's file."""
    rows = [
        {"question": LONG, "gold": 1.5, "work": r"\boxed{1.5}"},
        {"question": LONG, "gold": 1.5, "work": r"\boxed{1.5}"},
        {"question": "The answer is 7. Why?", "gold": "7", "work": r"\boxed{8}"},
        {"question": "Who?", "gold": None, "work": None},
        {"question": "So: " + LONG, "gold": "x" * 600, "work": None},
    ]
    bench = [{"problem": LONG, "answer": "1.5"}, {"problem": "Other?", "answer": "1"}]
    return write(tmp_path / "train.jsonl", rows), write(tmp_path / "bench.jsonl", bench)


def test_the_command(files, tmp_path, capsys, tokenizer_folder):
    """One table of every count, the rule, three problems as the student sees them; the same as
    JSON."""
    train, bench = files
    out = tmp_path / "check.json"
    arguments = [
        "data", "check", train, "--columns", "prompt=question", "answer=gold", "solution=work",
        "--against", f"HuggingFaceH4/MATH-500={bench}", "--out", str(out),
        "--student", str(tokenizer_folder), "--system_prompt", "You add.",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "train.jsonl: 5 rows, 3 problems (left out: 1 without an answer, 1 duplicates)" in said
    for line in (
        "rows read 5", "no usable answer 1", "duplicates 1", "prompt says the answer 1",
        "worked response ends with another answer 1", "the verifier could not grade 1",
        "MATH-500", "problems that are used 3", "13 words in a row",
    ):  # fmt: skip
        assert line in " ".join(said.split()), line
    assert r"prompt: '<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\nIf a train" in said
    assert "gold: '7'" in said
    assert "solution: none" in said
    written = json.loads(out.read_text())
    assert written["counts"]["duplicates"] == written["counts"]["leaked"] == 1
    (against,) = written["contamination"]["against"]
    assert (against["exact"], against["overlap"]) == (1, 1)
    assert written["prompt_tokens"]["longest"] >= written["prompt_tokens"]["median"] > 20
    assert len(written["examples"]) == written["problems"] == 3


def test_an_example_is_of_what_its_row_counts(tmp_path):
    """A row that counts none names none, and the other names its own."""
    dataset, bench = write(tmp_path / "a.jsonl", [{"prompt": "So: " + LONG, "answer": 1}]), LONG
    named = write(tmp_path / "b.jsonl", [{"problem": bench, "answer": 1}])
    rows = table_rows(check(dataset, (), [f"HuggingFaceH4/MATH-500={named}"], None))
    assert [count for text, count in rows if text.endswith("exact")] == [0]
    assert [count for text, count in rows if text.endswith("overlap, such as a.jsonl/0")] == [1]


def test_the_file_is_written_before_the_table(tmp_path, monkeypatch):
    """Whoever reads the table may stop reading: the program ends there, and the file is whole."""
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": 2}])

    def closed(report):
        raise BrokenPipeError

    monkeypatch.setattr(show, "show", closed)
    main(["data", "check", path, "--out", str(tmp_path / "check.json")])
    assert json.loads((tmp_path / "check.json").read_text())["problems"] == 1


def test_prompts_are_counted_in_tokens(tmp_path, tokenizer):
    """Median, 99th percentile and longest are those of the rendered prompts."""
    texts = ["1" * n for n in range(1, 12)]
    write(tmp_path / "t.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    found = check(str(tmp_path / "t.jsonl"), (), (), tokenizer)
    lengths = [len(tokenizer.encode_prompt(t)) for t in texts]
    assert found.prompt_tokens == (lengths[5], lengths[10], lengths[10])


def fails(capsys, code, *arguments):
    assert main([str(a) for a in arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("kdjax: ")
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_checked(files, tmp_path, capsys):
    """Nothing usable is 65, like a hub that can't be reached and a missing column; usage is 64."""
    train, bench = files
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "a", "answer": None}])
    assert "no row can be used" in fails(capsys, 65, "data", "check", empty)
    assert "can't be reached" in fails(capsys, 65, "data", "check", "openai/gsm8k")
    assert "no column prompt" in fails(capsys, 65, "data", "check", train)
    named = f"HuggingFaceH4/MATH-500={bench}"
    assert "can't be reached" in fails(
        capsys, 65, "data", "check", named, "--against", "math-ai/amc23"
    )
    assert "say its columns" in fails(capsys, 64, "data", "check", "org/unknown")
    assert "usage: kdjax data check NAME_OR_FILE" in fails(capsys, 64, "data")
    assert "there is check" in fails(capsys, 64, "data", "chekc", train)
    assert "unknown field agains" in fails(capsys, 64, "data", "check", train, "--agains", "x")
    assert "nothing was overwritten" in fails(capsys, 74, "data", "check", named, "--out", bench)
