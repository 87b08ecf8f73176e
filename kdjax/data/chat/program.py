"""The process in which chat templates run: JSON lines of conversations in, of their texts out.

Started as a file; imports nothing of kdjax. The sandbox, and what stands in it, is transformers'.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

DAY = datetime.date(2024, 7, 26)
"""What a template that asks for the date is told, so that prompts are the same on every day and in
every time zone; Llama 3.1's own template says this day where it is told none."""

MOST = 8
"""Times the longest text, of all texts of a request."""


def main(cpu_seconds: int, memory_mib: int, longest: int) -> None:
    """Answer each line of standard input, a template with conversations and values, until it ends.

    What fails is a reply, too; a process that is over its limits is killed without one. The time is
    that of a conversation, the memory that of all.
    """
    import transformers.utils.chat_template_utils as library

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    vars(library)["datetime"] = Clock  # where strftime_now looks
    _refuse_chance()
    # to import transformers is not a template's doing, nor what NumPy reserves for each core
    _limit(resource.RLIMIT_AS, _address_space() + (memory_mib << 20))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)  # no file is written
    print(json.dumps({"value": "ready"}), file=replies, flush=True)

    def render(conversation: Any, **values: Any) -> str:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        return library.render_jinja_template([conversation], **values)[0][0]

    for line in sys.stdin:
        print(json.dumps(_answer(render, longest, **json.loads(line))), file=replies, flush=True)


def _answer(
    render: Callable[..., str],
    longest: int,
    template: str,
    conversations: list[Any],
    values: dict[str, Any],
) -> dict[str, Any]:
    """The texts of conversations, or why there are none."""
    texts: list[str] = []
    total = 0
    try:
        for conversation in conversations:
            text = render(conversation, chat_template=template, **values)
            total += len(text)
            if len(text) > longest or total > MOST * longest:
                raise ValueError(f"it makes {len(text)} characters of a prompt, over {longest}")
            texts.append(text)
    except MemoryError:
        return {"failure": "memory"}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:500]}
    return {"value": texts}


class Clock:
    """In the place of the class datetime: always midnight of DAY."""

    @staticmethod
    def now() -> datetime.datetime:
        return datetime.datetime.combine(DAY, datetime.time())


def _refuse_chance() -> None:
    """Replace what a template could draw at random with."""
    from jinja2 import defaults, filters

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("it draws at random; write what it shall say into the template")

    filters.FILTERS["random"] = refuse
    defaults.DEFAULT_NAMESPACE["lipsum"] = refuse


def _limit(what: int, value: int) -> None:
    """Limit this process, or leave it at what the system allows where that is less."""
    most = resource.getrlimit(what)[1]
    soft = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (soft, most))


def _address_space() -> int:
    """Bytes that this process has mapped; 0 where no system says so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
