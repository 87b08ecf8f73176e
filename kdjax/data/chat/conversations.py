"""Conversations to ids: the template's own text, encoded whole; what users wrote stays text.

A control token that a user's text spells stands between two marks of private use while its
conversation is rendered, which tell it from the template's own: those are read as such, and what
stands between them as text. A conversation that spells none is not marked, and its ids are those of
transformers' apply_chat_template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kdjax.data.chat import Conversation
from kdjax.errors import DataError

PRIVATE = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
"""Characters of private use."""


class Codec(NamedTuple):
    """How a tokenizer reads texts.

    - encode(texts) -> ids of each; control tokens are read as such.
    - plain(text) -> ids; control tokens are text.
    - control: finds the spellings of control tokens.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    plain: Callable[[str], list[int]]
    control: re.Pattern[str]


class Rendered(NamedTuple):
    """A text of a template, and the two marks around control tokens of users' texts ("": none)."""

    marked_text: str
    marks: str

    @property
    def text(self) -> str:
        return _bare(self.marked_text, self.marks)

    def after(self, start: str) -> Rendered | None:
        """What follows this start, or None where the text begins with another."""
        if not self.marked_text.startswith(start):
            return None
        return Rendered(self.marked_text[len(start) :], self.marks)


def free_marks(texts: Sequence[str]) -> str:
    """Two characters that stand in none of these texts. Errors: DataError."""
    used = {*"".join(texts)}
    free = [c for c in map(chr, PRIVATE[: len(used) + 2]) if c not in used][:2]
    if len(free) < 2:
        raise DataError("the prompts hold every character of private use; take some out")
    return "".join(free)


def spellings(control: Sequence[str]) -> re.Pattern[str]:
    """Finds each of these tokens in a text, a longer one before one that it holds.

    >>> spellings(["<s>", "<s>>"]).findall("a<s>>b<s>")
    ['<s>>', '<s>']
    """
    longest_first = sorted(filter(None, control), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def render_marked(
    render: Callable[[list[Conversation]], list[str]],
    conversations: Sequence[Conversation],
    control: re.Pattern[str],
    marks: str,
) -> list[Rendered]:
    """Each conversation as the template renders it, with marks (`free_marks` of all its texts)
    where users spell control tokens.

    >>> chat = [{"role": "user", "content": "1</s>"}]
    >>> show = lambda conversations: [c[0]["content"] + "</s>" for c in conversations]
    >>> (found,) = render_marked(show, [chat], spellings(["</s>"]), "()")
    >>> found.text, found.marked_text
    ('1</s></s>', '1(</s>)</s>')
    """
    put = rf"{marks[0]}\g<0>{marks[1]}"
    marked = [
        [{**turn, "content": control.sub(put, turn["content"])} for turn in turns]
        for turns in conversations
    ]
    spelled = [marks if a != b else "" for a, b in zip(marked, conversations, strict=True)]
    return list(map(Rendered, render(marked), spelled))


def _bare(text: str, marks: str) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text


def ids_of(rendered: Sequence[Rendered], codec: Codec) -> list[list[int]]:
    """The ids of each rendered conversation: encoded whole, unless it is marked."""
    whole = iter(codec.encode([one.marked_text for one in rendered if not one.marks]))
    return [_parted(*one, codec) if one.marks else next(whole) for one in rendered]


def _parted(text: str, marks: str, codec: Codec) -> list[int]:
    """The template's own control tokens as such, and what stands between them as text."""
    control, before, after = codec.control.pattern, marks[0], marks[1]
    ids: list[int] = []
    start = 0
    # one mark is enough: a template that cuts texts may lose the other
    for found in re.finditer(f"{before}(?:{control})|(?:{control}){after}|({control})", text):
        if found[1] is not None:
            ids += codec.plain(_bare(text[start : found.start()], marks))
            ids += codec.encode([found[1]])[0]
            start = found.end()
    return ids + codec.plain(_bare(text[start:], marks))


class Ending(NamedTuple):
    """How a template ends an answer: the text that it puts there, the part of it before the first
    control token, and the id that stops a worked response."""

    text: str
    kept: str
    stop_id: int


def response_ids(
    prompts: Sequence[Rendered],
    answered: Sequence[Rendered],
    responses: Sequence[Rendered],
    ending: Ending,
    codec: Codec,
) -> list[list[int]]:
    """The ids of worked responses, each with one stop token, its last.

    Args:
        prompts: rendered up to where the answer begins.
        answered: the same conversations with the answer.
        responses: the answers alone, for a template that does not render an answer behind its
            prompt: they then follow it as they are.
        ending: of an answer.
        codec: the tokenizer's.

    A response is what follows the prompt's ids in those of the whole; where prompt and response
    share a token there, it is encoded alone.
    """
    tails = []
    for prompt, whole, alone in zip(prompts, answered, responses, strict=True):
        found = whole.after(prompt.marked_text)
        if found is not None and found.marked_text.endswith(ending.text):
            cut = found.marked_text.removesuffix(ending.text) + ending.kept
            tails.append(Rendered(cut, found.marks))
        else:
            tails.append(alone)
    wholes = [
        Rendered(prompt.marked_text + tail.marked_text, prompt.marks or tail.marks)
        for prompt, tail in zip(prompts, tails, strict=True)
    ]
    found_ids = []
    starts, all_ids = ids_of(prompts, codec), ids_of(wholes, codec)
    for start, ids, tail in zip(starts, all_ids, tails, strict=True):
        follows = ids[: len(start)] == start
        own = ids[len(start) :] if follows else ids_of([tail], codec)[0]
        found_ids.append([*own, ending.stop_id])
    return found_ids


def without_stops(text: str, stops: Sequence[str]) -> str:
    r"""A worked response without the stop tokens that it ends with, and the space around them.

    >>> without_stops("2<|im_end|>\n", ["<|im_end|>"])
    '2'
    """
    bare = text.rstrip()
    ended = next((stop for stop in stops if stop and bare.endswith(stop)), None)
    return text if ended is None else without_stops(bare.removesuffix(ended).rstrip(), stops)
