"""The process in which a chat template runs: a request as JSON in, its text as JSON out.

Started as a file; imports nothing of kdjax. The sandbox, and what stands in it, is transformers'.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def main(cpu_seconds: int, memory_mib: int, longest: int) -> None:
    """Render the request of standard input. What fails is a reply, too; a process that is over its
    limits is killed without one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin)
    # to import transformers is not the template's doing, nor what NumPy reserves for each core
    seconds = cpu_seconds + int(time.process_time())
    memory = _address_space() + (memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file is written
    try:
        messages = request["values"].pop("messages")
        template = {"chat_template": request["template"]}
        made: Any = render_jinja_template([messages], **template, **request["values"])
        text = made[0][0]  # (the text of each conversation, where its answers stand)
        reply = {"text": text}
        if len(text) > longest:
            reply = {"failure": f"it makes {len(text)} characters of a prompt, over {longest}"}
    except MemoryError:
        reply = {"failure": f"it takes more than {memory_mib} MiB"}
    except Exception as error:
        reply = {"failure": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(reply))


def _address_space() -> int:
    """Bytes that this process has mapped; 0 where no system says so."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
