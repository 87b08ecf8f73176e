"""The spelling of a vocabulary: the bytes of text that each token stands for, exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.data.tokenizer_folder import trusting
from kdjax.errors import ConfigError

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece's vocabularies spell a single byte."""


class Spelling(NamedTuple):
    """What the tokens of a vocabulary are made of.

    - bytes_of: by id, the bytes of text that a token adds within an answer; None for control
      tokens, the unknown token, and ids without a token.
    - names: by id, how the vocabulary writes it; None for ids without a token.
    - fallback: the ids that SentencePiece writes <0xE4>.
    - of_byte: the id of the token of each single byte, of those that have one.
    - encode(text) -> ids of text within an answer: control tokens are plain text, and nothing is
      put before it.
    """

    bytes_of: tuple[bytes | None, ...]
    names: tuple[str | None, ...]
    fallback: frozenset[int]
    of_byte: dict[int, int]
    encode: Callable[[str], list[int]]


def read_spelling(folder: Path, hf: Any) -> Spelling:
    """The spelling of the library's tokenizer of a folder.

    Byte-level BPE writes each byte as a letter of GPT-2's alphabet; SentencePiece's BPE and Unigram
    write a space as one letter, and bytes without a token as <0xE4>. Errors: ConfigError for other
    tokenizers, whose tokens are not bytes of the text.
    """
    from tokenizers import Tokenizer as Backend

    with trusting(folder):
        parts = json.loads(hf.backend_tokenizer.to_str())
        model, added = parts["model"], parts.get("added_tokens") or []
        vocab = model["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        spell = _speller(folder, parts)
        size = 1 + max([*ids.values(), *(token["id"] for token in added)])
        found: list[bytes | None] = [None] * size
        names: list[str | None] = [None] * size
        for name, number in ids.items():
            found[number], names[number] = spell(name), name
        for token in added:
            number = token["id"]
            names[number] = token["content"]
            if token["content"] not in ids:
                found[number] = token["content"].encode()
            if token["special"]:
                found[number] = None
        unknown = ids.get(model.get("unk_token")), model.get("unk_id")
        for number in (i for i in unknown if i is not None):
            found[number] = None
        byte = [i for name, i in ids.items() if model.get("byte_fallback") and FALLBACK.match(name)]
        continuing = Backend.from_str(json.dumps(_continuing(parts)))
        continuing.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        with trusting(folder):
            return continuing.encode(text, add_special_tokens=False).ids

    of_byte = {text[0]: i for i, text in enumerate(found) if text is not None and len(text) == 1}
    return Spelling(tuple(found), tuple(names), frozenset(byte), of_byte, encode)


def _speller(folder: Path, parts: dict[str, Any]) -> Callable[[str], bytes | None]:
    """spell(how the vocabulary writes a token) -> its bytes. Errors: ConfigError."""
    model, decoders = parts["model"], _flat(parts.get("decoder"), "decoders")
    kind, kinds = model.get("type"), [part["type"] for part in decoders]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    spaces = [part["replacement"] for part in decoders if part["type"] == "Metaspace"]
    spaces += [
        part["pattern"].get("String")
        for part in decoders
        if part["type"] == "Replace" and part["content"] == " "
    ]
    if kind == "BPE" and not affixes and "ByteLevel" in kinds:
        return _of_alphabet
    if kind in ("BPE", "Unigram") and not affixes and spaces and spaces[0]:
        return lambda name: _of_pieces(name, spaces[0], bool(model.get("byte_fallback")))
    raise ConfigError(
        f"{folder}: the tokens of a tokenizer of model {kind} and decoder"
        f" {'+'.join(kinds) or None} are not bytes of the text, so they can't be aligned; take a"
        " model of byte-level BPE or of SentencePiece"
    )


def _of_alphabet(name: str) -> bytes | None:
    numbers = [ALPHABET.get(letter) for letter in name]
    return None if None in numbers else bytes(numbers)  # type: ignore[arg-type]


def _of_pieces(name: str, space: str, fallback: bool) -> bytes:
    found = FALLBACK.fullmatch(name) if fallback else None
    return bytes([int(found[1], 16)]) if found else name.replace(space, " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's letters of the 256 bytes: printable ones stand for themselves, others follow 255."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


ALPHABET = _alphabet()


def _flat(part: Any, many: str) -> list[dict[str, Any]]:
    """A part of tokenizer.json, and those in its list `many`, without the lists themselves."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for one in part[many] for inner in _flat(one, many)]


def _continuing(parts: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a tokenizer that puts no space before its text."""
    normalizers = _flat(parts.get("normalizer"), "normalizers")
    kept = [part for part in normalizers if part["type"] != "Prepend"]
    pre = [dict(part) for part in _flat(parts.get("pre_tokenizer"), "pretokenizers")]
    for part in pre:
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    return parts | {
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
