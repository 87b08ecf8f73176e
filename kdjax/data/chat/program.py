"""The process in which a chat template runs: a request as JSON in, its text as JSON out.

Started as a file; imports nothing of kdjax. Names and filters are those that transformers gives to
chat templates (utils/chat_template_utils.py), in the same sandbox.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any


def environment() -> Any:
    """The sandbox, with what templates may call."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks an answer's text, which is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012  jinja's own way

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller):
            return caller()

    class PlainNamespace(Namespace):
        def __init__(*args, **names):
            self, *given = args
            for name in (names := dict(*given, **names)):
                _refuse_private(name)
            Namespace.__init__(self, names)

        def __setitem__(self, name, value):
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name):
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace can't hold {name!r}")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": PlainNamespace,
    }
    return made


def main(cpu_seconds: int, memory_mib: int, longest: int) -> None:
    """Render the request of standard input. What fails is a reply, too; a process that is over its
    limits is killed without one."""
    made, request = environment(), json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file is written
    try:
        text = made.from_string(request["template"]).render(**request["values"])
        reply = {"text": text}
        if len(text) > longest:
            reply = {"failure": f"it makes {len(text)} characters of a prompt, over {longest}"}
    except MemoryError:
        reply = {"failure": f"it takes more than {memory_mib} MiB"}
    except Exception as error:
        reply = {"failure": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(reply))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
