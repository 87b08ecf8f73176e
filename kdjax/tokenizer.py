"""Text to token ids and back, with chat templates and stop ids: a thin, strict door to
`transformers`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kdjax.base import ConfigError, DataError


class Tokenizer(NamedTuple):
    """A tokenizer as functions.

    - render(prompt) -> str: the prompt as the only user turn, ready for an answer, thinking off.
    - encode(text) -> ids: of trusted text, where special tokens are read as such.
    - encode_prompt(prompt) -> ids: of render(prompt), where special tokens that stand inside the
      prompt stay plain text.
    - decode(ids) -> text, special tokens left out.
    - stop_ids: every id that ends a response (the generation config's first).
    - size: real tokens (a model may hold more rows).
    - fingerprint: equal for tokenizers that give equal ids.
    """

    render: Callable[[str], str]
    encode: Callable[[str], list[int]]
    encode_prompt: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stop_ids: tuple[int, ...]
    size: int
    fingerprint: str


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Errors: DataError when files are missing or the chat template is, ConfigError without a stop id.
    """
    folder = Path(folder)
    hf = _read(folder)
    stop_ids = _stop_ids(folder, hf)
    if not hf.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template; add chat_template.jinja to the folder"
        )
    return Tokenizer(
        render=functools.partial(_render, hf),
        encode=functools.partial(hf.encode, add_special_tokens=False),
        encode_prompt=functools.partial(_encode_prompt, hf, *_template_ids(folder, hf)),
        decode=functools.partial(hf.decode, skip_special_tokens=True),
        stop_ids=stop_ids,
        size=len(hf),
        fingerprint=_fingerprint(hf),
    )


def check_same_vocabulary(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise ConfigError unless both map the same text to the same ids: token-level KL needs one
    vocabulary."""
    if student.size != teacher.size or student.fingerprint != teacher.fingerprint:
        raise ConfigError(
            f"student and teacher tokenizers differ ({student.size} and {teacher.size}"
            " tokens); token-level KL compares ids, so use a teacher of the student's family"
        )
    if student.render("1+1") != teacher.render("1+1"):
        raise ConfigError(
            "student and teacher chat templates render the same prompt differently;"
            " use one template"
        )


def _read(folder: Path):
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder}: no tokenizer.json; a model folder needs its tokenizer beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (
        Exception
    ) as error:  # the library raises many kinds; all mean that the files can't be read
        raise DataError(
            f"{folder}: can't read the tokenizer ({type(error).__name__}: {error})"
        ) from error


def _render(hf, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return hf.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def _template_ids(folder: Path, hf) -> tuple[list[int], list[int]]:
    """Ids of the template before and after the user's text."""
    before, marker, after = _render(hf, _PLACEHOLDER).partition(_PLACEHOLDER)
    if not marker:
        raise DataError(
            f"{folder}: the chat template does not show the user's text unchanged;"
            " can't encode prompts safely"
        )
    return hf.encode(before, add_special_tokens=False), hf.encode(after, add_special_tokens=False)


def _encode_prompt(hf, before: list[int], after: list[int], prompt: str) -> list[int]:
    """Control tokens of the template count as such, those inside the user's text don't (prompt
    injection)."""
    return before + hf.encode(prompt, add_special_tokens=False, split_special_tokens=True) + after


DECISIVE_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""What decides the ids of a text; padding and truncation settings don't."""

_PLACEHOLDER = "\u2063kdjax prompt\u2063"


def _stop_ids(folder: Path, hf) -> tuple[int, ...]:
    ids: list[int] = []
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            declared = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a readable JSON object ({error})") from None
        ids += [declared] if isinstance(declared, int) else list(declared or [])
    if hf.eos_token_id is not None:
        ids.append(hf.eos_token_id)
    if not ids:
        raise ConfigError(f"{folder}: no stop token; set eos_token_id in generation_config.json")
    return tuple(dict.fromkeys(ids))


def _fingerprint(hf) -> str:
    parts = json.loads(hf.backend_tokenizer.to_str())
    decisive = {name: parts.get(name) for name in DECISIVE_PARTS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
