"""Evaluation: a benchmark -> an EvalReport: drawn, graded, scored; error bars over problems."""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.base import Batch, Key, Rollout, Samples, Sampling, Scores
from kdjax.data import batches
from kdjax.data.tokenizer import Tokenizer, pieces
from kdjax.errors import ConfigError
from kdjax.grading.answers import Grader, Outcome
from kdjax.grading.eval_report import QUANTILES, EvalReport
from kdjax.grading.intervals import interval, over_problems
from kdjax.grading.passk import majority_by_problem, pass_by_problem
from kdjax.rollouts.prefix import assemble_samples
from kdjax.runtime import processes

Chunk = dict[str, Any]
"""The results of some rows, as JSON values: sums over their tokens (and seconds), and records."""
Keep = Callable[[int, Callable[[], Chunk]], Chunk]


def evaluate(
    draw: Callable[[Batch, Key, int], Samples],
    scorer: Callable[[Rollout, Sequence[int]], Scores],
    source: batches.Source,
    tokenizer: Tokenizer,
    key: Key,
    *,
    grader: tuple[str, Grader],
    samples: int,
    k: tuple[int, ...],
    sampling: Sampling,
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    chunk_rows: int,
    seed: int,
    keep: Keep = lambda number, make: make(),
) -> tuple[EvalReport, list[dict[str, Any]]]:
    """(the report, one record a sample: problem, prompt, answer, response, outcome, tokens; a few
    have their `pieces` too).

    Sample j of problem i is row i * samples + j: results depend on no size and no order.

    Args:
        draw: (batch, key, max_new_tokens) -> Samples of the model.
        scorer: (rollout, the problem number of each row) -> Scores.
        source, tokenizer, key: the problems, the model's tokenizer, the draw's key.
        grader: its name, and the grader.
        samples, k: samples drawn of a problem; the k of pass@k and majority@k.
        sampling, seed: those of `draw` and `key`, for the report.
        max_new_tokens, max_prompt_tokens: limits of a response and a prompt.
        batch_size, chunk_rows: rows scored and rows drawn at a time, by all processes together.
        keep: (number, make) -> a chunk: a stored one, or make()'s.

    Errors: ConfigError when a k is over the samples drawn.
    """
    if not k or max(k) > samples or min(k) < 1:
        raise ConfigError(
            f"evaluation k must lie in 1..{samples} (the samples drawn a problem), got {k}"
        )
    records: list[dict[str, Any]] = []
    sums: dict[str, float] = defaultdict(float)
    encoded = _encode_all(source, tokenizer, samples, max_prompt_tokens)

    def make(rows: np.ndarray) -> Chunk:
        began, count = time.perf_counter(), jax.process_count()
        own = rows[processes.share(len(rows))]
        asked = jax.tree.map(lambda x: x[own if len(own) else rows[:1]], encoded)
        drawn = draw(asked, key, max_new_tokens)
        made = _scored(
            scorer, source, tokenizer, grader[1], asked, drawn, samples,
            batch_size // count, len(own), -(-len(rows) // count),
        )  # fmt: skip
        made = _joined(processes.gather(made))
        made["sums"]["seconds"] = time.perf_counter() - began
        return made

    for number, rows in enumerate(_batches(source.size * samples, chunk_rows)):
        chunk = keep(number, functools.partial(make, rows))
        for name, value in chunk["sums"].items():
            sums[name] += value
        records += chunk["records"]
    report = EvalReport(
        problems=source.size,
        samples=samples,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        source=source.identity,
        grader=grader[0],
        entropy=sums["student_entropy"] / sums["tokens"],
        forward_kl=sums["forward_kl"] / sums["tokens"] if "forward_kl" in sums else None,
        reverse_kl=sums["reverse_kl"] / sums["tokens"] if "reverse_kl" in sums else None,
        seconds=sums["seconds"],
        template=tokenizer.render("{prompt}"),
        **_estimates(records, samples, k, max_new_tokens),
    )
    return report, records


def progress(
    draw: Callable[[Batch, Key, int], Samples],
    source: batches.Source,
    tokenizer: Tokenizer,
    key: Key,
    *,
    samples: int,
    grader: Grader,
    max_new_tokens: int,
    max_prompt_tokens: int,
) -> dict[str, Any]:
    """The metrics of a student in training: test_avg, test_length (tokens), test_entropy (nats a
    token, exact, of the sampler), test_truncated, and test_correct, how many of each problem's
    test_samples responses are right.

    Args:
        draw, source, tokenizer, key, samples: as in `evaluate`.
        grader: of responses.
        max_new_tokens, max_prompt_tokens: limits of a response and a prompt.
    """
    asked = _encode_all(source, tokenizer, samples, max_prompt_tokens)
    rows = np.arange(source.size * samples)
    drawn = processes.draw_apart(
        lambda places: draw(jax.tree.map(lambda x: x[places], asked), key, max_new_tokens),
        len(rows),
    )
    found = _estimates(
        list(_records(source, tokenizer, grader, rows, samples, drawn)),
        samples,
        (1,),
        max_new_tokens,
    )
    means = {f"test_{name}": found[name].mean for name in ("avg", "length", "truncated")}
    return means | {
        "test_entropy": mean_entropy(drawn),
        "test_correct": found["correct"],
        "test_samples": samples,
    }


def _encode_all(source, tokenizer, samples: int, max_prompt_tokens: int) -> Batch:
    """Every problem `samples` times."""
    limits = dict(max_prompt_tokens=max_prompt_tokens, max_new_tokens=1)
    prompts = batches.encode_batch(source, range(source.size), tokenizer, **limits)
    encoded = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
    return encoded._replace(row_b=np.arange(source.size * samples, dtype=np.int32))


def _scored(
    scorer, source, tokenizer, grader: Grader, asked: Batch, drawn: Samples, samples: int,
    size: int, count: int, most: int,
) -> Chunk:  # fmt: skip
    """The chunk of this process's rows: graded, and scored `size` rows at a time.

    Args:
        scorer, source, tokenizer, samples: as in `evaluate`.
        grader: of responses.
        asked, drawn: the prompts and the responses.
        size: rows scored at a time.
        count: rows that are this process's; any others are padding.
        most: the most rows of any process. All score as many batches, padded with the last row.
    """
    records: list[dict[str, Any]] = []
    sums: dict[str, float] = defaultdict(float)
    for first in range(0, most, size):
        places = np.arange(first, first + size)
        batch, own = jax.tree.map(lambda x, p=places: x[np.minimum(p, len(x) - 1)], (asked, drawn))
        rows = np.asarray(asked.row_b)[first : min(first + size, count)]
        scores = scorer(assemble_samples(batch, own), (batch.row_b // samples).tolist())
        for name, value in _token_sums(scores, len(rows)).items():
            sums[name] += value
        counted = _records(source, tokenizer, grader, rows, samples, own)
        read = readings(tokenizer, rows, samples, source.size, own, scores)
        records += [a | b for a, b in zip(counted, read, strict=True)]
    return {"sums": dict(sums), "records": records}


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """The chunks of several processes as one, in order."""
    names = chunks[0]["sums"]
    return {
        "sums": {name: sum(chunk["sums"][name] for chunk in chunks) for name in names},
        "records": [record for chunk in chunks for record in chunk["records"]],
    }


def _token_sums(scores: Scores, rows: int) -> dict[str, float]:
    """Sums over the real rows' response tokens, in float64."""
    mask = np.asarray(scores.mask) & (np.arange(len(scores.mask)) < rows)[:, None]
    sums = {"tokens": float(mask.sum())}
    for name in ("student_entropy", "forward_kl", "reverse_kl"):
        value = getattr(scores, name)
        if value is not None:
            sums[name] = float(np.where(mask, np.asarray(value), 0.0).sum(dtype=np.float64))
    return sums


def _estimates(
    records: list[dict[str, Any]], samples: int, k: tuple[int, ...], limit: int
) -> dict[str, Any]:
    """The counted fields of a report, from records in (problem, sample) order of responses of at
    most `limit` tokens."""

    def a_problem(name: str) -> np.ndarray:
        return np.array([r[name] for r in records], float).reshape(-1, samples)

    def counts(name: str) -> list[int]:
        return [int(c) for c in a_problem(name).sum(axis=1)]

    correct = counts("correct")
    values = {"avg": np.array(correct) / samples}
    values |= {f"pass_at_{n}": pass_by_problem(correct, samples, n) for n in k}
    majorities = _majorities(records, samples, k)
    values |= majorities
    rates = {"length": "tokens", "truncated": "truncated", "no_answer": "no_answer"}
    rates["not_scored"] = "not_scored"
    values |= {name: a_problem(source).mean(axis=1) for name, source in rates.items()}
    means = {name: over_problems(of_problems) for name, of_problems in values.items()}
    return {
        **{name: means[name] for name in ("avg", *rates)},
        "pass_at": {n: means[f"pass_at_{n}"] for n in k},
        "majority_at": {n: means[f"majority_at_{n}"] for n in k} if majorities else None,
        "length_quantiles": _quantiles([r["tokens"] for r in records]),
        "intervals": {
            name: interval(v[None], (0, limit if name == "length" else 1))
            for name, v in values.items()
            if len(v) > 1
        },
        "not_scored_reasons": dict(Counter(r["reason"] for r in records if r["not_scored"])),
        "correct": correct,
        "tokens": counts("tokens"),
        "cut": counts("truncated"),
    }


def _majorities(
    records: list[dict[str, Any]], samples: int, k: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Majority@k of each problem for every k; {} where the verifier returns no answers."""
    if any(r["answer"] is None and not r["no_answer"] for r in records):
        return {}
    problems = [records[at : at + samples] for at in range(0, len(records), samples)]
    answers = [[r["answer"] for r in own] for own in problems]
    correct = [[r["correct"] for r in own] for own in problems]
    return {f"majority_at_{n}": majority_by_problem(answers, correct, n) for n in k}


def _quantiles(lengths: list[int]) -> dict[int, int]:
    return {q: int(np.percentile(lengths, q, method="inverted_cdf")) for q in QUANTILES}


def all_responses(samples: Samples) -> np.ndarray:
    """Every row, [B]."""
    return np.ones(len(samples.length_b), bool)


def finished_responses(samples: Samples) -> np.ndarray:
    """The rows that ended with a stop token before the length limit, [B]."""
    return ~np.asarray(samples.truncated_b)


def mean_entropy(
    samples: Samples, responses: Callable[[Samples], np.ndarray] = all_responses
) -> float:
    """Mean predictive entropy a token over these responses, in nats; NaN if they have no token."""
    counted = responses(samples)
    tokens = int(np.asarray(samples.length_b)[counted].sum())
    total = float(np.asarray(samples.entropy_bt)[counted].sum(dtype=np.float64))
    # an entropy of 0 may come out a rounding below it, where a threshold of 0 stands
    return max(total, 0.0) / tokens if tokens else float("nan")


def _batches(total: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, total, size):
        yield np.arange(first, min(total, first + size))


def _records(
    source, tokenizer, grader: Grader, rows, samples: int, drawn: Samples
) -> Iterator[dict[str, Any]]:
    """The graded record of each row; arguments as in `readings`, with a grader of responses."""
    problems = [source.problem(int(row) // samples) for row in rows]
    responses = [
        tokenizer.decode(drawn.tokens_bt[position, : int(drawn.length_b[position])].tolist())
        for position in range(len(rows))
    ]
    pairs = [
        (tokenizer.graded_text(response), problem.answer)
        for response, problem in zip(responses, problems, strict=True)
    ]
    for position, graded in enumerate(grader(pairs)):
        problem = problems[position]
        yield {
            "problem": problem.id,
            "sample": int(rows[position]) % samples,
            "prompt": problem.prompt,
            "gold": problem.answer,
            "response": responses[position],
            "answer": graded.answer,
            "outcome": graded.outcome.value,
            "reason": graded.reason,
            "correct": graded.outcome is Outcome.CORRECT,
            "no_answer": graded.outcome is Outcome.NO_ANSWER,
            "not_scored": graded.outcome is Outcome.NOT_SCORED,
            "truncated": bool(drawn.truncated_b[position]),
            "tokens": int(drawn.length_b[position]),
        }


SHOWN_PROBLEMS, SHOWN_TOKENS = 4, 300
"""Problems, spread over the set, whose first sample is stored token by token; tokens of it."""


def readings(
    tokenizer, rows, samples: int, problems: int, drawn: Samples, scores: Scores
) -> Iterator[dict[str, Any]]:
    """The fields that scoring adds to the records: the response's entropy and the tokens that it is
    the mean of (a masked stop token is none of them), and the pieces of shown samples.

    Args:
        tokenizer: the model's.
        rows: int [B], their numbers.
        samples: rows of a problem.
        problems: how many there are.
        drawn, scores: of the rows.
    """
    shown = {*range(0, problems, -(-problems // SHOWN_PROBLEMS))}
    entropies, scored = _mean_entropies(scores), np.asarray(scores.mask).sum(axis=1).tolist()
    for position, row in enumerate(rows):
        problem, sample = divmod(int(row), samples)
        found: dict[str, Any] = {"entropy": entropies[position], "scored_tokens": scored[position]}
        if sample == 0 and problem in shown:
            ids = drawn.tokens_bt[position, : int(drawn.length_b[position])].tolist()
            found["pieces"] = _pieces(tokenizer, ids, _log_ratios(scores, position))
        yield found


def _log_ratios(scores: Scores, position: int) -> list[float | None]:
    """log p(teacher) - log q(student) in nats of each token of a row; None without a teacher, or
    where the stop policy masks the token."""
    kept = np.asarray(scores.mask[position])
    if scores.teacher_logp is None:
        return [None] * len(kept)
    rows = (np.asarray(x[position], np.float64) for x in (scores.teacher_logp, scores.student_logp))
    ratios = np.subtract(*rows)
    return [float(ratio) if keep else None for ratio, keep in zip(ratios, kept, strict=True)]


def _pieces(tokenizer: Tokenizer, ids: list[int], log_ratios: list[float | None]) -> list[list]:
    """[text, log-ratio] of a response's first pieces (`kdjax.data.tokenizer.pieces`); that of
    several tokens is their sum, and None where one of them has none."""
    found, at = [], 0
    for text, tokens in pieces(tokenizer, ids[:SHOWN_TOKENS]):
        known = [ratio for ratio in log_ratios[at : at + tokens] if ratio is not None]
        found.append([text, round(sum(known), 3) if len(known) == tokens else None])
        at += tokens
    if len(ids) > SHOWN_TOKENS:
        found.append([f" ... and {len(ids) - SHOWN_TOKENS} tokens more", None])
    return found


def _mean_entropies(scores: Scores) -> list[float]:
    """The student's entropy of each row in nats a token; 0 for a response without a token."""
    mask = np.asarray(scores.mask)
    nats = np.where(mask, np.asarray(scores.student_entropy), 0.0).sum(axis=1, dtype=np.float64)
    return (nats / np.maximum(mask.sum(axis=1), 1)).tolist()
