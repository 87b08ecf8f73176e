"""Tokenizers: text to ids and back, chat templates and stop ids, by `transformers`, strictly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.data.chat.conversations import Rendered, ids_of
from kdjax.data.chat.named import named_template
from kdjax.data.chat.template import (
    end_of_answers,
    open_template,
    response_encoder,
    shown_prompt,
    turn_end_id,
)
from kdjax.data.spelling import Spelling, read_spelling
from kdjax.data.tokenizer_folder import identity, read_tokenizer, stop_ids, trusting
from kdjax.errors import ConfigError, DataError


class Tokenizer(NamedTuple):
    """A tokenizer as functions.

    - render(prompt) -> str: the prompt, in its template, as the only user turn after the system
      prompt, if there is one; up to where an answer begins.
    - encode(text) -> ids: of trusted text, where special tokens are read as such.
    - encode_prompts(prompts) -> the ids of render(prompt) of each, encoded whole as transformers'
      apply_chat_template does; where the prompt, its template or the system prompt spell a special
      token, that one is plain text.
    - encode_responses(prompts, responses) -> the ids of worked responses, as the chat template has
      them behind their prompts: special tokens in them are plain text, but for those at the end,
      where one stop token stands.
    - decode(ids) -> text, special tokens left out, but for <think> and </think>.
    - token(id) -> str: how the vocabulary spells it.
    - stop_ids: every id that ends a response (the generation config's first).
    - turn_end_id: what the chat template puts after an answer, or None.
    - opens_thinking: whether the rendered prompt leaves <think> open.
    - size: tokens in use, ids below it (a model may have more rows); full_size: all tokens, which
      are more where the other model of a pair has only the first of them.
    - fingerprint: equal for tokenizers that give equal ids.
    - spelling() -> the bytes of each token, read when first asked for (`read_spelling`).
    - cutting: (name, hash) of each part that decides how text is cut, whatever the tokens.
    - folder, template_folder: where it is from, and its chat template (a folder, or what the
      wording names); template: that template's text.
    """

    render: Callable[[str], str]
    encode: Callable[[str], list[int]]
    encode_prompts: Callable[[Sequence[str]], list[list[int]]]
    encode_responses: Callable[[Sequence[str], Sequence[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    token: Callable[[int], str]
    stop_ids: tuple[int, ...]
    turn_end_id: int | None
    opens_thinking: bool
    size: int
    full_size: int
    fingerprint: str
    spelling: Callable[[], Spelling]
    cutting: tuple[tuple[str, str], ...]
    folder: str
    template_folder: str
    template: str

    def encode_prompt(self, prompt: str) -> list[int]:
        """`encode_prompts` of one."""
        return self.encode_prompts([prompt])[0]

    def graded_text(self, response: str) -> str:
        """A response as it is graded: behind the <think> that its prompt leaves open."""
        return THINK + response if self.opens_thinking else response


class Wording(NamedTuple):
    """How a prompt is made of a problem: the template of the user turn ({prompt} is replaced, any
    other brace is text), the system turn (None: there is none), the chat template's enable_thinking
    (Qwen3's closes the thinking part itself where it is False), and a chat template in place of the
    tokenizer's own (None: that), as in `named_template`.

    >>> Wording("{prompt} Answer in \\\\boxed{}.").user_turn("1+1=?")
    '1+1=? Answer in \\\\boxed{}.'
    """

    prompt_template: str = "{prompt}"
    system_prompt: str | None = None
    thinking: bool = False
    chat_template: str | None = None

    def user_turn(self, prompt: str) -> str:
        return self.prompt_template.replace("{prompt}", prompt)


PLAIN_WORDING = Wording()
THINK, THOUGHT = "<think>", "</think>"


def load_tokenizer(
    folder: str | Path,
    wording: Wording = PLAIN_WORDING,
    *,
    spare_template: str | Path | None = None,
) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with prompts in this wording.

    Where neither wording nor folder has a chat template, that of the folder spare_template is used.
    Errors: DataError when files are missing, or the chat template is, or its place for a system
    prompt; ConfigError without a stop id.
    """
    folder = Path(folder)
    hf, template_folder = read_tokenizer(folder), str(folder)
    stops = stop_ids(folder, hf)
    if wording.chat_template is not None:
        with trusting(folder):
            hf.chat_template = named_template(wording.chat_template, hf)
        template_folder = wording.chat_template
    elif not hf.chat_template and spare_template is not None:
        template_folder = str(spare_template)
        hf.chat_template = read_tokenizer(Path(spare_template)).chat_template
    if not hf.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder,"
            " or name one: --data.chat_template plain (or a jinja file)"
        )
    template = open_template(folder, hf, wording.system_prompt, wording.thinking)
    codec, shown, end = template.codec, shown_prompt(template), end_of_answers(template)

    def prompts(texts: Sequence[str]) -> list[Rendered]:
        return template.prompts([wording.user_turn(text) for text in texts])

    encode_responses = response_encoder(template, end, stops)
    with trusting(folder):
        size = max(hf.get_vocab().values()) + 1  # ids may have holes
        return Tokenizer(
            render=lambda prompt: prompts([prompt])[0].text,
            encode=lambda text: codec.encode([text])[0],
            encode_prompts=lambda texts: ids_of(prompts(texts), codec),
            encode_responses=lambda texts, responses: encode_responses(
                [wording.user_turn(text) for text in texts], responses
            ),
            decode=_decoder(hf),
            token=lambda i: hf.convert_ids_to_tokens(i) or f"<no token {i}>",
            stop_ids=stops,
            turn_end_id=turn_end_id(template, end),
            opens_thinking=THINK in shown.rpartition(THOUGHT)[2],
            size=size,
            full_size=size,
            spelling=functools.cache(functools.partial(read_spelling, folder, hf)),
            **identity(hf),
            folder=str(folder),
            template_folder=template_folder,
            template=hf.get_chat_template(),
        )


def load_pair(
    student_folder: str | Path, teacher_folder: str | Path, wording: Wording = PLAIN_WORDING
) -> tuple[Tokenizer, Tokenizer]:
    """(the student's tokenizer, the teacher's), both of one wording, with the size of their shared
    vocabulary.

    All models read prompts rendered and encoded by the student's tokenizer: another template of
    the teacher is no error. Where one folder has no chat template (base models often don't), the
    other's is used. Errors: as `load_tokenizer` and `shared_vocabulary`, and DataError where the
    student would need the template of another vocabulary.
    """
    student = load_tokenizer(student_folder, wording, spare_template=teacher_folder)
    teacher = load_tokenizer(teacher_folder, wording, spare_template=student_folder)
    size = shared_vocabulary(student, teacher)
    borrowed = wording.chat_template is None and student.template_folder != student.folder
    if borrowed and student.full_size != teacher.full_size:
        raise DataError(
            f"{student_folder}: the tokenizer has no chat template, and the teacher's is written in"
            f" another vocabulary ({student.full_size} and {teacher.full_size} tokens);"
            " add chat_template.jinja to the folder"
        )
    return student._replace(size=size), teacher._replace(size=size)


def shared_vocabulary(student: Tokenizer, teacher: Tokenizer) -> int:
    """The number of ids that are the same token to both: all, or all of the smaller vocabulary.

    Token-level KL compares ids, so both must split text alike, and one vocabulary must begin with
    the other; tokens that only one has may neither stop a response nor be in a rendered prompt.
    Errors: ConfigError naming the first ids that differ.
    """
    size = min(student.full_size, teacher.full_size)
    if student.fingerprint == teacher.fingerprint and student.full_size == teacher.full_size:
        return size
    remedy = "token-level KL compares ids, so use a teacher of the student's family"
    other = [i for i in range(size) if student.token(i) != teacher.token(i)]
    if other:
        spelled = [f"{i} is {student.token(i)!r} and {teacher.token(i)!r}" for i in other[:3]]
        raise ConfigError(
            f"student and teacher tokenizers differ in {len(other)} of {size} ids:"
            f" {', '.join(spelled)}; {remedy}"
        )
    parts = [a[0] for a, b in zip(student.cutting, teacher.cutting, strict=True) if a != b]
    if parts:
        raise ConfigError(
            f"student and teacher tokenizers differ in how they cut text ({', '.join(parts)});"
            f" {remedy}"
        )
    ends = {
        "student stop": student.stop_ids,
        "teacher stop": teacher.stop_ids,
        "teacher's template end of an answer": (teacher.turn_end_id,),
        "rendered prompt": student.encode_prompt("1+1="),
    }
    for place, ids in ends.items():
        extra = [i for i in ids if i is not None and i >= size]
        if extra:
            owner = student if student.full_size > size else teacher
            raise ConfigError(
                f"student and teacher tokenizers differ: id {extra[0]} ({owner.token(extra[0])!r},"
                f" {place}) is beyond the {size} tokens that both have; {remedy}"
            )
    return size


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """A text in pieces, (text, its tokens): one token each, except that tokens of parts of one
    character are one piece. Tokens that `decode` leaves out are spelled as in the vocabulary.

    Spaces depend on the token before, so a piece is the text that it adds after the one before it.
    """
    found: list[tuple[str, int]] = []
    before = start = 0
    for end in range(1, len(ids) + 1):
        joined = tokenizer.decode(list(ids[before:end]))
        text = joined[len(tokenizer.decode(list(ids[before:start]))) :]
        open_ended = text.endswith("\ufffd") and end - start < _BYTES_A_CHARACTER
        if open_ended and end < len(ids):
            continue
        found.append((text or "".join(map(tokenizer.token, ids[start:end])), end - start))
        before, start = start, end
    return found


_BYTES_A_CHARACTER = 4  # in UTF-8, at most


def _decoder(hf: Any) -> Callable[[list[int]], str]:
    """`Tokenizer.decode`; where the tags of a thinking part are special tokens, the text is cut
    there, as the library would leave them out."""
    decode = functools.partial(hf.decode, skip_special_tokens=True)
    special = hf.backend_tokenizer.get_added_tokens_decoder().items()
    tags = {i: t.content for i, t in special if t.special and t.content in (THINK, THOUGHT)}

    def with_tags(ids: list[int]) -> str:
        text, start = "", 0
        for place, tag in ((place, tags[i]) for place, i in enumerate(ids) if i in tags):
            text += decode(ids[start:place]) + tag
            start = place + 1
        return text + decode(ids[start:])

    return with_tags if tags else decode
