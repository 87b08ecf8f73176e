"""Programs compiled for devices that are not here: what they would hold and send."""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest

from kdjax import topology
from kdjax.base import ConfigError
from kdjax.bench.head import HeadBench, bench_head

HERE = {"h100": "jax_plugins.xla_cuda13", "v5e:2x2": "libtpu"}
REASON = "its compiler is not installed: launch/aot.sh installs it and runs this"


def installed(target: str) -> bool:
    """Whether its compiler is; launch/aot.sh has just installed all, and leaves none out."""
    if os.environ.get("KDJAX_AOT") == "true":
        return True
    try:
        return importlib.util.find_spec(HERE[target]) is not None
    except ModuleNotFoundError:
        return False


compiled_for = pytest.mark.parametrize(
    "target",
    [
        pytest.param(t, marks=pytest.mark.skipif(not installed(t), reason=f"{t}: {REASON}"))
        for t in HERE
    ],
)


def test_here_are_the_devices():
    """`here` is this process's devices."""
    assert topology.devices("here") == jax.devices()


@pytest.mark.parametrize("target", ["v9z:2x2", "cray"])
def test_an_unknown_target(target):
    """A target that no compiler knows is one line that lists those there are."""
    with pytest.raises(
        ConfigError, match=rf"can't compile for {target}.*kdjax\[aot\].*h100"
    ) as caught:
        topology.devices(target)
    assert "\n" not in str(caught.value)


@compiled_for
def test_the_loss_head_fits(target):
    """0.6B student, 4B teacher, 16,384 tokens: temporaries of the pass are within reach."""
    sizes = HeadBench(skip=("exact", "precision", "time"), targets=(target,))
    ours, naive = bench_head(sizes)
    assert ours.met, ours
    assert naive.value is None or naive.value > 8 * ours.value


@compiled_for
def test_memory_grows_by_the_gradient_of_hidden_states_alone(target):
    """16,384 more tokens add their dH (twice: packed and in place) and numbers a token, no more."""
    small, large = (
        next(
            bench_head(
                HeadBench(
                    skip=("exact", "precision", "time"), targets=(target,), memory_tokens=tokens
                )
            )
        ).value
        for tokens in (16_384, 32_768)
    )
    hidden = 16_384 * 1024 * 2 / 2**30
    assert large - small < 3 * hidden + 0.01
