"""`kdjax data check`: what a dataset holds."""

from __future__ import annotations

from kdjax.commands.arguments import first, new_file, option
from kdjax.errors import ConfigError


def run(args: list[str]) -> None:
    usage = "kdjax data check NAME_OR_FILE"
    what, rest = first(args, usage)
    if what != "check":
        raise ConfigError(f"unknown command data {what!r}; there is check: {usage}")
    target, rest = first(rest, usage)
    from kdjax import models
    from kdjax.config.overrides import override
    from kdjax.data.sources.check import DataCheck, check, to_json
    from kdjax.data.sources.show import show
    from kdjax.data.tokenizer import Wording, load_tokenizer
    from kdjax.runtime import files

    out = option(rest, "--out")
    asked = override(DataCheck(), rest, usage)
    file, student = new_file(out), None
    if asked.student is not None:
        wording = Wording(
            asked.prompt_template, asked.system_prompt, asked.thinking, asked.chat_template
        )
        student = load_tokenizer(models.find(asked.student), wording)
    found = check(target, asked.columns, asked.against, student)
    if file is not None:
        files.write_json(file, to_json(found))  # first: who reads the table may stop reading
    show(found)
