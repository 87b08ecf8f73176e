"""Batches of problems, each a pure function of (seed, position): the cursor is one number."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.base import Batch, Problem
from kdjax.data.sources.load import Loaded, load_name, load_path
from kdjax.data.tasks import problem as task_problem
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError, DataError


class Source(NamedTuple):
    """A finite list of problems: size, problem(index), an identity that is equal for equal
    problems, and a text about its origin and what was left out."""

    size: int
    problem: Callable[[int], Problem]
    identity: str
    about: str = ""


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


def file_source(path: str | Path, columns: Sequence[str] = (), use: str = "train") -> Source:
    """Problems of a local file or folder (JSONL, CSV, Parquet, Arrow): columns prompt and answer;
    if it has them, solution and tag. `columns` ("field=column") gives other names. Of a folder of
    several splits, that of this use: "train" or "test".

    Errors: DataError when it is missing, unreadable, or nothing in it can be used.
    """
    return _source(load_path(path, columns, use))


def named_source(name: str, use: str, columns: Sequence[str] = ()) -> Source:
    """Problems of a dataset by its name (docs/data.md), of the split for `use`: "train" or "test".

    Errors: as `sources.load.load`.
    """
    return _source(load_name(name, columns, use))


def _source(loaded: Loaded) -> Source:
    note = f"; note: {loaded.note}" if loaded.note else ""
    return Source(loaded.size, loaded.problem, loaded.identity, loaded.about + note)


def index_at(size: int, position: int, seed: int, tag: str = "", batch_size: int = 1) -> int:
    """The index of the problem at a position of the stream of `size` problems: each epoch is a
    permutation by (seed, tag, epoch), in which no batch of `batch_size` <= size positions holds a
    problem twice, also where it begins in one epoch and ends in the next.

    >>> [index_at(3, position, 0, batch_size=2) for position in range(6)]
    [1, 2, 0, 1, 0, 2]
    """
    epoch, offset = divmod(position, size)
    return int(_epoch_order(size, seed, tag, epoch, batch_size)[offset])


def tags_of(source: Source, tags: Sequence[str]) -> np.ndarray:
    """Each problem's own tag, [size], whether or not it is one of these; all "" where these are
    the tag "" alone.

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
            f"{problem.id} has the tag {problem.tag!r}, and teachers have {names}; fix the column"
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


def batch_at(
    groups: Groups, number: int, size: int, seed: int, equal: bool = False
) -> tuple[str, list[int]]:
    """(tag, indices) of batch `number`: a pure function of its arguments, so a cursor is one
    number.

    Tags alternate in proportion to their problems: exactly, in every N / gcd of the counts batches;
    where they are to be `equal`, one after the other, whatever their problems are.
    The k-th batch of a tag has positions k size .. (k + 1) size - 1 of its own stream (`index_at`),
    and `size` different problems: a tag needs that many.

    >>> groups = {"a": np.arange(4), "b": np.arange(4, 6)}
    >>> [batch_at(groups, n, 2, seed=0)[0] for n in range(6)]
    ['a', 'b', 'a', 'a', 'b', 'a']
    """
    tags = list(groups)
    order = _tag_order(tuple(1 if equal else len(groups[tag]) for tag in tags))
    rounds, place = divmod(number, len(order))
    turn = order[place]
    earlier = rounds * np.sum(order == turn) + np.sum(order[:place] == turn)
    rows = groups[tags[turn]]
    positions = range(int(earlier) * size, (int(earlier) + 1) * size)
    stream = functools.partial(index_at, len(rows), seed=seed, tag=tags[turn], batch_size=size)
    return tags[turn], [int(rows[stream(position)]) for position in positions]


def rows_of_process(indices: Sequence[int], process: int, count: int) -> list[int]:
    """The share of a batch of process `process` of `count`: shares are equal, in order, without gap
    or overlap, so that together they are the batch whatever the count.

    Errors: ConfigError for a batch that can't be split so, or a process that is not one of them.

    >>> rows_of_process([7, 3, 9, 1], 1, 2)
    [9, 1]
    """
    if not 0 <= process < count:
        raise ConfigError(f"process must be in 0..{count - 1}, got {process}")
    if len(indices) % count:
        raise ConfigError(
            f"batch_size {len(indices)} can't be split among {count} processes; make it a multiple"
            f" of {count}"
        )
    share = len(indices) // count
    return list(indices[process * share : (process + 1) * share])


@functools.lru_cache(maxsize=8)
def _tag_order(counts: tuple[int, ...]) -> np.ndarray:
    """The tag's number at each place of a round: its k-th place of n is at (k + 1/2) / n."""
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

    Args:
        source: the problems.
        indices: B of them.
        tokenizer: the student's.
        max_prompt_tokens: width of the prompts; longer ones are refused.
        max_new_tokens: width of worked responses, each as the chat template has it behind the
            prompt, with one stop token, its last; longer ones are cut.

    Errors: DataError naming a problem whose prompt is empty or over the limit, or that has a token
    which student and teacher don't share.
    """
    encoded = list(
        zip(
            encode_prompts(source, indices, tokenizer),
            _encode_responses(source, indices, tokenizer),
            strict=True,
        )
    )
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


@functools.lru_cache(maxsize=8)  # it reads every problem
def with_solutions(source: Source) -> Source:
    """The problems that have a worked response, in order; the source itself where all do.

    Errors: DataError where none does.
    """
    kept = having(source, "solution")
    require_solutions(source, kept[:1] or [0])
    return chosen(source, kept, "a solution", "have a worked response, and are used")


def having(source: Source, field: str) -> list[int]:
    """The indices of the problems in which this field is not empty."""
    return [index for index in range(source.size) if getattr(source.problem(index), field)]


def chosen(source: Source, kept: Sequence[int], having: str, said: str) -> Source:
    """The problems at these indices, those `having` something; the source itself, where that is all
    of them. said: of them, in `about`."""
    if len(kept) == source.size:
        return source
    return Source(
        len(kept),
        lambda index: source.problem(kept[index]),
        f"{source.identity}, {len(kept)} with {having}",
        f"{source.about}; {len(kept)} of {source.size} {said}",
    )


def require_solutions(source: Source, indices: Sequence[int]) -> None:
    """Errors: DataError unless these problems have worked responses, for the dataset prefix."""
    for problem in map(source.problem, indices):
        if not problem.solution:
            raise DataError(
                f"{problem.id} has no worked response, which prefix dataset trains on:"
                " fill the column solution, or choose another prefix"
            )


@functools.lru_cache(maxsize=32)
def _epoch_order(size: int, seed: int, tag: str, epoch: int, batch: int) -> np.ndarray:
    """The problems of an epoch in order. Those that the batch across its beginning already has from
    the epoch before make room for the next ones that it has not, and follow behind them.

    What an epoch ends with is its permutation's own where two batches fit into an epoch; else it
    hangs on the epoch before, back to one that begins with a batch.
    """
    aligned = epoch - epoch % (batch // math.gcd(size, batch))
    first = max(aligned, epoch - 1) if size >= 2 * batch else aligned
    order = _permutation(size, seed, tag, first)
    for number in range(first + 1, epoch + 1):
        there = number * size % batch  # rows that the batch has from the epoch before
        before, order = order[size - there :], _permutation(size, seed, tag, number)
        fresh = np.flatnonzero(~np.isin(order, before))[: batch - there]
        order = np.concatenate([order[fresh], np.delete(order, fresh)])
    return order


def _permutation(size: int, seed: int, tag: str, epoch: int) -> np.ndarray:
    stream = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big") if tag else 0
    generator = np.random.Philox(key=seed + (stream << 64), counter=[0, 0, 0, epoch])
    return np.random.Generator(generator).permutation(size)


def encode_prompts(
    source: Source, indices: Sequence[int], tokenizer: Tokenizer
) -> list[tuple[int, ...]]:
    """Token ids of the rendered prompts of these problems; each is rendered once a process."""

    def encode(new: list[int]) -> list[list[int]]:
        return tokenizer.encode_prompts([source.problem(index).prompt for index in new])

    return _remembered(_known("prompts", source, tokenizer), indices, encode)


def _encode_responses(
    source: Source, indices: Sequence[int], tokenizer: Tokenizer
) -> list[tuple[int, ...]]:
    """Token ids of their worked responses; none where there is none."""

    def encode(new: list[int]) -> list[list[int]]:
        worked = [problem for problem in map(source.problem, new) if problem.solution]
        prompts, solutions = [p.prompt for p in worked], [p.solution or "" for p in worked]
        ids = iter(tokenizer.encode_responses(prompts, solutions) if worked else [])
        return [next(ids) if source.problem(index).solution else [] for index in new]

    return _remembered(_known("responses", source, tokenizer), indices, encode)


@functools.lru_cache(maxsize=16)
def _known(what: str, source: Source, tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """The ids that are known of a source's problems, by index."""
    return {}


MOST_KNOWN = 1 << 17


def _remembered(
    known: dict[int, tuple[int, ...]],
    indices: Sequence[int],
    encode: Callable[[list[int]], list[list[int]]],
) -> list[tuple[int, ...]]:
    """The ids at these indices: known ones, and those that are encoded now and become known."""
    found = {index: known[index] for index in indices if index in known}
    new = [index for index in dict.fromkeys(indices) if index not in found]
    fresh = dict(zip(new, map(tuple, encode(new) if new else []), strict=True))
    if len(known) + len(fresh) > MOST_KNOWN:
        known.clear()
    known.update(fresh)
    return [(fresh if index in fresh else found)[index] for index in indices]


def source_key(source: Source, tokenizer: Tokenizer, max_prompt_tokens: int) -> dict[str, Any]:
    """JSON values that are equal when the same prompts reach the model as the same ids."""
    return {
        "problems": source.identity,
        "tokenizer": tokenizer.fingerprint,
        "template": f"{tokenizer.render('?')!r} as {tokenizer.encode_prompt('?')}",
        "max_prompt_tokens": max_prompt_tokens,
    }
