"""`kdjax bench`: figures of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdjax.commands.arguments import first, new_file, option
from kdjax.errors import ConfigError


def run(args: list[str]) -> None:
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
