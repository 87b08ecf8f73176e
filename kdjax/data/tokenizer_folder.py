"""The tokenizer of a model folder, by `transformers`, strictly: what tokenizer.json says holds."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdjax.errors import ConfigError, DataError, KdjaxError
from kdjax.runtime.files import digest, json_object, member, one_line

MORE_TEMPLATES = "additional_chat_templates"

MOST_GROWTH = 1000
"""Characters that a normalizer or decoder may make of one."""

LONGEST_TOKEN = 10_000
"""Characters of a token of the vocabulary."""

DECISIVE_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""The parts of tokenizer.json that decide a text's ids; padding and truncation don't."""

FROM_FILE = ("model", "normalizer", "pre_tokenizer", "decoder")
"""The parts that some of the library's classes (tokenizer_class) replace by their own."""


def read_tokenizer(folder: Path) -> Any:
    """The library's tokenizer of a folder, whose ids are those of tokenizer.json whatever class
    tokenizer_config.json names. Errors: DataError."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer, PreTrainedConfig

    files = [path.name for path in folder.iterdir() if not path.is_dir()]
    files += [f"{path.parent.name}/{path.name}" for path in folder.glob(f"{MORE_TEMPLATES}/*")]
    if "tokenizer.json" not in files:
        raise DataError(
            f"{folder}: no tokenizer.json; a model folder needs its tokenizer beside the weights"
        )
    for name in files:  # any of them may be read by the library
        member(folder, name)
    parts = json_object(folder, "tokenizer.json")
    _check_parts(folder, parts)
    with trusting(folder):
        file = Backend.from_file(str(folder / "tokenizer.json"))
        hf = AutoTokenizer.from_pretrained(  # with a config of its own it does not read the model's
            folder, local_files_only=True, trust_remote_code=False, config=PreTrainedConfig()
        )
        backend = getattr(hf, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise DataError(
                f"{folder}: tokenizer_class {type(hf).__name__} of tokenizer_config.json does not"
                " read tokenizer.json; write PreTrainedTokenizerFast there"
            )
        for part in FROM_FILE:
            setattr(backend, part, getattr(file, part))
        backend.no_truncation()
        backend.no_padding()
        longest = max(map(len, hf.get_vocab()))
    if longest > LONGEST_TOKEN:
        raise DataError(
            f"{folder}: the tokenizer has a token of {longest} characters; {DISTRUSTED}"
        )
    return hf


DISTRUSTED = "use a tokenizer from a source that you trust"


def _check_parts(folder: Path, parts: dict[str, Any]) -> None:
    """Errors: DataError for parts that could make a text explode, or draw its ids at random."""
    for name, many in (("normalizer", "normalizers"), ("decoder", "decoders")):
        growth = _growth(parts.get(name), many)
        if growth > MOST_GROWTH:
            raise DataError(
                f"{folder}: the tokenizer's {name} makes up to {growth} characters of one;"
                f" {DISTRUSTED}"
            )
    model = parts.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise DataError(
            f"{folder / 'tokenizer.json'}: the model has dropout {model['dropout']!r}, so that a"
            " text would get other ids each time; write null there"
        )


def _growth(part: Any, many: str) -> int:
    """Characters that a part, and those in its list `many`, may make of one."""
    growth, parts = 1, [part]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            pattern, content = part.get("pattern"), part.get("content")
            literal = isinstance(pattern, dict) and bool(pattern.get("String"))
            length = len(content) if isinstance(content, str) else 0
            growth *= max(1, length) if literal else 1 + length  # a regex may match nothing
            growth *= 1 + len(part["prepend"]) if isinstance(part.get("prepend"), str) else 1
            found = part.get(many)
            parts += found if isinstance(found, list) else []
    return growth


@contextlib.contextmanager
def trusting(folder: Path) -> Iterator[None]:
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


def stop_ids(folder: Path, hf: Any) -> tuple[int, ...]:
    """Every id that ends a response: the generation config's, then the tokenizer's own."""
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


def identity(hf: Any) -> dict[str, Any]:
    """The fields fingerprint and cutting of `Tokenizer`."""
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
