"""Tokenizers: text to ids and back, chat templates and stop ids, by `transformers`, strictly."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.data.chat import render
from kdjax.errors import ConfigError, DataError, KdjaxError
from kdjax.runtime.files import digest, json_object, member, one_line


class Tokenizer(NamedTuple):
    """A tokenizer as functions.

    - render(prompt) -> str: the prompt, in its template, as the only user turn after the system
      prompt, if there is one; up to where an answer begins.
    - encode(text) -> ids: of trusted text, where special tokens are read as such.
    - encode_prompt(prompt) -> ids: of render(prompt), where special tokens inside the prompt, its
      template or the system prompt are plain text.
    - decode(ids) -> text, special tokens left out.
    - token(id) -> str: how the vocabulary spells it.
    - stop_ids: every id that ends a response (the generation config's first).
    - turn_end_id: what the chat template puts after an answer, or None.
    - size: tokens in use, ids below it (a model may have more rows); full_size: all tokens, which
      are more where the other model of a pair has only the first of them.
    - fingerprint: equal for tokenizers that give equal ids.
    - cutting: (name, hash) of each part that decides how text is cut, whatever the tokens.
    - folder, template_folder: where it is from, and its chat template.
    """

    render: Callable[[str], str]
    encode: Callable[[str], list[int]]
    encode_prompt: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    token: Callable[[int], str]
    stop_ids: tuple[int, ...]
    turn_end_id: int | None
    size: int
    full_size: int
    fingerprint: str
    cutting: tuple[tuple[str, str], ...]
    folder: str
    template_folder: str


class Wording(NamedTuple):
    """How a prompt is made of a problem: the template of the user turn ({prompt} is replaced, any
    other brace is text), the system turn (None: there is none), and the chat template's
    enable_thinking (Qwen3's closes the thinking part itself where it is False).

    >>> Wording("{prompt} Answer in \\\\boxed{}.").user_turn("1+1=?")
    '1+1=? Answer in \\\\boxed{}.'
    """

    prompt_template: str = "{prompt}"
    system_prompt: str | None = None
    thinking: bool = False

    def user_turn(self, prompt: str) -> str:
        return self.prompt_template.replace("{prompt}", prompt)


PLAIN_WORDING = Wording()


def load_tokenizer(
    folder: str | Path,
    wording: Wording = PLAIN_WORDING,
    *,
    spare_template: str | Path | None = None,
) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with prompts in this wording.

    Where the folder has no chat template, that of the folder spare_template is used. Errors:
    DataError when files are missing, or the chat template is, or its place for a system prompt;
    ConfigError without a stop id.
    """
    folder = template_folder = Path(folder)
    hf = _read(folder)
    stop_ids = _stop_ids(folder, hf)
    if not hf.chat_template and spare_template is not None:
        template_folder = Path(spare_template)
        hf.chat_template = _read(template_folder).chat_template
    if not hf.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder"
        )
    before, after = _around_user_turn(folder, hf, wording)
    encode, plain = (
        functools.partial(_encode, folder, hf, split_special_tokens=split)
        for split in (False, True)
    )
    before_ids = [
        i for text, read in zip(before, (encode, plain, encode), strict=True) for i in read(text)
    ]
    after_ids = encode(after)
    with _trusting(folder):
        return Tokenizer(
            render=lambda prompt: "".join((*before, wording.user_turn(prompt), after)),
            encode=encode,
            encode_prompt=lambda prompt: before_ids + plain(wording.user_turn(prompt)) + after_ids,
            decode=functools.partial(hf.decode, skip_special_tokens=True),
            token=hf.convert_ids_to_tokens,
            stop_ids=stop_ids,
            turn_end_id=_turn_end_id(hf),
            size=len(hf),
            full_size=len(hf),
            **_identity(hf),
            folder=str(folder),
            template_folder=str(template_folder),
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
    if student.template_folder != student.folder and student.full_size != teacher.full_size:
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


def _read(folder: Path):
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from transformers import AutoTokenizer

    files = [path.name for path in folder.iterdir() if not path.is_dir()]
    files += [f"{path.parent.name}/{path.name}" for path in folder.glob(f"{MORE_TEMPLATES}/*")]
    if "tokenizer.json" not in files:
        raise DataError(
            f"{folder}: no tokenizer.json; a model folder needs its tokenizer beside the weights"
        )
    for name in files:  # any of them may be read by the library
        member(folder, name)
    _check_growth(folder, json_object(folder, "tokenizer.json").get("normalizer"))
    with _trusting(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


MORE_TEMPLATES = "additional_chat_templates"
MOST_GROWTH = 1000
"""Characters that a normalizer may make of one."""


def _check_growth(folder: Path, normalizer: Any) -> None:
    """Errors: DataError for a normalizer whose replacements could make a text explode."""
    growth, parts = 1, [normalizer]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            pattern, content = part.get("pattern"), part.get("content")
            literal = isinstance(pattern, dict) and bool(pattern.get("String"))
            length = len(content) if isinstance(content, str) else 0
            growth *= max(1, length) if literal else 1 + length  # a regex may match nothing
            parts += part.get("normalizers") or []
    if growth > MOST_GROWTH:
        raise DataError(
            f"{folder}: the tokenizer's normalizer makes up to {growth} characters of one; use a"
            " tokenizer from a source that you trust"
        )


@contextlib.contextmanager
def _trusting(folder: Path) -> Iterator[None]:
    """Errors: DataError for whatever the library raises over a folder's tokenizer: exceptions of
    many kinds, and panics of its Rust part, which are no `Exception`."""
    try:
        yield
    except KdjaxError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{folder}: can't read the tokenizer ({type(error).__name__}: {one_line(error)})"
        ) from error


def _encode(folder: Path, hf, text: str, *, split_special_tokens: bool) -> list[int]:
    """Ids of a text; split_special_tokens: special tokens in it are plain text."""
    with _trusting(folder):
        return hf.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens)


def _render(hf, turns: list[dict[str, str]], **values: Any) -> str:
    """Turns, rendered by the chat template with the values that transformers gives it. Errors:
    DataError."""
    values = {"messages": turns, "tools": None, "documents": None, **hf.special_tokens_map} | values
    return render(hf.get_chat_template(), values)


def _around_user_turn(folder: Path, hf, wording: Wording) -> tuple[tuple[str, str, str], str]:
    """((text before the system prompt, system prompt, text up to the user's), text after it)."""
    system = wording.system_prompt is not None
    turns = [{"role": "system", "content": _SYSTEM_PLACEHOLDER}] * system
    turns += [{"role": "user", "content": _PLACEHOLDER}]
    try:
        with _trusting(folder):
            rendered = _render(
                hf, turns, add_generation_prompt=True, enable_thinking=wording.thinking
            )
    except DataError as error:
        if system:  # a template may refuse a system turn in many ways
            raise _no_place_for_a_system_prompt(folder) from error
        raise DataError(f"{folder}: the chat template can't be rendered ({error})") from error
    before, marker, after = rendered.partition(_PLACEHOLDER)
    if not marker:
        raise DataError(
            f"{folder}: the chat template does not show the user's text unchanged;"
            " can't encode prompts safely"
        )
    first, marker, second = before.partition(_SYSTEM_PLACEHOLDER)
    if system and not marker:
        raise _no_place_for_a_system_prompt(folder)
    return (first, wording.system_prompt or "", second), after


def _no_place_for_a_system_prompt(folder: Path) -> DataError:
    return DataError(
        f"{folder}: the chat template does not show a system prompt before the user's text; leave"
        " data.system_prompt out, and write it into data.prompt_template"
    )


DECISIVE_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""The parts of tokenizer.json that decide a text's ids; padding and truncation don't."""

_PLACEHOLDER = "\u2063kdjax prompt\u2063"
_SYSTEM_PLACEHOLDER = "\u2063kdjax system\u2063"
_ANSWER = "\u2063kdjax answer\u2063"


def _turn_end_id(hf) -> int | None:
    """The first control token after an answer in the template, else the first token of any kind."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _render(hf, turns, add_generation_prompt=False)
    except DataError:  # a template may refuse these turns; their end is then not known
        return None
    ids = hf.encode(text.partition(_ANSWER)[2], add_special_tokens=False)
    control = {*hf.get_added_vocab().values()}
    return next((i for i in ids if i in control), ids[0] if ids else None)


def _stop_ids(folder: Path, hf) -> tuple[int, ...]:
    declared = json_object(folder, "generation_config.json").get("eos_token_id")
    ids = list(declared or []) if isinstance(declared, list | None) else [declared]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise DataError(
            f"{folder / 'generation_config.json'}: eos_token_id must be one id or"
            f" several, got {declared!r}"
        )
    if hf.eos_token_id is not None:
        ids.append(hf.eos_token_id)
    if not ids:
        raise ConfigError(f"{folder}: no stop token; set eos_token_id in generation_config.json")
    return tuple(dict.fromkeys(ids))


def _identity(hf) -> dict[str, Any]:
    """The fields fingerprint and cutting."""
    parts = json.loads(hf.backend_tokenizer.to_str())
    decisive = {name: parts.get(name) for name in DECISIVE_PARTS}
    model = {name: value for name, value in parts["model"].items() if name != "vocab"}
    cutting = {"merges or model": model} | {
        name: parts.get(name) for name in ("normalizer", "pre_tokenizer")
    }
    return {
        "fingerprint": digest(decisive),
        "cutting": tuple((name, digest(part)) for name, part in cutting.items()),
    }
