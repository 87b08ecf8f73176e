"""`kdjax bench`: figures of this machine. `kdjax plan`: of one that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdjax.commands.arguments import first, new_file, option
from kdjax.errors import ConfigError


def bench(args: list[str]) -> None:
    from kdjax.bench import show_figures
    from kdjax.bench.head import HeadBench, bench_head
    from kdjax.bench.rollout import RolloutBench, bench_rollout
    from kdjax.bench.verifier import VerifierBench, bench_verifier
    from kdjax.config.overrides import override
    from kdjax.runtime.settings import check_settings

    check_settings()
    benches: dict[str, tuple[Any, Callable]] = {
        "head": (HeadBench(), bench_head),
        "rollout": (RolloutBench(), bench_rollout),
        "verifier": (VerifierBench(), bench_verifier),
    }
    what, rest = first(args, "kdjax bench head|rollout|verifier")
    if what not in benches:
        raise ConfigError(f"unknown bench {what!r}; there are {', '.join(benches)}")
    out = option(rest, "--out")
    default, measure = benches[what]
    sizes, file = override(default, rest, f"kdjax bench {what}"), new_file(out)
    show_figures(measure(sizes), sizes, file)


def plan(args: list[str]) -> None:
    from kdjax.config.overrides import load_file, override

    path, rest = first(args, "kdjax plan CONFIG")
    topology, out = option(rest, "--topology"), option(rest, "--out")
    config = override(load_file(path, "get_config"), rest, f"kdjax plan {path}")
    file = new_file(out)
    from kdjax.plan import plan as ahead
    from kdjax.plan.show import show, to_json
    from kdjax.runtime import files

    made = ahead.plan(config, topology or "local")
    show(made)
    if file is not None:
        files.write_json(file, to_json(made))
