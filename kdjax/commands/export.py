"""`kdjax export` and `kdjax export-adapter`: a trained student as others read it."""

from __future__ import annotations

from kdjax.commands.arguments import option
from kdjax.errors import ConfigError


def run(args: list[str]) -> None:
    from kdjax.export import NEWEST, export

    rest = list(args)
    dtype, step = option(rest, "--dtype") or "float32", option(rest, "--step") or NEWEST
    if len(rest) != 2 or not all(rest) or dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            "usage: kdjax export RUN OUT [--dtype float32|bfloat16] [--step newest|best|N]"
        )
    run, out = rest
    export(run, out, dtype, step)
    print(f"wrote {out}: a Hugging Face folder in {dtype}")


def run_adapter(args: list[str]) -> None:
    from kdjax.export import NEWEST, export_adapter

    rest = list(args)
    step = option(rest, "--step") or NEWEST
    if len(rest) != 2 or not all(rest):
        raise ConfigError("usage: kdjax export-adapter RUN OUT [--step newest|best|N]")
    run, out = rest
    export_adapter(run, out, step)
    print(f"wrote {out}: a peft adapter")
