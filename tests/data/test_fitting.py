"""Prompts over the limit, and prompts of two purposes: counted before a run."""

from __future__ import annotations

import pytest

from kdjax.base import Problem
from kdjax.data.batches import Source, encode_prompts
from kdjax.data.fitting import about_shared, within, without_overlong
from kdjax.errors import DataError


def source_of(*prompts, name="list"):
    problems = [Problem(f"{name}/{n}", prompt, "1") for n, prompt in enumerate(prompts)]
    return Source(len(problems), problems.__getitem__, f"{name} {prompts}", f"{name}: all")


def test_prompts_at_the_limit_fit(tokenizer):
    """A prompt of as many tokens as the limit stays, one of more is refused or left out; which, how
    many, the longest and the remedy are said."""
    source = source_of("1+1=", "1" * 9, "2", "1" * 20)
    longest = [len(ids) for ids in encode_prompts(source, range(4), tokenizer)]
    assert longest[2] < longest[0] < longest[1] < longest[3]
    for keep in (within, lambda *a: without_overlong(*a[:3])):
        assert keep(source, tokenizer, longest[3], "test problems") is source
    with pytest.raises(DataError) as caught:
        within(source, tokenizer, longest[0], "test problems")
    assert str(caught.value) == (
        f"2 of 4 test problems have prompts over data.max_prompt_tokens {longest[0]}, such as"
        f" list/1; the longest has {longest[3]}: raise it, or set data.overlong_prompts leave_out"
    )
    short = without_overlong(source, tokenizer, longest[0])
    assert [short.problem(index).id for index in range(short.size)] == ["list/0", "list/2"]
    assert short.identity != source.identity
    assert short.about == (
        f"list: all; 2 of 4 left out: prompts over data.max_prompt_tokens {longest[0]}, the longest"
        f" {longest[3]}"
    )
    with pytest.raises(DataError, match=r"4 of 4 left out: prompts over .*; raise it"):
        without_overlong(source, tokenizer, 1)


def test_other_problems_within_the_limit_are_another_source(tokenizer):
    """As many of the same source, but others, as another tokenizer keeps: results of the two are of
    other problems, and are not compared by problem."""
    source, longer = source_of("1+1=", "1" * 9), {"1+1=": 9, "1" * 9: 4}
    other = tokenizer._replace(
        encode_prompts=lambda prompts: [[1] * longer[prompt] for prompt in prompts]
    )
    limit = len(tokenizer.encode_prompt("1+1="))
    kept = [without_overlong(source, tokenizer, limit), without_overlong(source, other, 4)]
    assert [one.problem(0).id for one in kept] == ["list/0", "list/1"]
    assert kept[0].identity.split(", ")[0] == kept[1].identity.split(", ")[0]
    same = [
        one.identity.replace(f"within {n}", "") for one, n in zip(kept, (limit, 4), strict=True)
    ]
    assert same[0] != same[1]


def test_prompts_of_two_purposes_are_counted():
    """The same but for case and space, of each two of three; tasks are not read."""
    found = {
        "trained on": source_of("a", "b", "c"),
        "held out": None,
        "tested on": source_of("B ", "c", "d", "e"),
    }
    (said,) = about_shared(found)
    assert said.startswith("warning: 2 of 4 prompts that are tested on are trained on too;")
    assert len(list(about_shared(found | {"held out": source_of("a", "d")}))) == 3
    assert list(about_shared(found | {"tested on": source_of("d")})) == []
    unread = found["trained on"]._replace(identity="task:calc", problem=None)
    assert list(about_shared(found | {"trained on": unread})) == []
