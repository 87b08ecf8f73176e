"""Chat templates, rendered where they can do no harm.

A template is a program of whoever made the model folder. It runs in a process of its own, without
this one's environment and files, under limits of time and memory; its texts alone come back. The
process lives on for the next conversations: to start one takes half a second.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.grading.pool import Workers

LONGEST = 1 << 20
"""Characters of a template, and of what it makes of one conversation."""

CPU_SECONDS, WALL_SECONDS, MEMORY_MIB = 3, 120.0, 512

KEPT = ("LD_LIBRARY_PATH",)
"""What Python needs of the environment; tokens stand there, too."""

Conversation = list[dict[str, str]]
"""Turns, each a role and a content."""

AT_A_TIME = 64
"""Conversations of one request, unless they are long."""


def render(
    template: str, conversations: Sequence[Conversation], values: dict[str, Any]
) -> list[str]:
    """What transformers' apply_chat_template makes of each conversation, with the values that a
    template reads. A template that asks for the date is told the same day always (program.DAY).

    Errors: DataError saying why there is nothing.

    >>> render("{{ messages[0].content }}!", [[{"role": "user", "content": "1+1"}]], {})
    ['1+1!']
    """
    if len(template) > LONGEST:
        raise DataError(f"it has {len(template)} characters, over {LONGEST}")
    texts: list[str] = []
    with _TURN:  # one thread at a time speaks with the process
        for some in _requests(conversations):
            request = {"template": template, "conversations": some, "values": values}
            (reply,) = _worker().map([request])
            if reply.failure:
                raise DataError(_why(reply.failure))
            texts += reply.value
    return texts


_TURN = threading.Lock()


def _requests(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations in order, as many at a time as are LONGEST characters or less, and one."""
    some: list[Conversation] = []
    length = 0
    for one in conversations:
        own = sum(len(turn["content"]) for turn in one)
        if some and (len(some) == AT_A_TIME or length + own > LONGEST):
            yield some
            some, length = [], 0
        some.append(one)
        length += own
    if some:
        yield some


@functools.cache
def _worker() -> Workers:
    limits = (str(CPU_SECONDS), str(MEMORY_MIB), str(LONGEST))
    command = [sys.executable, "-I", str(Path(__file__).with_name("program.py")), *limits]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return Workers(command, 1, WALL_SECONDS, environment=kept)


def _why(failure: str) -> str:
    if failure in ("crash", "deadline", "memory"):
        return f"it takes more than {CPU_SECONDS} s or {MEMORY_MIB} MiB"
    return failure
