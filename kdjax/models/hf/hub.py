"""Models by their hub name: a snapshot in the hub's cache, downloaded where it is missing."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from kdjax.errors import DataError
from kdjax.models.hf.folder import COPIED_FILES, INDEX_FILE
from kdjax.runtime.files import one_line

HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
WANTED = ("config.json", *COPIED_FILES, "*.safetensors", INDEX_FILE)
UNWANTED = ("*/*", "consolidated*")  # other formats' copies of the same weights


def is_hub_name(name: str) -> bool:
    """Whether a name reads as `org/model` or `org/model@revision`.

    >>> is_hub_name("Qwen/Qwen3-0.6B@main"), is_hub_name("runs/a/b"), is_hub_name("../model")
    (True, False, False)
    """
    return HUB_NAME.fullmatch(name) is not None


@functools.cache  # a branch may move: one process sees one commit
def snapshot(name: str, weights: bool = True) -> Path:
    """The folder of a hub name in the hub's cache; downloaded first, where the hub can be reached,
    with its weights or without.

    Errors: DataError saying what was looked for, and why it can't be had.
    """
    from huggingface_hub import snapshot_download

    match = HUB_NAME.fullmatch(name)
    assert match is not None, name
    try:
        found = snapshot_download(
            match["repository"],
            revision=match["revision"],
            allow_patterns=[name for name in WANTED if weights or "safetensors" not in name],
            ignore_patterns=list(UNWANTED),
        )
    except Exception as error:  # the library raises many kinds: network, rights, disk, odd names
        raise DataError(
            f"no local folder {name}; looked on the hub for model {match['repository']} at revision"
            f" {match['revision'] or 'main'}: {_reason(error)}"
        ) from error
    return Path(found)


def _reason(error: Exception) -> str:
    """Why a model can't be had, and the remedy."""
    from huggingface_hub import errors

    reasons = {  # in this order: the second is a kind of the third
        errors.LocalEntryNotFoundError: (
            "the hub is offline (HF_HUB_OFFLINE) or can't be reached, and the hub's cache does not"
            " hold it; fetch it where there is a network and give the folder, or set HF_HUB_CACHE"
        ),
        errors.GatedRepoError: "it is gated; accept its terms on its page and run hf auth login",
        errors.RepositoryNotFoundError: (
            "there is none of that name that you may see; check the name, or run hf auth login if"
            " it is private"
        ),
        errors.RevisionNotFoundError: "it has no such revision; give a branch, tag or commit",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    return f"{type(error).__name__} ({one_line(error)}); try again"
