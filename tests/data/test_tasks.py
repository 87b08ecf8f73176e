"""The embedded tasks: deterministic, disjoint splits, right answers, right and varied solutions."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from release import by_default

from kdjax import models
from kdjax.data.tasks import TASKS, problem, recheck, split_of
from kdjax.data.tasks.worked import chain_text, solution_text
from kdjax.data.tokenizer import load_tokenizer
from kdjax.errors import ConfigError
from kdjax.grading.answers import extract_answer
from kdjax.grading.equivalence import is_equivalent

SPLITS = ("train", "heldout", "test")
every_task = pytest.mark.parametrize("task", sorted(TASKS))


def read_chain(text: str) -> tuple[int, list[tuple[str, int]]]:
    """(start, terms) of a chain such as -5+3x2."""
    start, rest = re.fullmatch(r"(-?\d+)((?:[-+x]\d+)*)", text).groups()
    return int(start), [(op, int(n)) for op, n in re.findall(r"([-+x])(\d+)", rest)]


def in_signs(prompt: str) -> str:
    """A chain of the tasks words and shown as calc asks it, by itself; others as they are."""
    prompt = prompt.split("\n")[-1]
    spoken = {"plus": "+", "minus": "-", "times": "x"}
    words = prompt.split(" ")
    return prompt if prompt.endswith("=") else "".join(spoken.get(w, w) for w in words) + "="


def calculate(task: str, text: str) -> list[int]:
    """Every value on the way through a chain, from left to right as on a pocket calculator."""
    start, terms = read_chain(text)
    values = [start]
    for operator, number in terms:
        if operator == "x":
            value = values[-1] * number
        else:
            value = values[-1] + (number if operator == "+" else -number)
        values.append(value % 97 if task == "lastdigit" else value)
    return values


def solution_lines(solution: str) -> list[str]:
    """The lines of a worked solution, without the boxed answer."""
    return re.split("[;,]", solution[: solution.index(r"\boxed")])[:-1]


@every_task
def test_deterministic_in_task_split_and_index(task):
    """A problem is a pure function of its name, in whatever order others are drawn."""
    forwards = [problem(task, "train", i, (2, 5, 9)) for i in range(40)]
    backwards = [problem(task, "train", i, (2, 5, 9)) for i in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert [p.id for p in forwards] == [f"{task}/train/{i}" for i in range(40)]
    assert len({p.prompt for p in forwards}) > 35


@every_task
def test_splits_do_not_overlap(task):
    """No prompt of a split is in another, over thousands of two-term prompts; split_of agrees."""
    prompts = {s: {problem(task, s, i, (2,)).prompt for i in range(1000)} for s in SPLITS}
    assert all(len(p) > 50 for p in prompts.values())
    for split in SPLITS:
        assert {split_of(task, p) for p in prompts[split]} == {split}
        for other in set(SPLITS) - {split}:
            assert not prompts[split] & prompts[other]


@every_task
def test_split_of_deals_eight_one_one_by_sha256(task):
    """The first 8 bytes of sha256(task:prompt) as a fraction: 0.8 train, 0.1 held out, 0.1 test."""
    prompts = [problem(task, split, i, (4,)).prompt for split in SPLITS for i in range(300)]
    for prompt in prompts:
        dealt = f"calc:{in_signs(prompt)}" if task in ("words", "shown") else f"{task}:{prompt}"
        digest = hashlib.sha256(dealt.encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        assert split_of(task, prompt) == SPLITS[(fraction >= 0.8) + (fraction >= 0.9)]


@every_task
def test_answers_are_right(task):
    """The gold answer is what an independent calculator finds; lastdigit reduces modulo 97."""
    for terms in (2, 3, 8, 32):
        for index in range(200):
            made = problem(task, "train", index, (terms,))
            signs = in_signs(made.prompt)
            assert len(read_chain(signs[:-1])[1]) == terms - 1
            assert signs.endswith("=")
            assert int(made.answer) == calculate(task, signs[:-1])[-1]
            assert made.teacher_prompt == (signs if task == "words" else None)


def test_chain_sums_are_sums():
    """A chainsum prompt is also right under ordinary precedence: it is a plain signed sum."""
    for index in range(200):
        made = problem("chainsum", "test", index, (2, 16))
        numbers = [int(n) for n in re.findall(r"[-+]?\d+", made.prompt)]
        assert int(made.answer) == sum(numbers)


@every_task
def test_solutions_are_arithmetic(task):
    """Every line is right and goes on from the last; together they spell the prompt."""
    for index in range(400):
        made = problem(task, "train", index, (2, 5, 12))
        signs = in_signs(made.prompt)[:-1]
        start, value, walked, previous = *[read_chain(signs)[0]] * 2, [], None
        for line in solution_lines(made.solution):
            if line.startswith("?"):
                assert line == "?" + previous
                continue
            chain, _, result = line.rpartition("=")
            assert calculate(task, chain)[-1] == int(result)
            assert read_chain(chain)[0] == value
            walked += read_chain(chain)[1]
            value, previous = int(result), line
        assert (start, walked) == read_chain(signs)
        assert value == int(made.answer)
        assert extract_answer(made.solution) == made.answer
        assert is_equivalent(extract_answer(made.solution), made.answer)


def test_one_problem_has_many_solutions():
    """Of 300 solutions of one chain over 60 are different, with merges and checks."""
    terms = [("+", 5), ("-", 2), ("x", 3), ("+", 4), ("-", 9), ("+", 1), ("x", 2), ("-", 6)]
    solutions = [solution_text(np.random.default_rng(i), 7, terms) for i in range(300)]
    lines = [line for s in solutions for line in solution_lines(s)]
    assert len(set(solutions)) > 60
    assert 0.06 < np.mean([line.startswith("?") for line in lines]) < 0.16
    merged = [line for line in lines if len(read_chain(line.lstrip("?").split("=")[0])[1]) == 2]
    assert 0.03 < len(merged) / len(lines) < 0.2
    assert not any("x" in line for line in merged)
    assert {extract_answer(s) for s in solutions} == {
        str(calculate("calc", "7+5-2x3+4-9+1x2-6")[-1])
    }
    assert chain_text(7, terms) == "7+5-2x3+4-9+1x2-6="


def test_recheck_has_its_modes_at_their_rates():
    """A solution checks none, 15 or 60 % of what it has written: a third of them each. Lines end
    both ways evenly, 30 % of neighbouring sums are merged, and of 300 solutions of one chain 280
    or more are different."""
    made = [problem("recheck", "train", i, (9,)) for i in range(900)]
    walks = [solution_lines(m.solution) for m in made]
    checks = np.sort([np.mean([line.startswith("?") for line in walk]) for walk in walks])
    assert checks[:300].max() == 0
    assert 0.08 < checks[300:600].mean() < 0.20
    assert 0.55 < checks[600:].mean() < 0.65
    ends = re.findall("[;,]", "".join(m.solution for m in made))
    assert 0.48 < ends.count(";") / len(ends) < 0.52
    merged = [
        len(read_chain(line.split("=")[0])[1]) == 2 for w in walks for line in w if line[0] != "?"
    ]
    assert 0.18 < np.mean(merged) < 0.28
    chain = [("+", 5), ("-", 2), ("x", 3), ("+", 4), ("-", 9), ("+", 1), ("x", 2), ("-", 6)]
    styles = {recheck.solution_text(np.random.default_rng(i), 7, chain) for i in range(300)}
    assert len(styles) >= 280


def test_recheck_responses_fit_the_study(tokenizer):
    """With its stop token a response has 33 to 76 tokens in the mean at 4 to 7 terms; the longest
    fifth is over 1.7 times as long as the shortest quarter, one in forty at most is over 160."""
    lengths = {
        terms: np.array([
            len(tokenizer.encode(problem("recheck", "train", i, (terms,)).solution)) + 1
            for i in range(200)
        ])
        for terms in range(4, 8)
    }  # fmt: skip
    means = [length.mean() for length in lengths.values()]
    assert means == sorted(means)
    assert 33 < means[0] < 43
    assert 62 < means[-1] < 76
    for length in lengths.values():
        assert np.percentile(length, 80) > 1.7 * np.percentile(length, 25)
    assert np.mean(np.concatenate(list(lengths.values())) > 160) < 0.025


@pytest.mark.parametrize("task", ["calc", "recheck"])
def test_calc_stays_in_two_digits(task):
    """Every value on the way through the chain is in 0..99, and all three operators occur."""
    chains = [problem(task, "train", i, (2, 9, 32)).prompt[:-1] for i in range(600)]
    assert all(0 <= value <= 99 for chain in chains for value in calculate(task, chain))
    assert {op for chain in chains for op, _ in read_chain(chain)[1]} == {"+", "-", "x"}


@every_task
def test_answer_space(task):
    """A blind guess is worth about 1 %: at least 97 different answers, none with over 8 %."""
    answers = [problem(task, "train", i, (4,)).answer for i in range(3000)]
    found, counts = np.unique(answers, return_counts=True)
    assert len(found) >= 97
    assert counts.max() / counts.sum() < 0.08


def test_response_length_grows_with_terms(tokenizer):
    """With its stop token a response has under 20 tokens at 2 terms and about 256 at 32."""
    means = [
        np.mean([
            len(tokenizer.encode(problem("calc", "train", i, (terms,)).solution)) + 1
            for i in range(60)
        ])
        for terms in (2, 4, 8, 16, 32)
    ]  # fmt: skip
    assert means == sorted(means)
    assert 8 < means[0] < 20
    assert 200 < means[-1] < 280


def test_terms_are_drawn_from_all_that_are_named():
    """Each number in `terms` occurs, evenly: each of three has 25 to 42 % of 900 problems."""
    counts = [
        1 + len(read_chain(problem("calc", "train", i, (2, 3, 7)).prompt[:-1])[1])
        for i in range(900)
    ]
    found, how_often = np.unique(counts, return_counts=True)
    assert found.tolist() == [2, 3, 7]
    assert all(0.25 < n / 900 < 0.42 for n in how_often)


@pytest.mark.parametrize(
    ("task", "split", "terms", "says"),
    [
        ("sum", "train", (2,), "unknown task 'sum'"),
        ("calc", "dev", (2,), "unknown split 'dev'"),
        ("calc", "train", (), "terms must be numbers from 2 to 32, got ()"),
        ("calc", "train", (1, 2), "terms must be numbers from 2 to 32, got (1, 2)"),
        ("calc", "train", (2, 33), "terms must be numbers from 2 to 32, got (2, 33)"),
    ],
)
def test_bad_arguments(task, split, terms, says):
    """A ConfigError of one line that names the argument and what it got."""
    with pytest.raises(ConfigError) as caught:
        problem(task, split, 0, terms)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "task", "end"),
    by_default(
        [
            ("teacher", "calc", "<|im_end|>"),
            ("student", "calc", "<|im_end|>"),
            ("study-teacher", "recheck", "<|im_end|>"),
            ("study-student", "recheck", "<|im_end|>"),
            ("study-student-endoftext", "recheck", "<|endoftext|>"),
        ],
        ("student", "calc", "<|im_end|>"),
        ("study-student-endoftext", "recheck", "<|endoftext|>"),
    ),
)
def test_shipped_models_know_their_task_and_their_end(name, task, end):
    """After a whole worked solution a model ends with its own stop token (probability 0.9), within
    it each token of the solution has 0.6 in the geometric mean, and its folder says that it stops
    there first; the one that ends as a base model does stops at nothing else."""
    folder = models.find(f"kdjax:{name}")
    tokenizer = load_tokenizer(folder)
    model, params = models.load(folder)
    assert tokenizer.token(tokenizer.stop_ids[0]) == end
    assert name != "study-student-endoftext" or len(tokenizer.stop_ids) == 1
    inside, at_end = [], []
    for index in range(8):
        made = problem(task, "heldout", index, (5,))
        prompt = tokenizer.encode_prompt(made.prompt)
        tokens = np.array([*prompt, *tokenizer.encode(made.solution), tokenizer.stop_ids[0]])
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(tokens)] = tokens
        hidden = np.asarray(model.hidden(params, padded), np.float64)[0, : len(tokens) - 1]
        logits = hidden @ np.asarray(model.head(params).weight_vd, np.float64).T
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = log_probs[np.arange(len(tokens) - 1), tokens[1:]][len(prompt) - 1 :]
        inside += own[:-1].tolist()
        at_end.append(np.exp(own[-1]))
    assert np.mean(at_end) > 0.9
    assert np.exp(np.mean(inside)) > 0.6


def test_three_of_four_solutions_are_shown():
    """The prompt is the question, behind its own solution in three of four; both ways within four
    standard errors of that."""
    made = [problem("shown", "train", index, (3, 4)) for index in range(800)]
    shown = [one for one in made if "\n" in one.prompt]
    assert all(one.prompt.startswith(f"{one.solution}\n") for one in shown)
    assert abs(len(shown) / 800 - 0.75) < 4 * (0.75 * 0.25 / 800) ** 0.5
