"""Weights to an engine, by a model folder that both see; and whether it then serves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.errors import EngineError
from kdjax.rollouts.engine_answer import parsed, shortened
from kdjax.rollouts.engine_client import Engine, Request, ask_all
from kdjax.rollouts.engine_scores import Speaks

Steps = list[tuple[str, dict[str, Any]]]


def reload(engine: Engine, speaks: Speaks, folder: Path, version: int) -> None:
    """The engine serves the weights of this folder when it returns: no row is in flight while they
    change, and nothing that was computed with others is kept.

    vLLM must be started with VLLM_SERVER_DEV_MODE=1. Errors: EngineError where it refuses, or says
    that it failed: its weights are then in no known state.
    """
    for path, body in STEPS[speaks](str(folder.resolve()), version):
        whose = f", {path} of version {version}"
        (text,) = ask_all(engine, path, [Request(body, whose)], lambda _, text: text)
        if _failed(text):
            raise EngineError(f"engine at {engine.url}{whose}: it failed: {shortened(text)}")


def _failed(text: str) -> bool:
    """Whether an answer of 200 says that it did nothing: an engine's own "success": false."""
    try:
        answer = parsed(text)
    except ValueError:  # vLLM's answers to some have no body
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def _steps_of_vllm(folder: str, version: int) -> Steps:
    load = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return [
        ("/pause?mode=wait", {}),
        ("/collective_rpc", load),
        ("/reset_prefix_cache", {}),
        ("/resume", {}),
    ]


def _steps_of_sglang(folder: str, version: int) -> Steps:
    load = {"model_path": folder, "flush_cache": True, "weight_version": str(version)}
    return [("/update_weights_from_disk", load)]


STEPS: dict[Speaks, Callable[[str, int], Steps]] = {
    "vllm": _steps_of_vllm,
    "sglang": _steps_of_sglang,
}
"""The requests that make an engine read a folder: (folder, version) -> (path, body) of each."""

FOLLOWED, NOISE = 0.25, 4.0


def open_check(limit_nats: float) -> Callable[[np.ndarray, np.ndarray, str], float]:
    """check(said, own, of) -> the root mean square of their difference, in nats: an engine's
    log-probabilities of fixed tokens after a publication, and the trainer's with those weights.

    The first may differ by limit_nats: another program, another dtype. A later one by a quarter of
    what the weights have moved since the last, and 4 times that first difference: an engine that
    kept the old weights, or half of them, is off by all of it, or half. of: named in the error.

    Errors: EngineError where they differ by more.

    >>> check, old, new = open_check(0.1), np.array([-1.0, -2.0]), np.array([-1.1, -1.9])
    >>> round(check(old, old, "v0") + check(new, new, "v1"), 3)
    0.0
    >>> check(new, new + 0.1, "v2")
    Traceback (most recent call last):
    kdjax.errors.EngineError: v2: it serves other weights: log p differs by 0.1 nats, where the ...
    """
    noise, last = [0.0], list[np.ndarray]()

    def check(said: np.ndarray, own: np.ndarray, of: str) -> float:
        gap = float(np.sqrt(np.mean((said - own) ** 2)))
        allowed, moved = limit_nats, ""
        if last:
            step = float(np.sqrt(np.mean((own - last[0]) ** 2)))
            allowed = min(limit_nats, FOLLOWED * step + NOISE * noise[0] + 1e-6)
            moved = f" (the new weights moved it by {step:.2g})"
        if not gap <= allowed:
            raise EngineError(
                f"{of}: it serves other weights: log p differs by {gap:.2g} nats, where the"
                f" trainer's allow {allowed:.2g}{moved}; restart it from the run's student"
            )
        if not last:
            noise[0] = gap
        last[:] = [own]
        return gap

    return check
