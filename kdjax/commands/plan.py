"""`kdjax plan`: will it fit, how fast could it be?"""

from __future__ import annotations

from kdjax.commands.arguments import first, new_file, option


def run(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override

    path, rest = first(args, "kdjax plan CONFIG")
    topology, out = option(rest, "--topology"), option(rest, "--out")
    config = override(load_file(path, "get_config"), rest, f"kdjax plan {path}")
    file = new_file(out)
    from kdjax.plan.plan import plan
    from kdjax.plan.show import show, to_json
    from kdjax.runtime import files

    made = plan(config, topology or "local")
    show(made)
    if file is not None:
        files.write_json(file, to_json(made))
