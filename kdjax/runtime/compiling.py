"""The compilations of this process, as JAX tells of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def compilations(compiled: Callable[[float], None]) -> Iterator[None]:
    """compiled(seconds) at the end of whatever JAX traces, lowers or compiles meanwhile, in the
    thread that does it; of one program the trace ends before the long part begins."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            compiled(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
