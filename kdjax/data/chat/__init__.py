"""A model's chat template, rendered where it can do no harm.

A template is a program of whoever made the model folder. It runs in a process of its own, without
this one's environment and files, under limits of time and memory; its text alone comes back.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdjax.errors import DataError

LONGEST = 1 << 20
"""Characters of a template, and of what it makes of one prompt."""

CPU_SECONDS, WALL_SECONDS, MEMORY_MIB = 3, 120.0, 512

KEPT = ("LD_LIBRARY_PATH", "TZ")
"""What Python and dates need of the environment; tokens stand there, too."""


def render(template: str, values: dict[str, Any]) -> str:
    """What transformers' apply_chat_template makes of a template and the values that it reads.

    Errors: DataError saying why there is nothing.

    >>> render("{{ messages[0].content }}!", {"messages": [{"role": "user", "content": "1+1"}]})
    '1+1!'
    """
    if len(template) > LONGEST:
        raise DataError(f"it has {len(template)} characters, over {LONGEST}")
    return _rendered(json.dumps({"template": template, "values": values}))


@functools.lru_cache(maxsize=64)  # student and teacher often share theirs
def _rendered(request: str) -> str:
    limits = (str(CPU_SECONDS), str(MEMORY_MIB), str(LONGEST))
    command = [sys.executable, "-I", str(Path(__file__).with_name("program.py")), *limits]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    reply = {"failure": f"it takes more than {CPU_SECONDS} s or {MEMORY_MIB} MiB"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=WALL_SECONDS, env=kept
        )
        if done.returncode == 0:
            reply = json.loads(done.stdout)
        elif done.returncode > 0:  # else it was killed
            reply = {"failure": done.stderr.decode(errors="replace").strip().rpartition("\n")[2]}
    if "failure" in reply:
        raise DataError(reply["failure"])
    return reply["text"]
