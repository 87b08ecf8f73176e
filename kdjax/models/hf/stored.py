"""The config of a model folder as its weights are: their layers, and the LM head that is there."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kdjax.errors import DataError
from kdjax.models.hf.config import from_fields
from kdjax.models.hf.families import FAMILIES, TEXT_PART
from kdjax.models.hf.folder import StoredTensor, has_weights, open_tensors, shown, weight_files
from kdjax.models.shape import DecoderConfig
from kdjax.runtime.console import announce
from kdjax.runtime.files import json_object, member

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_A_TIME = 4096


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder. Where weights are there, a head that differs from the embedding
    is untied, as in transformers, and the terminal says so.

    Errors: DataError naming what is missing or not supported, and for more layers than tensors.
    """
    if member(folder, "config.json") is None:
        raise DataError(f"{folder}: no config.json; give a Hugging Face model folder")
    config = from_fields(json_object(folder, "config.json"), str(folder / "config.json"))
    if not has_weights(folder):
        return config
    count, apart, _ = _looked_at(*_state(folder), config.model_type)
    check_depth(config, count, folder)
    if left := about_left_out(folder, config.model_type):
        announce(left)
    if not (apart and config.tie_word_embeddings):
        return config
    announce(about_untied(folder))
    return dataclasses.replace(config, tie_word_embeddings=False)


def about_untied(folder: Path) -> str:
    """What is said of a head that differs from the embedding that config.json ties it to."""
    return (
        f"{folder}: config.json ties the LM head to the embedding, but {HEAD} is another: it is"
        " read as a head of its own"
    )


def model_tensors(folder: Path, model_type: str) -> dict[str, StoredTensor]:
    """The tensors of a folder's text model under its own names.

    Errors: DataError as `open_tensors`, and for two tensors of one name.

    >>> from kdjax.models import find
    >>> len(model_tensors(find("kdjax:student"), "qwen3"))
    24
    """
    return _text_part(open_tensors(folder), folder, model_type)


def _text_part(
    tensors: dict[str, StoredTensor], folder: Path, model_type: str
) -> dict[str, StoredTensor]:
    """`model_tensors` of all those of the folder."""
    left_out, found = FAMILIES[model_type].left_out, {}
    for name, tensor in tensors.items():
        if left_out and name.startswith(left_out):
            continue
        own = _own_name(name) if left_out else name
        if own in found:
            raise DataError(f"{folder}: two tensors are {shown(own)} of its text model; keep one")
        found[own] = tensor
    return found


def _own_name(name: str) -> str:
    """The name in a text model of a tensor of a larger one."""
    for outer, own in TEXT_PART.items():
        if name.startswith(outer):
            return own + name.removeprefix(outer)
    return name


def about_left_out(folder: Path, model_type: str) -> str:
    """What is said of a larger model's tensors that its text model does not need; "" for none."""
    left = _looked_at(*_state(folder), model_type)[2] if has_weights(folder) else ""
    return left and f"{folder}: only its text model is read; left out are the tensors {left}"


def _left_out(names: Iterable[str], left_out: tuple[str, ...]) -> str:
    """The tensors that begin with one of these, and how many.

    >>> _left_out(["mtp.fc.weight", "model.norm.weight"], ("model.visual.", "mtp."))
    'mtp.* (1)'
    """
    counts = Counter(outer for name in names for outer in left_out if name.startswith(outer))
    return ", ".join(f"{outer}* ({counts[outer]})" for outer in left_out if counts[outer])


def check_depth(config: DecoderConfig, tensors: int, folder: Path) -> None:
    """Errors: DataError for more layers than so many tensors can be, which are too many to list."""
    if config.num_hidden_layers * max(1, config.num_experts) > tensors:
        raise DataError(
            f"{folder}: weights and config.json disagree: {config.num_hidden_layers} layers,"
            f" but {tensors} tensors"
        )


def _state(folder: Path) -> tuple[Path, tuple[tuple[int, int], ...]]:
    stats = [path.stat() for path in weight_files(folder)]
    return folder, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


@functools.lru_cache(maxsize=32)
def _looked_at(
    folder: Path, state: tuple[tuple[int, int], ...], model_type: str
) -> tuple[int, bool, str]:
    """(the number of tensors, whether head and embedding are both there and differ, what is left
    out); state: of the files, so that changed ones are looked at again."""
    tensors = open_tensors(folder)
    found = _text_part(tensors, folder, model_type)
    both = EMBEDDING in found and HEAD in found
    apart = both and not _equal(found[EMBEDDING], found[HEAD])
    return len(found), apart, _left_out(tensors, FAMILIES[model_type].left_out)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tables hold the same numbers, whatever their dtypes."""
    shape = tuple(one.get_shape())
    if shape != tuple(other.get_shape()):
        return False
    starts = range(0, shape[0] if shape else 0, ROWS_AT_A_TIME)
    blocks = (slice(start, min(start + ROWS_AT_A_TIME, shape[0])) for start in starts)
    return all(
        np.array_equal(*(tensor[rows].astype(np.float32) for tensor in (one, other)))
        for rows in blocks
    )
