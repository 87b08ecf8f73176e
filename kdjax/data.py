"""Problems -> batches. A batch is a pure function of (seed, position): the cursor is one number."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.base import Batch, ConfigError, DataError, Problem
from kdjax.tasks import problem as task_problem
from kdjax.tokenizer import Tokenizer


class Source(NamedTuple):
    """A finite list: size, problem(index), and a text that is equal for equal contents."""

    size: int
    problem: Callable[[int], Problem]
    identity: str


Groups = dict[str, np.ndarray]
"""Tag -> the indices of its problems, ascending."""


def task_source(task: str, split: str, size: int, terms: Sequence[int]) -> Source:
    """`size` problems of an embedded task.

    >>> task_source("calc", "train", 10, (3,)).problem(0).id
    'calc/train/0'
    """
    if size < 1:
        raise DataError(f"{task}/{split} has no problems; ask for at least one")
    return Source(
        size,
        functools.lru_cache(maxsize=None)(lambda index: task_problem(task, split, index, terms)),
        f"task:{task}/{split}/{size}/{tuple(terms)}/1",
    )


def file_source(path: str | Path) -> Source:
    """Problems of a local JSONL, CSV or Parquet file: columns prompt, answer; if it has them,
    solution and tag.

    Errors: DataError when the file is missing, unreadable, empty, or has no such columns.
    """
    import datasets

    path = Path(path)
    reader = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(
        path.suffix
    )
    if not path.is_file() or reader is None:
        raise DataError(f"{path}: give an existing .jsonl, .csv or .parquet file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the dataset is empty; it needs at least one row")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            reader, data_files=str(path), split="train", keep_in_memory=True
        )
    except Exception as error:  # the library raises many kinds; all mean an unreadable file
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path}: can't read it as {reader} ({reason})") from error
    if len(rows) == 0:
        raise DataError(f"{path}: the dataset is empty; it needs at least one row")
    missing = {"prompt", "answer"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(sorted(missing))}; it has {rows.column_names}"
        )

    def problem(index: int) -> Problem:
        row = rows[index]
        if row["prompt"] is None or row["answer"] is None:
            raise DataError(f"{path}/{index}: a row needs a prompt and an answer, one is empty")
        solution = row.get("solution")
        return Problem(
            f"{path.name}/{index}",
            str(row["prompt"]),
            str(row["answer"]),
            solution and str(solution),
            "" if row.get("tag") is None else str(row["tag"]),
        )

    return Source(len(rows), problem, "file:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def index_at(size: int, position: int, seed: int, tag: str = "") -> int:
    """Which of `size` problems stands at a position of their stream: each epoch is a permutation by
    (seed, tag, epoch)."""
    epoch, offset = divmod(position, size)
    return int(_permutation(size, seed, tag, epoch)[offset])


def tags_of(source: Source, tags: Sequence[str]) -> np.ndarray:
    """Which of these tags each problem belongs to, [size]: its own, be it among them or not. The
    tag "" alone is everybody's.

    >>> tags_of(task_source("calc", "train", 2, (3,)), [""]).tolist()
    ['', '']
    """
    if list(tags) == [""]:
        return np.full(source.size, "")
    return np.array([source.problem(index).tag for index in range(source.size)])


def group_by_tag(source: Source, tags: Sequence[str]) -> Groups:
    """Tag -> the indices of its problems, in order; one group of all problems for the tag "" alone.

    Errors: DataError for a problem whose tag is not among them, ConfigError for a tag that no
    problem has.
    """
    names, found = list(tags), tags_of(source, tags)
    foreign = np.flatnonzero(~np.isin(found, names))
    if len(foreign):
        problem = source.problem(int(foreign[0]))
        raise DataError(
            f"{problem.id} has the tag {problem.tag!r}, and teachers have {names}; mend the column"
            " tag, or add to teachers"
        )
    groups = {name: np.flatnonzero(found == name) for name in names}
    for name, rows in groups.items():
        if not len(rows):
            raise ConfigError(
                f"teachers: no training problem has the tag {name!r}; take it out, or fill the"
                " column tag of data.file"
            )
    return groups


def batch_at(groups: Groups, number: int, size: int, seed: int) -> tuple[str, list[int]]:
    """(tag, indices) of batch `number`: a pure function of its arguments, so a cursor is one
    number.

    Tags take turns in proportion to their problems: exactly, in every N / gcd of the counts
    batches. The k-th batch of a tag holds places k size .. (k + 1) size - 1 of its own stream, each
    epoch of which is a permutation by (seed, tag, epoch).

    >>> groups = {"a": np.arange(4), "b": np.arange(4, 6)}
    >>> [batch_at(groups, n, 2, seed=0)[0] for n in range(6)]
    ['a', 'b', 'a', 'a', 'b', 'a']
    """
    tags = list(groups)
    order = _turns(tuple(len(groups[tag]) for tag in tags))
    rounds, place = divmod(number, len(order))
    turn = order[place]
    earlier = rounds * np.sum(order == turn) + np.sum(order[:place] == turn)
    rows = groups[tags[turn]]
    positions = range(int(earlier) * size, (int(earlier) + 1) * size)
    return tags[turn], [int(rows[index_at(len(rows), p, seed, tags[turn])]) for p in positions]


@functools.lru_cache(maxsize=8)
def _turns(counts: tuple[int, ...]) -> np.ndarray:
    """Whose turn it is at each place of a round: k-th turns of a tag of n lie at (k + 1/2) / n."""
    shares = [count // math.gcd(*counts) for count in counts]
    whose = np.repeat(np.arange(len(shares)), shares)
    when = np.concatenate([(np.arange(n) + 0.5) / n for n in shares])
    return whose[np.argsort(when, kind="stable")]


def encode_batch(
    source: Source,
    indices: Sequence[int],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> Batch:
    """The problems at `indices` as a Batch of host arrays, rows in that order.

    A worked response is its text and the first stop token, cut at max_new_tokens. Errors: DataError
    naming a problem whose prompt is empty or over the limit, or that holds a token which student
    and teacher don't share.
    """
    encoded = [
        (encode_prompt(source, i, tokenizer), _encode_response(source, i, tokenizer))
        for i in indices
    ]
    prompt = np.zeros((len(encoded), max_prompt_tokens), np.int32)
    response = np.zeros((len(encoded), max_new_tokens), np.int32)
    for row, (index, (prompt_ids, response_ids)) in enumerate(zip(indices, encoded, strict=True)):
        if not 0 < len(prompt_ids) <= max_prompt_tokens:
            raise DataError(
                f"the prompt of {source.problem(index).id} has {len(prompt_ids)} tokens;"
                f" the limit is {max_prompt_tokens} (data.max_prompt_tokens)"
            )
        foreign = [i for i in (*prompt_ids, *response_ids) if i >= tokenizer.size]
        if foreign:
            raise DataError(
                f"{source.problem(index).id} holds token {tokenizer.token(foreign[0])!r}, which"
                " only one of student and teacher knows; take it out of the problem"
            )
        prompt[row, : len(prompt_ids)] = prompt_ids
        response[row, : min(len(response_ids), max_new_tokens)] = response_ids[:max_new_tokens]
    return Batch(
        prompt_bp=prompt,
        prompt_length_b=np.array([len(p) for p, _ in encoded], np.int32),
        response_bt=response,
        response_length_b=np.array([min(len(r), max_new_tokens) for _, r in encoded], np.int32),
        response_truncated_b=np.array([len(r) > max_new_tokens for _, r in encoded]),
        row_b=np.asarray(indices, np.int32),
    )


def require_solutions(source: Source, indices: Sequence[int]) -> None:
    """Raise DataError unless these problems bring worked responses, for the dataset prefix."""
    for problem in map(source.problem, indices):
        if not problem.solution:
            raise DataError(
                f"{problem.id} has no worked response, which prefix dataset trains on:"
                " fill the column solution, or choose another prefix"
            )


@functools.lru_cache(maxsize=32)
def _permutation(size: int, seed: int, tag: str, epoch: int) -> np.ndarray:
    stream = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big") if tag else 0
    generator = np.random.Philox(key=seed + (stream << 64), counter=[0, 0, 0, epoch])
    return np.random.Generator(generator).permutation(size)


@functools.lru_cache(maxsize=1 << 17)
def encode_prompt(source: Source, index: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a problem's rendered prompt."""
    return tuple(tokenizer.encode_prompt(source.problem(index).prompt))


@functools.lru_cache(maxsize=1 << 17)
def _encode_response(source: Source, index: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    solution = source.problem(index).solution
    return (*tokenizer.encode(solution), tokenizer.stop_ids[0]) if solution else ()


def source_key(source: Source, tokenizer: Tokenizer, max_prompt_tokens: int) -> dict[str, Any]:
    """JSON values that are equal when the same prompts reach the model as the same ids."""
    return {
        "problems": source.identity,
        "tokenizer": tokenizer.fingerprint,
        "template": repr(tokenizer.render("?")),
        "max_prompt_tokens": max_prompt_tokens,
    }
