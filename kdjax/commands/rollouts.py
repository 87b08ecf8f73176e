"""`kdjax rollouts`: draw the responses of a config once, with what is kept of its teacher."""

from __future__ import annotations

import dataclasses

from kdjax.commands.arguments import first, option


def run(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override
    from kdjax.training.parts.precompute import fill, parse_share
    from kdjax.training.parts.precomputed import parse_keep

    path, rest = first(args, "kdjax rollouts CONFIG")
    out, keep, share = (option(rest, name) for name in ("--out", "--keep", "--share"))
    redo = "--redo" in rest
    rest = [arg for arg in rest if arg != "--redo"]
    config = override(load_file(path, "get_config"), rest, f"kdjax rollouts {path}")
    asked = parse_keep(keep), parse_share(share), redo
    import jax

    from kdjax.config.validation import validate
    from kdjax.training.parts.build import asked_of, build

    config = validate(dataclasses.replace(config, trajectories=None))
    parts = build(config, jax.local_devices())  # by itself, whatever other processes do
    for each in asked_of(parts, config.prefix).values():
        place, drawn = fill(each, out, *asked)
        print(f"{place}: {drawn} chunks drawn now, {len(each.rows)} responses in all")
