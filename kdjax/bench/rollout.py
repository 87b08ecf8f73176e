"""`kdjax bench rollout`: how fast are responses drawn here, and how far is that from the memory?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.base import PLAIN, Batch, Model, Params, Sampling, random_key
from kdjax.bench import Figure, bandwidth, medians
from kdjax.bench.bandwidth import LENGTHS, level_rounds, level_seconds, static_seconds
from kdjax.bench.baselines import scanned_decode, static_batches
from kdjax.errors import ConfigError
from kdjax.models.known import KNOWN
from kdjax.models.parameters import init_params
from kdjax.models.shape import layer_kinds
from kdjax.rollouts.choose import choose
from kdjax.rollouts.decoding import Prompts, decoder
from kdjax.rollouts.prefix import assemble_samples
from kdjax.rollouts.sampler import open_sampler, row_bytes
from kdjax.step.score import score

SMALL = models.DecoderConfig(2048, 256, 768, 6, 8, 4, 32)
"""5 million parameters: what a CPU core decodes in seconds."""

MODELLED = {
    "Qwen/Qwen3-0.6B-Base": 0.2,
    "Qwen/Qwen3.5-0.8B-Base": None,
    "google/gemma-3-1b-pt": None,
}
"""Models of the bandwidth model, one of each kind of cache, with what its levels should reach."""


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

    def prompts(self, rows: int, first: int = 0) -> Batch:
        """Random prompts of a fourth to the whole of the width."""
        random, width = np.random.default_rng(first), self.sizes.prompt
        tokens = random.integers(0, self.model.config.vocab_size, (rows, width)).astype(np.int32)
        lengths = np.random.default_rng(first).integers(width // 4, width + 1, rows)
        none, row = np.zeros((rows, 1), np.int32), np.arange(first, first + rows, dtype=np.int32)
        return Batch(tokens, lengths.astype(np.int32), none, none[:, 0], none[:, 0] > 0, row)

    def stops(self, times: int = 1) -> tuple[int, ...]:
        """So many stop ids that a nearly uniform distribution ends after limit / (5 times)
        tokens."""
        step = max(1, self.sizes.limit // (5 * times))
        return tuple(range(0, self.model.config.vocab_size, step))


def bench_rollout(sizes: RolloutBench) -> Iterator[Figure]:
    """Every figure, as it is measured. Errors: ConfigError for a model that is not known."""
    if sizes.model != "small" and sizes.model not in KNOWN:
        raise ConfigError(f"bench rollout: unknown model {sizes.model!r}; small, or {list(KNOWN)}")
    config = SMALL if sizes.model == "small" else KNOWN[sizes.model].config
    dtype = jnp.dtype(sizes.dtype)
    model = models.build(config, dtype, impl="auto")
    stacked = jax.jit(lambda key: models.narrow(init_params(config, key), dtype))(random_key(0))
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
    numbers = jnp.zeros(2**26, jnp.float32)
    add = _again(jax.jit(lambda x: x + 1, donate_argnums=0), numbers)
    copied = 2 * numbers.nbytes / medians({"": add}, sizes.repeats)[""]
    yield Figure("copy bandwidth", copied / 1e9, "GB/s", None, "read and written")
    programs, key, at = decoder(model, PLAIN), random_key(0), np.int32(sizes.window - steps - 1)
    weights = sum(x.nbytes for x in jax.tree.leaves(bench.params))
    a_row = bandwidth.row_bytes(model.config, jnp.dtype(sizes.dtype).itemsize)
    for rows in sizes.batches:

        def decode(state):
            return programs.decode(bench.params, state, key, at, at, steps)[0]

        runs = {"ours": _again(decode, programs.empty(bench.params, rows, sizes.window))}
        if len(set(layer_kinds(model.config))) == 1:  # or else layers have no one scan
            scanned = scanned_decode(model, bench.stacked, rows, sizes.window, steps)
            runs["scanned"] = _again(*scanned)
        taken = medians(runs, sizes.repeats)
        floor = steps * (weights + rows * a_row.moved(sizes.window)) / copied
        on_gpu = jax.default_backend() == "gpu" and sizes.model == "Qwen/Qwen3-0.6B-Base"
        reach = 2.0 if on_gpu and rows == 128 and sizes.window == 1024 else None
        name, note = f"{rows} rows, window {sizes.window}", "weights and cache once a token"
        yield Figure(f"decode, {name}", rows * steps / taken["ours"], "tokens/s")
        yield Figure(f"decode / bandwidth floor, {name}", taken["ours"] / floor, "x", reach, note)
        if "scanned" in taken:
            ratio = taken["ours"] / taken["scanned"]
            yield Figure(f"decode / layers under scan, {name}", ratio, "x", 1 / 3)


def _choose(bench: _Bench) -> Iterator[Figure]:
    """Drawing a token at the paper's vocabulary, beside drawing it from the whole distribution."""
    keys = jax.random.split(random_key(0), 2)
    logits = 2.5 * jax.random.normal(keys[0], (16, 151_936))
    numbers = jax.random.uniform(keys[1], (16,))
    ways = (Sampling(0.7), Sampling(0.7, 0.95), Sampling(0.7, 0.95, 20), Sampling(0.7, min_p=0.1))
    draw = functools.partial(jax.jit(choose, static_argnums=2), logits, numbers)
    runs = {str(how): functools.partial(draw, how) for how in ways}
    (_, plain), *cut = medians(runs, 3 * bench.sizes.repeats).items()
    yield Figure("choose, a row of 151,936", plain / 16 * 1e3, "ms")
    for how, taken in cut:
        yield Figure(f"choose, {how} / without cuts", taken / plain, "x", 4.0)


def _levels(bench: _Bench) -> Iterator[Figure]:
    """Responses of mixed length: level by level, and in static batches with the same memory."""
    sizes, model, rows = bench.sizes, bench.model, bench.sizes.rows // 4
    stops, key = bench.stops(), random_key(1)
    cache = rows * row_bytes(model, sizes.prompt + sizes.limit)
    draw = open_sampler(model, stop_ids=stops, rows=sizes.rows, cache_bytes=cache)
    drawn = bench.params, bench.prompts(sizes.rows), key, sizes.limit
    ours = functools.partial(draw, *drawn)
    static = functools.partial(static_batches, model, *drawn, stops, rows)
    samples = ours()
    lengths = np.asarray(samples.length_b)
    same = np.all(samples.tokens_bt == static()[0], axis=1)
    taken = medians({"levels": ours, "static": static}, sizes.repeats)
    note = f"{sizes.rows} rows, mean {lengths.mean():.0f}, longest {lengths.max()}"
    speed = lengths.sum() / taken["levels"]
    yield Figure("rollouts, level by level", speed, "tokens/s", None, note)
    note = "where rounding of a cache prefilled again turned a draw from a nearly flat distribution"
    yield Figure("rollouts, rows that differ from static", 1 - same.mean(), "", None, note)
    ratio = taken["levels"] / taken["static"]
    yield Figure("level by level / static batches", ratio, "x", 1 / 1.5)
    rounds = level_rounds(lengths, sizes.prompt, sizes.limit, lambda slots: sizes.rows)
    places = sum(round_.rows * round_.steps for round_ in rounds)
    yield Figure("batch occupancy", lengths.sum() / places, "", None, "tokens a place decoded")


def _prefix(bench: _Bench) -> Iterator[Figure]:
    """Prefill of 8 samples a prompt, which share it, beside 8 prefills."""
    width, rows, programs = 8 * bench.sizes.prompt, 64, decoder(bench.model, PLAIN)
    tokens = np.random.default_rng(0).integers(0, bench.model.config.vocab_size, (rows, width))
    lengths, runs = np.full(rows, width, np.int32), {}
    for name, distinct in (("apart", rows), ("shared", rows // 8)):
        which = (np.arange(rows) * distinct // rows).astype(np.int32)
        prompts = Prompts(tokens[:distinct].astype(np.int32), lengths[:distinct], which, which)

        def prefill(state, prompts=prompts):
            return programs.prefill(bench.params, state, prompts, np.int32(0), width)

        runs[name] = _again(prefill, programs.empty(bench.params, rows, width + 16))
    taken = medians(runs, bench.sizes.repeats)
    yield Figure("prefill", rows * width / taken["apart"], "tokens/s")
    ratio = taken["shared"] / taken["apart"]
    yield Figure("prefill of 8 samples a prompt / apart", ratio, "x", 0.2)


def _bandwidth_model(_: _Bench) -> Iterator[Figure]:
    """The sampler's schedule and static batches on an H100, by arithmetic (bench/bandwidth.py)."""
    for model, reach in MODELLED.items():
        machine, short = bandwidth.machine_of(KNOWN[model].config), model.split("/")[1]
        for name, draw in LENGTHS.items():
            lengths = draw(1024, 4096)
            ours, static = (f(lengths, 192, 4096, machine) for f in (level_seconds, static_seconds))
            note = f"{lengths.sum() / ours:.0f} tokens/s by the model; {short}, 1,024 rows to 4,096"
            yield Figure(
                f"H100 model: levels / static, {name}, {short}", ours / static, "x", reach, note
            )


def _soak(bench: _Bench) -> Iterator[Figure]:
    """Many sequences through a batch of 64: what memory grows by, and every response scored again
    from its own tokens alone."""
    sizes, count = bench.sizes, min(500, max(1, bench.sizes.soak))
    draw = open_sampler(bench.model, stop_ids=bench.stops(8), rows=64)
    scorer = jax.jit(lambda rollout: score(bench.model, bench.stacked, None, None, rollout))
    gaps, held = [], []
    for first in range(0, sizes.soak, count):
        batch = bench.prompts(count, first)
        samples = draw(bench.params, batch, random_key(2), sizes.limit // 8)
        scores = scorer(assemble_samples(batch, samples))
        gap = np.abs(np.asarray(scores.student_logp) - samples.logp_bt)
        gaps.append(gap[np.asarray(scores.mask)])
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    if not held:
        return
    gap, exact = np.concatenate(gaps), sizes.dtype == "float32"
    note = f"{sizes.soak} sequences, {len(gap)} tokens, each scored from its own tokens alone"
    for name, value, reach in (
        ("mean", gap.mean(), None if exact else 0.02),
        ("99 of 100 below", np.quantile(gap, 0.99), None),
        ("largest", gap.max(), 1e-4 if exact else None),
    ):
        yield Figure(f"soak: sampler - scorer, {name}", float(value), "nats", reach, note)
    grown = (held[-1] - held[len(held) // 2]) / 2**20
    yield Figure("soak: memory grown in its second half", grown, "MiB", 0.0)


def _again(function: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    """A run that gives the function its own last result, whose memory it may reuse."""

    def run() -> Any:
        nonlocal value
        value = function(value)
        return value

    return run
