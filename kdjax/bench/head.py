"""`kdjax bench head`: is the loss head right, exact, small and fast on this machine?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kdjax.base import random_key
from kdjax.bench import Figure, if_it_fits, medians
from kdjax.bench.baselines import Inputs, checkpointed, dense, forward, sampled_token
from kdjax.errors import ConfigError
from kdjax.losses.combinators import at_temperature, mix
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.losses.objectives import divergence
from kdjax.numerics import LMHead
from kdjax.runtime import topology
from kdjax.step.head import TeacherStates, head_loss
from kdjax.step.score import token_function

VOCABULARY = 151_936
"""The paper's pair's."""


@dataclasses.dataclass(frozen=True)
class HeadBench:
    """Sizes of `kdjax bench head`. The defaults are small enough for a CPU core; on an accelerator
    take those of the paper's pair: --tokens 16384 --vocabulary 151936 --student_width 1024
    --teacher_width 2560 --dtype bfloat16 --chunk 1024."""

    tokens: int = 1024
    vocabulary: int = 18_992
    student_width: int = 256
    teacher_width: int = 640
    dtype: Literal["float32", "bfloat16"] = "float32"
    chunk: int = 256
    masked: float = 0.0  # share of tokens outside the loss
    repeats: int = 5
    memory_tokens: int = 16_384  # the memory rows compile the paper's pair, on 16,384 tokens
    targets: tuple[str, ...] = ("here", "h100", "v5e:2x2")
    skip: tuple[Literal["exact", "precision", "memory", "time"], ...] = ()


def bench_head(sizes: HeadBench) -> Iterator[Figure]:
    """Every figure, as it is measured. Errors: ConfigError for sizes that can't be."""
    if sizes.tokens % sizes.chunk or not 0 <= sizes.masked < 1:
        raise ConfigError("bench head: chunk must divide tokens, and masked lie in [0, 1)")
    parts = {"exact": _exactness, "precision": _precision, "memory": _memory, "time": _times}
    for name, measure in parts.items():
        if name not in sizes.skip:
            yield from measure(sizes)


def _inputs(
    tokens: int,
    vocabulary: int,
    widths,
    dtype,
    deviation=3.0,
    masked=0.0,
    noise: float | None = None,
) -> Inputs:
    """Random inputs whose logits have a standard deviation; `noise` makes the student a disturbed
    teacher of the same width."""
    keys, wide = jax.random.split(random_key(0), 6), jnp.promote_types(dtype, jnp.float32)
    shapes = [(rows, width) for rows in (tokens, vocabulary) for width in widths]
    drawn = [jax.random.normal(k, s, wide) for k, s in zip(keys[:4], shapes, strict=True)]
    hidden, theirs = drawn[:2]
    weight, their_weight = (w * (deviation / w.shape[1] ** 0.5) for w in drawn[2:])
    if noise is not None:
        hidden, weight = theirs + noise * hidden, their_weight + 0.2 * noise * weight
    targets = jax.random.randint(keys[4], (tokens,), 0, vocabulary)
    kept = jax.random.uniform(keys[5], (tokens,)) >= masked
    a, b, c, d = (x.astype(dtype) for x in (hidden, weight, theirs, their_weight))
    return Inputs(a, b, c, d, targets, kept.astype(wide) / tokens)


def _ours(loss: Callable, chunk: int, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    hidden, weight_vd, states, table, targets, weights = inputs
    total, scores = head_loss(
        token_function(loss, divergence),
        hidden,
        LMHead(weight_vd),
        TeacherStates(states, LMHead(table)),
        {"targets": targets, "sampler_logp": jnp.zeros_like(weights)},
        weights,
        weights > 0,
        chunk=chunk,
    )
    left_out = ("mask", "sampler_logp", "divergence")
    kept = {k: v for k, v in scores._asdict().items() if v is not None and k not in left_out}
    return total, kept


def _ranked(loss: Callable, chunk: int, inputs: Inputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `_ours`, of the 40 % of the tokens with most forward KL, by a first pass over all."""
    constants = inputs._replace(
        hidden=jax.lax.stop_gradient(inputs.hidden),
        weight_vd=jax.lax.stop_gradient(inputs.weight_vd),
    )
    _, scores = _ours(loss, chunk, constants)
    least = jnp.quantile(scores["forward_kl"], 0.6)
    chosen = jnp.where(scores["forward_kl"] > least, inputs.weights, 0)
    return _ours(loss, chunk, inputs._replace(weights=chosen))[0], scores


def _both_ways(function: Callable, *settings: Any) -> Callable:
    """(inputs) -> ((total, statistics), (by hidden, by head)) of function(*settings, inputs)."""

    def of(hidden, weight_vd, inputs: Inputs):
        return function(*settings, inputs._replace(hidden=hidden, weight_vd=weight_vd))

    both = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda inputs: both(inputs.hidden, inputs.weight_vd, inputs))


def _reverse(q: jax.Array, p: jax.Array) -> jax.Array:
    return forward(p, q)


def _mixed(q: jax.Array, p: jax.Array) -> jax.Array:
    return 0.3 * forward(q, p) + 0.7 * forward(p, q)


def _tempered(q: jax.Array, p: jax.Array) -> jax.Array:
    return _mixed(jax.nn.log_softmax(q / 2), jax.nn.log_softmax(p / 2))


def _jensen_shannon(q: jax.Array, p: jax.Array) -> jax.Array:
    middle = jnp.logaddexp(q, p) - jnp.log(2.0).astype(q.dtype)
    return 0.5 * (forward(middle, q) + forward(middle, p))


MIX = mix(forward_kl, reverse_kl, weight=0.3)


def _general(q: jax.Array, p: jax.Array) -> jax.Array:
    return MIX(q, p)  # a function that says no closed form


LOSSES: dict[str, tuple[Callable, Callable]] = {
    "forward KL": (forward_kl, forward),
    "reverse KL": (reverse_kl, _reverse),
    "0.3 forward": (MIX, _mixed),
    "0.3 forward, general path": (_general, _mixed),
    "0.3 forward at temperature 2": (at_temperature(MIX, 2.0), _tempered),
    "Jensen-Shannon": (_jensen_shannon, _jensen_shannon),
}
"""(the loss as the head takes it, the loss by its definition)"""


def _exactness(_: HeadBench) -> Iterator[Figure]:
    """float64 against dense autodiff: 37 tokens in chunks of 16, a fifth masked; the largest
    difference of any array, relative to that array's largest entry."""
    with jax.enable_x64(True):
        draw = functools.partial(_inputs, 37, 501, dtype=jnp.float64, masked=0.2)
        cases = draw((16, 24)), draw((24, 24), deviation=30.0, noise=0.1)
        for name, (loss, definition) in LOSSES.items():
            programs = _both_ways(_ours, loss, 16), _both_ways(dense, definition)
            pairs = [
                pair
                for inputs in cases
                for pair in zip(*(jax.tree.leaves(f(inputs)) for f in programs), strict=True)
            ]
            worst = max(
                float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-300))
                for a, b in pairs
            )
            yield Figure(f"float64 error, {name}", worst, "", 1e-11, "value, dH, dW, statistics")


def _precision(_: HeadBench) -> Iterator[Figure]:
    """bfloat16 inputs at the full vocabulary against float64 arithmetic on the same inputs."""
    for noise in (0.07, 0.0073):
        inputs = _inputs(48, VOCABULARY, (256, 256), jnp.bfloat16, 30.0, noise=noise)
        for name in ("forward KL", "reverse KL"):
            loss, definition = LOSSES[name]
            (ours, _), (_, by_head) = _both_ways(_ours, loss, 16)(inputs)
            with jax.enable_x64(True):
                wide = Inputs(*(jnp.asarray(x, jnp.float64) for x in inputs))
                wide = wide._replace(targets=inputs.targets)
                (kl, _), (_, wanted) = _both_ways(dense, definition)(wide)
                difference = jnp.linalg.norm(jnp.asarray(by_head, jnp.float64) - wanted)
                error = float(difference / jnp.linalg.norm(wanted))
            at = f"{name} {float(kl):.2g}"  # the weights are 1 / tokens
            yield Figure(f"bfloat16 dW error, {at}", error, "", 3e-3, "V = 151,936, logits ±30")
            value = abs(float(ours) / float(kl) - 1)
            yield Figure(f"bfloat16 value error, {at}", value, "", 1e-4)


def _memory(sizes: HeadBench) -> Iterator[Figure]:
    """Temporaries of the compiled value and gradient, 0.6B student and 4B teacher, not run."""
    reach = {"h100": 1.8, "v5e:2x2": 2.7}
    pair = functools.partial(_inputs, sizes.memory_tokens, VOCABULARY, (1024, 2560), jnp.bfloat16)
    for target in sizes.targets:
        try:
            device = topology.devices(target)[0]
        except ConfigError as error:
            yield Figure(f"temporaries, one pass, {target}", None, "GiB", None, str(error))
            continue
        chunk = 64 if device.platform == "cpu" else 1024
        ours = _temporaries(_both_ways(_ours, MIX, chunk), pair, device)
        naive = _temporaries(_both_ways(dense, _mixed), pair, device)
        limit = reach.get(target) or (naive and naive / 20)
        yield Figure(f"temporaries, one pass, {target}", ours, "GiB", limit, f"chunk {chunk}")
        note = "" if naive else "does not fit the device"
        yield Figure(f"temporaries, naive, {target}", naive, "GiB", None, note)


def _temporaries(program: Any, inputs: Callable[[], Inputs], device: jax.Device) -> float | None:
    """GiB, or None where the compiler finds that it does not fit."""
    here = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), jax.eval_shape(inputs)
    )
    with topology.uncached():
        compiled = if_it_fits(lambda: program.lower(shapes).compile())
    return compiled and compiled.memory_analysis().temp_size_in_bytes / 2**30


def _times(sizes: HeadBench) -> Iterator[Figure]:
    """Median seconds of value and gradient, and the ratios that decide."""
    widths = (sizes.student_width, sizes.teacher_width)
    dtype = jnp.dtype(sizes.dtype)
    inputs = _inputs(sizes.tokens, sizes.vocabulary, widths, dtype, masked=sizes.masked)
    programs = {
        "one pass": _both_ways(_ours, MIX, sizes.chunk),
        "one pass, general path": _both_ways(_ours, _general, sizes.chunk),
        "checkpointed chunks": _both_ways(checkpointed, _mixed, sizes.chunk),
        "scores, then 40 % of the tokens": _both_ways(_ranked, MIX, sizes.chunk),
        "sampled token, dense": _both_ways(sampled_token),
        "naive": _both_ways(dense, _mixed),
    }
    runs = {name: functools.partial(program, inputs) for name, program in programs.items()}
    fitting = {name: run for name, run in runs.items() if if_it_fits(run) is not None}
    taken = medians(fitting, sizes.repeats)
    platform = jax.default_backend()
    for name, value in taken.items():
        reach = 0.070 if name == "one pass" and platform == "gpu" else None
        yield Figure(f"time, {name}", value, "s", reach)
    for one, other, reach in (
        ("one pass", "naive", 0.80 if platform == "cpu" else 1.05),
        ("one pass", "checkpointed chunks", 0.70),
        ("one pass, general path", "one pass", 1.15),
        ("scores, then 40 % of the tokens", "one pass", None),
        ("one pass", "sampled token, dense", None if platform == "cpu" else 1.6),
    ):
        ratio = taken[one] / taken[other] if {one, other} <= taken.keys() else None
        yield Figure(f"{one} / {other}", ratio, "x", reach)
