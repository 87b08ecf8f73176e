r"""What a worker runs: requests as JSON lines in, verdicts as JSON lines out, under hard limits.

Started as a file by `pool`, in a process of its own that imports nothing of kdjax. math-verify's
own timeouts are off: they cancel the process's timer, and the parent kills a worker that is late.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MIB = 2**20


def serve(judge: Callable[..., Any], deadline_seconds: float, memory_mib: int) -> None:
    """Answer each line of standard input, a JSON object of judge's arguments, until it ends.

    A reply is {"value": ...} or {"failure": reason}. Whatever a judge prints is dropped. A worker
    whose parent is gone ends itself: at the end of its input, or after twice the deadline.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * MIB, memory_mib * MIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"value": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * deadline_seconds)
        try:
            reply = {"value": judge(**json.loads(line))}
        except MemoryError:
            reply = {"failure": "memory"}
        except Exception as error:
            reply = {"failure": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


class UnreadableGold(Exception):
    """math-verify finds no formula in the gold."""


def strict(answer: str, gold: str) -> bool:
    """Whether math-verify finds the two formulas equal."""
    from math_verify import parse, verify

    wanted = _gold(gold)
    if not wanted:
        raise UnreadableGold
    found = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    try:
        return verify(wanted, found, timeout_seconds=None, raise_on_error=True)
    except ValueError as error:
        if "nan or zoo" in str(error):  # a division by zero equals nothing
            return False
        raise


def lenient(answer: str, gold: str) -> bool:
    """math-verify with its defaults, on a whole response."""
    from math_verify import parse, verify

    return verify(_gold(gold), parse(answer, parsing_timeout=None), timeout_seconds=None)


@functools.lru_cache(maxsize=1024)  # the samples of a problem share it, and parsing is slow
def _gold(gold: str) -> list:
    from math_verify import parse

    return parse(gold if "$" in gold.replace(r"\$", "") else f"${gold}$", parsing_timeout=None)


JUDGES = {"strict": strict, "lenient": lenient}

if __name__ == "__main__":
    judge = JUDGES[sys.argv[1]]
    judge("1", "1")  # loads sympy before the deadline of the first answer runs
    serve(judge, float(sys.argv[2]), int(sys.argv[3]))
