"""`kdjax bench rollout`: how fast are responses drawn here, and how far is that from the memory?"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.base import PLAIN, Batch, Model, Params, Samples, Sampling
from kdjax.bench import Figure
from kdjax.bench.bandwidth import (
    Machine,
    level_rounds,
    level_seconds,
    lognormal_lengths,
    mixed_lengths,
    static_seconds,
)
from kdjax.bench.decoders import scanned_decode, static_batches
from kdjax.errors import ConfigError
from kdjax.models.decoder import init_params
from kdjax.models.known import KNOWN
from kdjax.rollouts.choose import choose
from kdjax.rollouts.decoding import Decoding, Prompts, decoder
from kdjax.rollouts.prefix import assemble_samples
from kdjax.rollouts.sampler import open_sampler
from kdjax.step.score import score

SMALL = models.DecoderConfig(2048, 256, 768, 6, 8, 4, 32)
"""5 million parameters: what a CPU core decodes in seconds."""


@dataclasses.dataclass(frozen=True)
class RolloutBench:
    """Sizes of `kdjax bench rollout`. The defaults are small enough for a CPU; on an accelerator:
    --model Qwen/Qwen3-0.6B-Base --dtype bfloat16 --batches 64 128 256 --window 1024 --rows 512
    --limit 2048 --soak 0.

    model: shapes of a released checkpoint; "small" has 5 million parameters. Weights are random:
    responses end by chance, a fifth of `limit` long on average.
    """

    model: str = "small"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batches: tuple[int, ...] = (8, 32)
    window: int = 512
    rows: int = 128
    limit: int = 512
    prompt: int = 32
    soak: int = 10_000
    repeats: int = 3
    skip: tuple[Literal["decode", "choose", "levels", "prefix", "model", "soak"], ...] = ()


class _Bench(NamedTuple):
    sizes: RolloutBench
    model: Model
    stacked: Params
    params: Params


def bench_rollout(sizes: RolloutBench) -> Iterator[Figure]:
    """Every figure, as it is measured. Errors: ConfigError for a model that is not known."""
    if sizes.model != "small" and sizes.model not in KNOWN:
        raise ConfigError(f"bench rollout: unknown model {sizes.model!r}; small, or {list(KNOWN)}")
    config = SMALL if sizes.model == "small" else KNOWN[sizes.model].config
    dtype = jnp.dtype(sizes.dtype)
    model = models.build(config, dtype, impl="auto")
    stacked = jax.jit(lambda key: models.narrow(init_params(config, key), dtype))(jax.random.key(0))
    bench = _Bench(sizes, model, stacked, models.unstacked(stacked))
    parts: dict[str, Callable[[_Bench], Iterator[Figure]]] = {
        "decode": _decode,
        "choose": _choose,
        "levels": _levels,
        "prefix": _prefix,
        "model": _bandwidth_model,
        "soak": _soak,
    }
    for name, measure in parts.items():
        if name not in sizes.skip:
            yield from measure(bench)


def _decode(bench: _Bench) -> Iterator[Figure]:
    """Tokens a second at several batch sizes with the window full, and what of the memory's
    bandwidth that is; the same decode with its layers under scan."""
    sizes, model, steps = bench.sizes, bench.model, 16
    copied = _copy_bandwidth(sizes.repeats)
    yield Figure("copy bandwidth", copied / 1e9, "GB/s", None, "read and written")
    programs = decoder(model, PLAIN)
    for rows in sizes.batches:
        state = programs.empty(bench.params, rows, sizes.window)
        cache = _bytes(state.cache)
        key, at = jax.random.key(0), np.int32(sizes.window - steps - 1)

        def decode(state: Decoding, key=key, at=at) -> Decoding:
            return programs.decode(bench.params, state, key, at, at, steps)[0]

        began = time.perf_counter()
        state = jax.block_until_ready(decode(state))
        compiled = time.perf_counter() - began
        seconds, state = _median(decode, state, sizes.repeats)
        speed, moved = rows * steps / seconds, (_bytes(bench.params) + cache) * steps
        on_gpu = jax.default_backend() == "gpu" and sizes.model == "Qwen/Qwen3-0.6B-Base"
        paper = on_gpu and rows == 128 and sizes.window == 1024
        name = f"{rows} rows, window {sizes.window}"
        yield Figure(f"decode, {name}", speed, "tokens/s")
        note = f"weights and cache once a token; {compiled:.1f} s to compile"
        floor, reach = moved / copied, 2.0 if paper else None
        yield Figure(f"decode / bandwidth floor, {name}", seconds / floor, "x", reach, note)
        scanned, start = scanned_decode(model, bench.stacked, rows, sizes.window, steps)
        cost, _ = _median(scanned, jax.block_until_ready(scanned(start)), sizes.repeats)
        yield Figure(f"decode / layers under scan, {name}", seconds / cost, "x", 1 / 3)


def _choose(bench: _Bench) -> Iterator[Figure]:
    """Drawing a token at the paper's vocabulary, beside drawing it from the whole distribution."""
    keys = jax.random.split(jax.random.key(0), 2)
    logits = 2.5 * jax.random.normal(keys[0], (16, 151_936))
    numbers = jax.random.uniform(keys[1], (16,))
    chosen = jax.jit(choose, static_argnums=2)
    ways = (Sampling(0.7), Sampling(0.7, 0.95), Sampling(0.7, 0.95, 20), Sampling(0.7, min_p=0.1))
    seconds = {}
    for how in ways:
        jax.block_until_ready(chosen(logits, numbers, how))
        draw = functools.partial(chosen, logits, numbers, how)
        seconds[how], _ = _median(lambda _, draw=draw: draw(), None, 3 * bench.sizes.repeats)
    plain = seconds[Sampling(0.7)]
    yield Figure("choose, a row of 151,936", plain / 16 * 1e3, "ms")
    for how, taken in list(seconds.items())[1:]:
        yield Figure(f"choose, {how} / without cuts", taken / plain, "x", 4.0)


def _levels(bench: _Bench) -> Iterator[Figure]:
    """Responses of mixed length: level by level, and in static batches with the same memory."""
    sizes = bench.sizes
    batch, stops = _prompts(bench, sizes.rows), _stops(bench)
    cache = _cache_bytes(bench, sizes.rows // 4)
    draw = open_sampler(bench.model, stop_ids=stops, rows=sizes.rows, cache_bytes=cache)

    def ours(_) -> Samples:
        return draw(bench.params, batch, jax.random.key(1), sizes.limit)

    def static(_) -> tuple[np.ndarray, np.ndarray]:
        return static_batches(
            bench.model, bench.params, batch, jax.random.key(1), sizes.limit, stops, sizes.rows // 4
        )

    began = time.perf_counter()
    samples = ours(None)
    first = time.perf_counter() - began
    other = static(None)
    same = float(np.mean(np.all(samples.tokens_bt == other[0], axis=1)))
    lengths = np.asarray(samples.length_b)
    note = f"{sizes.rows} rows, mean {lengths.mean():.0f}, longest {lengths.max()}"
    seconds, _ = _median(ours, None, sizes.repeats)
    slow, _ = _median(static, None, sizes.repeats)
    yield Figure("rollouts, level by level", lengths.sum() / seconds, "tokens/s", None, note)
    yield Figure("rollouts, compile seconds", first - seconds, "s")
    about = (
        "where rounding of a cache prefilled again turned a draw from a nearly flat distribution"
    )
    yield Figure("rollouts, rows that differ from static", 1 - same, "", None, about)
    yield Figure("level by level / static batches", seconds / slow, "x", 1 / 1.5)
    rounds = level_rounds(lengths, sizes.prompt, sizes.limit, lambda slots: sizes.rows)
    places = sum(round_.rows * round_.steps for round_ in rounds)
    yield Figure("batch occupancy", lengths.sum() / places, "", None, "tokens a place decoded")


def _prefix(bench: _Bench) -> Iterator[Figure]:
    """Prefill of 8 samples a prompt, which share it, beside 8 prefills."""
    width, rows = 8 * bench.sizes.prompt, 64
    programs = decoder(bench.model, PLAIN)
    tokens = np.asarray(_random(bench, rows, width), np.int32)
    lengths = np.full(rows, width, np.int32)
    seconds = {}
    for name, distinct in (("apart", rows), ("shared", rows // 8)):
        which = (np.arange(rows) * distinct // rows).astype(np.int32)
        prompts = Prompts(tokens[:distinct], lengths[:distinct], which, which)

        def prefill(state: Decoding, prompts=prompts) -> Decoding:
            return programs.prefill(bench.params, state, prompts, np.int32(0), width)

        state = prefill(programs.empty(bench.params, rows, width + 16))
        seconds[name], _ = _median(prefill, state, bench.sizes.repeats)
    yield Figure("prefill", rows * width / seconds["apart"], "tokens/s")
    ratio = seconds["shared"] / seconds["apart"]
    yield Figure("prefill of 8 samples a prompt / apart", ratio, "x", 0.2)


def _bandwidth_model(bench: _Bench) -> Iterator[Figure]:
    """The sampler's schedule and static batches on an H100, by arithmetic (bench/bandwidth.py)."""
    del bench
    for name, lengths in (
        ("geometric, mean a fifth", mixed_lengths(1024, 4096)),
        ("lognormal, mean 1,014", lognormal_lengths(1024, 4096)),
    ):
        ours, static = (f(lengths, 192, 4096, Machine()) for f in (level_seconds, static_seconds))
        note = f"{lengths.sum() / ours:.0f} tokens/s by the model; Qwen3-0.6B, 1,024 rows to 4,096"
        yield Figure(f"H100 model: levels / static, {name}", ours / static, "x", 0.2, note)


def _soak(bench: _Bench) -> Iterator[Figure]:
    """Many sequences through a batch of 64: what memory grows by, and every response scored again
    from its own tokens alone."""
    sizes, count = bench.sizes, min(500, max(1, bench.sizes.soak))
    limit = sizes.limit // 8
    draw = open_sampler(bench.model, stop_ids=_stops(bench, 8), rows=64)
    scorer = jax.jit(lambda rollout: score(bench.model, bench.stacked, None, None, rollout))
    gaps, held = [], []
    for first in range(0, sizes.soak, count):
        batch = _prompts(bench, count, first)
        samples = draw(bench.params, batch, jax.random.key(2), limit)
        scores = scorer(assemble_samples(batch, samples))
        gap = np.abs(np.asarray(scores.student_logp) - samples.logp_bt)
        gaps.append(gap[np.asarray(scores.mask)])
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    if not held:
        return
    grown = (held[-1] - held[len(held) // 2]) / 2**20
    gap, exact = np.concatenate(gaps), sizes.dtype == "float32"
    note = f"{sizes.soak} sequences, {len(gap)} tokens, each scored from its own tokens alone"
    for name, value, reach in (
        ("mean", gap.mean(), None if exact else 0.02),
        ("99 of 100 below", np.quantile(gap, 0.99), None),
        ("largest", gap.max(), 1e-4 if exact else None),
    ):
        yield Figure(f"soak: sampler - scorer, {name}", float(value), "nats", reach, note)
    yield Figure("soak: memory grown in its second half", grown, "MiB", 0.0)


def _random(bench: _Bench, rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, bench.model.config.vocab_size, (rows, width))


def _prompts(bench: _Bench, rows: int, first: int = 0) -> Batch:
    """Random prompts of a fourth to the whole of the width."""
    width = bench.sizes.prompt
    tokens = _random(bench, rows, width, first).astype(np.int32)
    lengths = np.random.default_rng(first).integers(width // 4, width + 1, rows).astype(np.int32)
    none = np.zeros((rows, 1), np.int32)
    row = np.arange(first, first + rows, dtype=np.int32)
    return Batch(tokens, lengths, none, none[:, 0], none[:, 0] > 0, row)


def _stops(bench: _Bench, times: int = 1) -> tuple[int, ...]:
    """So many stop ids that a nearly uniform distribution ends after limit / (5 times) tokens."""
    vocabulary = bench.model.config.vocab_size
    return tuple(range(0, vocabulary, max(1, bench.sizes.limit // (5 * times))))


def _cache_bytes(bench: _Bench, rows: int) -> float:
    slots = bench.sizes.prompt + bench.sizes.limit
    return float(_bytes(jax.eval_shape(lambda: bench.model.init_cache(rows, slots))))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    x = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds, _ = _median(add, add(x), repeats)
    return 2 * x.size * 4 / seconds


def _median(function: Callable, argument: Any, repeats: int) -> tuple[float, Any]:
    """(median seconds, the last result), each call given the result of the one before."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        argument = jax.block_until_ready(function(argument))
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)), argument
