"""A tokenizer's chat template: user turns and answers as it shows them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.data.chat import Conversation, render
from kdjax.data.chat.conversations import (
    Codec,
    Ending,
    Rendered,
    free_marks,
    render_marked,
    response_ids,
    spellings,
    without_stops,
)
from kdjax.data.tokenizer_folder import trusting
from kdjax.errors import DataError


class Template(NamedTuple):
    """The chat template of a tokenizer, which renders user turns and answers to them.

    - folder, hf: the tokenizer's, and the library's tokenizer.
    - codec: how it reads texts; forgeable: the control tokens that it reads in normalized text.
    - system_prompt, thinking: the system turn, if there is one, and enable_thinking.
    """

    folder: Path
    hf: Any
    codec: Codec
    forgeable: frozenset[int]
    system_prompt: str | None
    thinking: bool

    def prompts(self, prompts: Sequence[str], marks: str = "") -> list[Rendered]:
        """Each user turn up to where its answer begins; marks: as `free_marks`."""
        marks = marks or self.free_marks(prompts)
        return self._rendered([self.turns(prompt) for prompt in prompts], marks, to_answer=True)

    def answered(
        self, prompts: Sequence[str], answers: Sequence[str], marks: str
    ) -> list[Rendered]:
        """Each user turn with its answer."""
        turns = [
            [*self.turns(prompt), {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return self._rendered(turns, marks, to_answer=False)

    def free_marks(self, texts: Sequence[str]) -> str:
        return free_marks([*texts, self.system_prompt or ""])

    def turns(self, prompt: str) -> Conversation:
        system = self.system_prompt
        before = [] if system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": prompt}]

    def _rendered(
        self, conversations: list[Conversation], marks: str, *, to_answer: bool
    ) -> list[Rendered]:
        """Errors: DataError."""
        values = {"tools": None, "documents": None, **self.hf.special_tokens_map}
        values |= {"add_generation_prompt": to_answer, "enable_thinking": self.thinking}
        with trusting(self.folder):
            show = functools.partial(render, self.hf.get_chat_template(), values=values)
        self._refuse_forged([turn["content"] for turns in conversations for turn in turns])
        try:
            return render_marked(show, conversations, self.codec.control, marks)
        except DataError as error:
            raise DataError(
                f"{self.folder}: the chat template can't be rendered ({error})"
            ) from error

    def _refuse_forged(self, texts: Sequence[str]) -> None:
        """Errors: DataError for a text that is no control token until the tokenizer normalizes it:
        it can't be marked."""
        for text in texts if self.forgeable else ():
            found = self.forgeable & {*self.codec.encode([text])[0]}
            if found and not self.codec.control.search(text):
                token = self.hf.convert_ids_to_tokens(min(found))
                raise DataError(
                    f"{self.folder}: the tokenizer reads {token!r} in the text {text[:60]!r};"
                    " take it out of the text"
                )


def open_template(folder: Path, hf: Any, system_prompt: str | None, thinking: bool) -> Template:
    """The chat template that a tokenizer has, with a system turn where there is a system prompt."""
    backend, turn = hf.backend_tokenizer, threading.Lock()
    special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special}

    def read(texts: Sequence[str], as_text: bool) -> list[list[int]]:
        with turn, trusting(folder):
            backend.encode_special_tokens = as_text
            return [backend.encode(text, add_special_tokens=False).ids for text in texts]

    codec = Codec(
        encode=lambda texts: read(texts, False),
        plain=lambda text: read([text], True)[0],
        control=spellings([token.content for token in special.values()]),
    )
    normalized = [i for i, token in special.items() if token.normalized]
    forgeable = frozenset(normalized if backend.normalizer else ())
    return Template(folder, hf, codec, forgeable, system_prompt, thinking)


def shown_prompt(template: Template) -> str:
    """A rendered prompt with placeholders for what users write.

    Errors: DataError unless the template shows the user's text, behind the system prompt where
    there is one.
    """
    system = None if template.system_prompt is None else _SYSTEM_PLACEHOLDER
    try:
        text = template._replace(system_prompt=system).prompts([_PLACEHOLDER])[0].text
    except DataError as error:
        if system is None:
            raise
        raise _no_place_for_a_system_prompt(template.folder) from error  # refused in many ways
    before, marker, _ = text.partition(_PLACEHOLDER)
    if not marker:
        raise DataError(
            f"{template.folder}: the chat template does not show the user's text unchanged;"
            " can't encode prompts safely"
        )
    if system is not None and system not in before:
        raise _no_place_for_a_system_prompt(template.folder)
    return text


def _no_place_for_a_system_prompt(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the chat template does not show a system prompt before the user's text; leave"
        " data.system_prompt out, and write it into data.prompt_template"
    )


_PLACEHOLDER = "\u2063kdjax prompt\u2063"
_SYSTEM_PLACEHOLDER = "\u2063kdjax system\u2063"
_ANSWER = "\u2063kdjax answer\u2063"


def end_of_answers(template: Template) -> str | None:
    """What the template puts behind an answer; None where it shows none."""
    try:
        text = template.answered(["?"], [_ANSWER], template.free_marks([]))[0].text
    except DataError:  # a template may refuse these turns; their end is then not known
        return None
    _, marker, end = text.partition(_ANSWER)
    return end if marker else None


def turn_end_id(template: Template, end: str | None) -> int | None:
    """The first control token after an answer in the template, else the first token of any kind."""
    ids = template.codec.encode([end])[0] if end else []
    added = {*template.hf.get_added_vocab().values()}
    return next((i for i in ids if i in added), ids[0] if ids else None)


def response_encoder(
    template: Template, end: str | None, stops: Sequence[int]
) -> Callable[[Sequence[str], Sequence[str]], list[list[int]]]:
    """encode(user turns, responses) -> the ids of worked responses (`response_ids`), of a template
    with this end of answers and of a model with these stops."""
    codec, ends = template.codec, turn_end_id(template, end)
    control = codec.control.search(end or "")
    ending = Ending(
        text=end or "",
        kept=(end or "")[: control.start()] if control else "",
        stop_id=next((i for i in stops if i == ends), stops[0]),
    )
    names = [template.hf.convert_ids_to_tokens(i) or "" for i in stops]
    names += [control[0]] if control else []

    def encode(prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        bare = [without_stops(response, names) for response in responses]
        marks = template.free_marks([*prompts, *bare])
        turns = [[{"content": text}] for text in bare]
        alone = render_marked(_contents, turns, codec.control, marks)
        whole = alone if end is None else template.answered(prompts, bare, marks)
        return response_ids(template.prompts(prompts, marks), whole, alone, ending, codec)

    return encode


def _contents(conversations: Sequence[Conversation]) -> list[str]:
    return [turns[0]["content"] for turns in conversations]
