"""Whether problems fit a run: all prompts are measured, and looked for among those of its other
purposes, before it begins."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator

from kdjax.data.batches import Source, encode_prompts
from kdjax.data.sources.survey import normalised
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import DataError

LIMIT = "data.max_prompt_tokens"


def within(
    source: Source, tokenizer: Tokenizer, max_prompt_tokens: int, what: str, field: str = LIMIT
) -> Source:
    """The source itself, where no prompt has more tokens than the limit.

    what: names the problems in the error. field: the limit's. Errors: DataError that counts those
    over it.

    >>> from kdjax import load_tokenizer, models, task_source
    >>> source = task_source("calc", "test", 9, (3,))
    >>> within(source, load_tokenizer(models.find("kdjax:student")), 40, "problems") is source
    True
    """
    kept, longest, first = _measure(source, tokenizer, max_prompt_tokens)
    if len(kept) < source.size:
        raise DataError(
            f"{source.size - len(kept)} of {source.size} {what} have prompts over"
            f" {field} {max_prompt_tokens}, such as {source.problem(first).id}; the"
            f" longest has {longest}: raise it, or set data.overlong_prompts leave_out"
        )
    return source


@functools.lru_cache(maxsize=16)
def without_overlong(
    source: Source,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    read: Source | None = None,
    field: str = LIMIT,
) -> Source:
    """The problems whose prompts have no more tokens than the limit, in order; the source itself
    where all do.

    read: the same problems with the prompts that are measured, if these are not their own. field:
    the limit's. Errors: DataError where none does.
    """
    kept, longest, _ = _measure(read or source, tokenizer, max_prompt_tokens)
    if len(kept) == source.size:
        return source
    said = (
        f"{source.size - len(kept)} of {source.size} left out: prompts over {field}"
        f" {max_prompt_tokens}, the longest {longest}"
    )
    if not kept:
        raise DataError(f"{source.about or source.identity}; {said}; raise it")
    which = hashlib.sha256(repr(kept).encode()).hexdigest()[:16]  # other tokenizers keep others
    return Source(
        len(kept),
        lambda index: source.problem(kept[index]),
        f"{source.identity}, {len(kept)} within {max_prompt_tokens}: {which}",
        f"{source.about}; {said}".removeprefix("; "),
    )


@functools.lru_cache(maxsize=16)
def _measure(source: Source, tokenizer: Tokenizer, limit: int) -> tuple[list[int], int, int]:
    """(the problems within the limit, the longest prompt, the first problem that is over it)."""
    prompts = encode_prompts(source, range(source.size), tokenizer)
    lengths = [len(ids) for ids in prompts]
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    first = next((index for index, length in enumerate(lengths) if length > limit), 0)
    return kept, max(lengths), first


def about_shared(sources: dict[str, Source | None]) -> Iterator[str]:
    """A warning for each two of these sources, by what is done with them, that share prompts (but
    for case and space). Two embedded tasks have none by their making, and are not read."""
    found = {use: source for use, source in sources.items() if source is not None}
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        if first.identity.startswith("task:") or second.identity.startswith("task:"):
            continue
        shared = len(_prompts(first) & _prompts(second))
        if shared:
            yield (
                f"warning: {shared} of {len(_prompts(second))} prompts that are {other} are"
                f" {one} too; give them files or splits of their own"
            )


@functools.lru_cache(maxsize=4)
def _prompts(source: Source) -> frozenset[str]:
    return frozenset(normalised(source.problem(index).prompt) for index in range(source.size))
