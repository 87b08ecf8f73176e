"""`kdjax bench head`: is the loss head right, exact, small and fast on this machine?"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from kdjax.bench import Figure, baselines
from kdjax.errors import ConfigError
from kdjax.losses.combinators import at_temperature, mix
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.losses.objectives import divergence
from kdjax.numerics import LMHead
from kdjax.runtime import topology
from kdjax.step.head import TeacherStates, head_loss
from kdjax.step.score import token_function

GIB = 2**30


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
    if "exact" not in sizes.skip:
        yield from _exactness()
    if "precision" not in sizes.skip:
        yield from _precision()
    if "memory" not in sizes.skip:
        yield from _memory(sizes)
    if "time" not in sizes.skip:
        yield from _times(sizes)


class _Inputs(NamedTuple):
    hidden: Any
    weight_vd: Any
    teacher_hidden: Any
    teacher_weight_vd: Any
    targets: Any
    weights: Any


def _inputs(
    seed: int, tokens, vocabulary, widths, dtype, deviation=3.0, masked=0.0, noise=None
) -> _Inputs:
    """Random inputs whose logits have a standard deviation; `noise` makes the student a disturbed
    teacher of the same width."""
    keys = jax.random.split(jax.random.key(seed), 6)
    wide = jnp.promote_types(dtype, jnp.float32)

    def normal(key, *shape):
        return jax.random.normal(key, shape, wide)

    hidden, teacher_hidden = (normal(k, tokens, w) for k, w in zip(keys, widths, strict=False))
    weight, teacher_weight = (
        normal(k, vocabulary, w) * (deviation / w**0.5)
        for k, w in zip(keys[2:], widths, strict=False)
    )
    if noise is not None:
        hidden = teacher_hidden + noise * hidden
        weight = teacher_weight + 0.2 * noise * weight
    targets = jax.random.randint(keys[4], (tokens,), 0, vocabulary)
    kept = jax.random.uniform(keys[5], (tokens,)) >= masked
    a, b, c, d = (x.astype(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight))
    return _Inputs(a, b, c, d, targets, kept.astype(wide) / tokens)


def _ours(loss, chunk: int, inputs: _Inputs, objective=divergence):
    teacher = TeacherStates(inputs.teacher_hidden, LMHead(inputs.teacher_weight_vd))
    extra = {"targets": inputs.targets, "sampler_logp": jnp.zeros_like(inputs.weights)}
    total, scores = head_loss(
        token_function(loss, objective),
        inputs.hidden,
        LMHead(inputs.weight_vd),
        teacher,
        extra,
        inputs.weights,
        inputs.weights > 0,
        chunk=chunk,
    )
    kept = {k: v for k, v in scores._asdict().items() if k not in ("mask", "sampler_logp")}
    return total, {k: v for k, v in kept.items() if v is not None and k != "divergence"}


def _differentiated(function: Callable, undifferentiated: bool = False):
    """(inputs) -> ((total, statistics), (by hidden, by weight)), jitted."""

    def both(hidden, weight_vd, inputs: _Inputs):
        return function(inputs._replace(hidden=hidden, weight_vd=weight_vd))

    made = both if undifferentiated else jax.value_and_grad(both, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda inputs: made(inputs.hidden, inputs.weight_vd, inputs))


def _mixed(first: Callable, second: Callable) -> Callable:
    return lambda q, p: 0.3 * first(q, p) + 0.7 * second(q, p)


def _jensen_shannon(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    middle = jnp.logaddexp(student_logp, teacher_logp) - jnp.log(2.0).astype(student_logp.dtype)
    first, second = (baselines.forward(middle, x) for x in (student_logp, teacher_logp))
    return 0.5 * (first + second)


def _tempered(q: jax.Array, p: jax.Array) -> jax.Array:
    return MIXED[1](jax.nn.log_softmax(q / 2), jax.nn.log_softmax(p / 2))


MIXED = mix(forward_kl, reverse_kl, weight=0.3), _mixed(baselines.forward, baselines.reverse)
GENERAL = lambda q, p: MIXED[0](q, p), MIXED[1]
FORWARD, REVERSE = (forward_kl, baselines.forward), (reverse_kl, baselines.reverse)
LOSSES: dict[str, tuple[Callable, Callable]] = {
    "forward KL": FORWARD,
    "reverse KL": REVERSE,
    "0.3 forward": MIXED,
    "0.3 forward, general path": GENERAL,
    "0.3 forward at temperature 2": (at_temperature(MIXED[0], 2.0), _tempered),
    "Jensen-Shannon": (_jensen_shannon, _jensen_shannon),
}
"""(the loss as the head takes it, the loss by its definition)"""


def _exactness() -> Iterator[Figure]:
    """float64 against dense autodiff: 37 tokens in chunks of 16, a fifth masked."""
    with jax.enable_x64(True):
        for name, (loss, definition) in LOSSES.items():
            worst = 0.0
            for widths, deviation, noise in (((16, 24), 3.0, None), ((24, 24), 30.0, 0.1)):
                inputs = _inputs(
                    0, 37, 501, widths, jnp.float64, deviation, masked=0.2, noise=noise
                )
                ours = _differentiated(functools.partial(_ours, loss, 16))(inputs)
                wanted = _differentiated(_masked(functools.partial(_dense, definition)))(inputs)
                worst = max(worst, _relative(ours, wanted))
            yield Figure(f"float64 error, {name}", worst, "", 1e-11, "value, dH, dW, statistics")


def _dense(definition: Callable, inputs: _Inputs):
    return baselines.dense(definition, *inputs)


def _masked(function: Callable) -> Callable:
    def with_zeros(inputs: _Inputs):
        total, statistics = function(inputs)
        kept = inputs.weights > 0
        return total, jax.tree.map(lambda s: jnp.where(kept, s, 0.0), statistics)

    return with_zeros


def _relative(ours, wanted) -> float:
    """The largest difference of any array, relative to that array's largest entry."""
    return max(
        float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-300))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    )


def _precision() -> Iterator[Figure]:
    """bfloat16 inputs at the full vocabulary against float64 arithmetic on the same inputs."""
    for noise in (0.07, 0.0073):
        inputs = _inputs(0, 48, 151_936, (256, 256), jnp.bfloat16, 30.0, noise=noise)
        for name, (loss, definition) in (("forward KL", FORWARD), ("reverse KL", REVERSE)):
            ours = _differentiated(functools.partial(_ours, loss, 16))(inputs)
            with jax.enable_x64(True):
                wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
                wide = wide._replace(targets=inputs.targets)
                wanted = _differentiated(functools.partial(_dense, definition))(wide)
                kl = float(wanted[0][0])  # the weights are 1 / tokens
                by_weight = _frobenius(ours[1][1], wanted[1][1])
                value = abs(float(ours[0][0]) / float(wanted[0][0]) - 1)
            at = f"{name} {kl:.2g}"
            yield Figure(f"bfloat16 dW error, {at}", by_weight, "", 3e-3, "V = 151,936, logits ±30")
            yield Figure(f"bfloat16 value error, {at}", value, "", 1e-4)


def _frobenius(ours, wanted) -> float:
    difference = jnp.asarray(ours, jnp.float64) - wanted
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))


def _memory(sizes: HeadBench) -> Iterator[Figure]:
    """Temporaries of the compiled value and gradient, 0.6B student and 4B teacher, not run."""
    reach = {"h100": 1.8, "v5e:2x2": 2.7}
    pair = sizes.memory_tokens, 151_936, (1024, 2560), jnp.bfloat16
    for target in sizes.targets:
        try:
            device = topology.devices(target)[0]
        except ConfigError as error:
            yield Figure(f"temporaries, one pass, {target}", None, "GiB", None, str(error))
            continue
        chunk = 64 if device.platform == "cpu" else 1024
        ours = _temporaries(functools.partial(_ours, MIXED[0], chunk), pair, device)
        naive = _temporaries(functools.partial(_dense, MIXED[1]), pair, device)
        limit = reach.get(target) or (naive and naive / 20)
        yield Figure(f"temporaries, one pass, {target}", ours, "GiB", limit, f"chunk {chunk}")
        note = "" if naive else "does not fit the device"
        yield Figure(f"temporaries, naive, {target}", naive, "GiB", None, note)


def _temporaries(function: Callable, pair, device: jax.Device) -> float | None:
    """GiB, or None where the compiler finds that it does not fit."""
    here = SingleDeviceSharding(device)
    shapes = jax.eval_shape(lambda: _inputs(0, *pair))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    try:
        with topology.uncached():
            compiled = _differentiated(function).lower(shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    return compiled.memory_analysis().temp_size_in_bytes / GIB


def _times(sizes: HeadBench) -> Iterator[Figure]:
    """Median seconds of value and gradient, and the ratios that decide."""
    dtype = jnp.dtype(sizes.dtype)
    widths = (sizes.student_width, sizes.teacher_width)
    inputs = _inputs(0, sizes.tokens, sizes.vocabulary, widths, dtype, masked=sizes.masked)
    ours = functools.partial(_ours, MIXED[0], sizes.chunk)
    programs = {
        "one pass": _differentiated(ours),
        "one pass, general path": _differentiated(
            functools.partial(_ours, GENERAL[0], sizes.chunk)
        ),
        "one pass, undifferentiated": _differentiated(ours, undifferentiated=True),
        "checkpointed chunks": _differentiated(
            lambda x: baselines.checkpointed(MIXED[1], sizes.chunk, *x)
        ),
        "sampled token, dense": jax.jit(
            lambda x: jax.value_and_grad(baselines.sampled_token, argnums=(0, 1))(
                x.hidden, x.weight_vd, x.targets, x.weights
            )
        ),
        "naive": _differentiated(functools.partial(_dense, MIXED[1])),
    }
    seconds = _medians(programs, inputs, sizes.repeats)
    for name, value in seconds.items():
        reach = 0.070 if name == "one pass" and jax.default_backend() == "gpu" else None
        yield Figure(f"time, {name}", value, "s", reach)
    on_cpu = jax.default_backend() == "cpu"
    against = {
        ("one pass", "naive"): 0.80 if on_cpu else 1.05,
        ("one pass", "checkpointed chunks"): 0.70,
        ("one pass, general path", "one pass"): 1.15,
        ("one pass", "sampled token, dense"): None if on_cpu else 1.6,
    }
    for (one, other), reach in against.items():
        ratio = seconds[one] / seconds[other] if one in seconds and other in seconds else None
        yield Figure(f"{one} / {other}", ratio, "x", reach)


def _medians(programs: dict[str, Callable], inputs: _Inputs, repeats: int) -> dict[str, float]:
    """Programs in turn, round after round, so that a busy minute hits all; those that fit."""
    ready: dict[str, Callable] = {}
    taken: dict[str, list[float]] = {}
    for name, program in programs.items():
        try:
            jax.block_until_ready(program(inputs))
            ready[name], taken[name] = program, []
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    for _ in range(repeats):
        for name, program in ready.items():
            began = time.perf_counter()
            jax.block_until_ready(program(inputs))
            taken[name].append(time.perf_counter() - began)
    return {name: float(np.median(each)) for name, each in taken.items()}
