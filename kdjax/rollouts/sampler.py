"""The sampler of this process: runs the programs of decoding.py over the levels of levels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kdjax.base import PLAIN, Batch, Key, Model, Params, Sampler, Samples, Sampling
from kdjax.errors import ConfigError
from kdjax.models.parameters import unstacked
from kdjax.rollouts.choose import Choice, check_sampling
from kdjax.rollouts.decoding import Decoder, Prompts, decoder, kept
from kdjax.rollouts.levels import (
    Level,
    bucket,
    equal_pieces,
    levels,
    prefill_rows,
    rounded_up,
    rows_decoded,
    rows_within,
)
from kdjax.sharding import KV_HEADS, batch_spec, data_size, pieces

ROWS = 512
"""Rows decoded at a time, at most."""

CACHE_BYTES = 2**28
"""The default limit of the KV cache on a device whose memory is not known, such as a CPU: 16 rows
of 350 tokens of a model of 135 M parameters, which keep two cores as busy as more would."""

Drawn = Callable[[int, int], None]
"""drawn(ended, tokens): of the responses of a draw so many have ended; all have so many tokens."""


def generate(
    model: Model,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    max_new_tokens: int,
    **settings: Any,
) -> Samples:
    """One response a row, drawn by `open_sampler(model, **settings)`.

    Args:
        model, params: layers stacked.
        batch: the prompts, B rows.
        key: with a row's number, decides its uniform numbers.
        max_new_tokens: T, the limit of a response.
        settings: as in `open_sampler`.
    """
    return open_sampler(model, **settings)(unstacked(params), batch, key, max_new_tokens)


def open_sampler(
    model: Model,
    *,
    stop_ids: Sequence[int],
    sampling: Sampling = PLAIN,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
    rows: int = ROWS,
    cache_bytes: float = CACHE_BYTES,
    drawn: Drawn = lambda ended, tokens: None,
) -> Sampler:
    """A sampler of a model whose parameters are `models.unstacked`; its Samples are on the host.

    Responses grow level by level (levels.py); rows with the same prompt share its prefill.

    Args:
        model: what is drawn from.
        stop_ids: the tokens that end a response.
        sampling: temperature and truncation.
        vocabulary: tokens that exist; logits past them are padding, never drawn. None: all.
        mesh: rows are sharded over its data axes.
        rows: decoded at a time, at most.
        cache_bytes: the most that the KV cache takes of a device.
        drawn: told after every check of the host how far a draw is.

    Errors: ConfigError for invalid sampling, no stop id or one beyond the vocabulary, and, when it
    draws, for an empty prompt, an unknown token or a limit under 1.
    """
    if not stop_ids:
        raise ConfigError("sampler: stop_ids is empty; a response needs a token that ends it")
    if vocabulary is not None and max(stop_ids) >= vocabulary:
        raise ConfigError(
            f"sampler: stop id {max(stop_ids)} is beyond the model's {vocabulary} tokens and would"
            " never be drawn; use the stop ids of the model's own tokenizer"
        )
    check_sampling(sampling)
    programs = decoder(model, sampling, vocabulary, mesh)
    devices = 1 if mesh is None else data_size(mesh)
    at_once = prefill_tokens(model, cache_bytes, mesh)

    def draw(params: Params, batch: Batch, key: Key, max_new_tokens: int) -> Samples:
        work = _Work(programs, params, key, mesh, devices, at_once, np.asarray(stop_ids), drawn)
        growing = _begin(batch, max_new_tokens, vocabulary)
        width = bucket(int(growing.prompt_length_b.max()), growing.prompt_bp.shape[1])
        for level in levels(max_new_tokens):
            a_row = row_bytes(model, level.slots(width), mesh)
            for group in _groups(growing, level, rows_within(cache_bytes, a_row, rows, devices)):
                _advance(work, growing, group, level, width)
        return growing.samples()

    return draw


def row_bytes(model: Model, slots: int, mesh: Mesh | None = None) -> float:
    """Bytes on a device of the cache of one row of so many slots: heads are sharded over the tensor
    axis where it divides them, all else is whole."""
    heads, total = pieces(mesh, KV_HEADS), 0.0
    for x in jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, slots))):
        sharded = x.ndim == 4 and x.shape[1] % heads == 0
        total += x.size * x.dtype.itemsize / (heads if sharded else 1)
    return total


def prefill_tokens(model: Model, cache_bytes: float, mesh: Mesh | None = None) -> float:
    """Tokens that a device prefills at a time, at most: their keys and values, which are made apart
    from the cache, take a quarter of its memory."""
    return cache_bytes / 4 / row_bytes(model, 1, mesh)


class _Work(NamedTuple):
    """The settings that all batches of a draw share; at_once: tokens that are prefilled at a time,
    at most."""

    programs: Decoder
    params: Params
    key: Key
    mesh: Mesh | None
    devices: int
    at_once: float
    stop_ids: np.ndarray
    drawn: Drawn

    def place(self, tree: Any) -> Any:
        return jax.device_put(tree, None if self.mesh is None else batch_spec(self.mesh))


class _Growing(NamedTuple):
    """Prompts and the responses so far, on the host; stop -1 is a row that continues."""

    prompt_bp: np.ndarray
    prompt_length_b: np.ndarray
    row_b: np.ndarray
    prompt_b: np.ndarray
    tokens_bt: np.ndarray
    logp_bt: np.ndarray
    sampler_logp_bt: np.ndarray
    entropy_bt: np.ndarray
    length_b: np.ndarray
    stop_b: np.ndarray

    def samples(self) -> Samples:
        return Samples(
            self.tokens_bt, self.length_b, self.logp_bt, self.sampler_logp_bt, self.entropy_bt,
            self.stop_b,
        )  # fmt: skip

    @property
    def ended(self) -> int:
        """Responses that will not grow."""
        return int(((self.stop_b >= 0) | (self.length_b == self.tokens_bt.shape[1])).sum())

    def prefix(self, row: int) -> np.ndarray:
        """Prompt and response so far."""
        prompt = self.prompt_bp[row, : self.prompt_length_b[row]]
        return np.concatenate([prompt, self.tokens_bt[row, : self.length_b[row]]])


def _begin(batch: Batch, max_new_tokens: int, vocabulary: int | None) -> _Growing:
    """The state before any token is drawn. Errors: ConfigError for an invalid prompt or limit."""
    prompts, lengths = np.asarray(batch.prompt_bp), np.asarray(batch.prompt_length_b)
    if max_new_tokens < 1:
        raise ConfigError(f"sampler: max_new_tokens must be at least 1, got {max_new_tokens}")
    if lengths.min() < 1:
        row = int(np.asarray(batch.row_b)[lengths.argmin()])
        raise ConfigError(
            f"sampler: the prompt of row {row} is empty; give it a token to begin with"
        )
    real = np.where(np.arange(prompts.shape[1])[None] < lengths[:, None], prompts, -1)
    if vocabulary is not None and real.max() >= vocabulary:
        raise ConfigError(
            f"sampler: a prompt holds id {real.max()}, beyond the model's {vocabulary} tokens;"
            " encode it with the model's own tokenizer"
        )
    rows, shape = len(lengths), (len(lengths), max_new_tokens)
    return _Growing(
        prompts,
        lengths,
        np.asarray(batch.row_b, np.int32),
        np.unique(real, axis=0, return_inverse=True)[1].reshape(-1),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(rows, np.int32),
        np.full(rows, -1, np.int32),
    )


def _groups(growing: _Growing, level: Level, most: int) -> Iterator[np.ndarray]:
    """The rows that continue at a level, up to `most` at a time: short prompts first, rows of the
    same prompt next to each other."""
    alive = np.flatnonzero((growing.stop_b < 0) & (growing.length_b == level.first))
    order = np.lexsort((growing.prompt_b[alive], growing.prompt_length_b[alive]))
    for first in range(0, len(alive), most):
        yield alive[order[first : first + most]]


def _advance(work: _Work, growing: _Growing, group: np.ndarray, level: Level, width: int) -> None:
    """Grow the responses of a group to their stop token, or to the level's end.

    `lanes` is the row that each place of the batch decodes, [devices, places]; -1 for none.

    Args:
        work: the draw's settings.
        growing: is updated.
        group: int [n], rows that continue.
        level: from its first token to its last.
        width: slots of the prompts.
    """
    programs, prefixes = work.programs, width + level.first
    size = rows_decoded(len(group), len(growing.length_b), work.devices)
    lanes = _sharded(group, work.devices, size)
    state = programs.empty(work.params, lanes.size, level.slots(width))
    for at, wide in _prompts(work, growing, lanes, level, prefixes):
        state = programs.prefill(work.params, state, work.place(wide), np.int32(at), prefixes)
    for round_ in range(level.rounds):
        done = round_ * level.steps
        pointer, position = np.int32(prefixes + done), np.int32(level.first + done)
        state, drawn = programs.decode(work.params, state, work.key, pointer, position, level.steps)
        drawn = jax.tree.map(np.asarray, drawn)
        lanes = _record(growing, lanes, drawn, level.first + done, level.last, work.stop_ids)
        work.drawn(growing.ended, int(growing.length_b.sum()))
        if (lanes < 0).all():
            return
        which = _survivors(lanes)
        if which.size < lanes.size and round_ + 1 < level.rounds:
            state = kept(programs, state, work.place(which.reshape(-1)))
            places = np.where(which < 0, 0, which)
            lanes = np.where(which < 0, -1, np.take_along_axis(lanes, places, axis=1))


def _sharded(group: np.ndarray, devices: int, size: int) -> np.ndarray:
    """Rows in equal blocks, `size` places in all, [devices, places]; -1 where there is none."""
    lanes = np.full((devices, size // devices), -1)
    for own, rows in zip(lanes, np.array_split(group, devices), strict=True):
        own[: len(rows)] = rows
    return lanes


def _prompts(
    work: _Work, growing: _Growing, lanes: np.ndarray, level: Level, widest: int
) -> Iterator[tuple[int, Prompts]]:
    """(first place, the prefixes of the rows from there on): as many rows at a time as have no more
    distinct prefixes than `prefill_rows`.

    Args:
        work, growing, level: as in `_advance`.
        lanes: int [devices, places].
        widest: slots of a prefix.
    """
    rows = np.where(lanes < 0, lanes.max(), lanes)
    begins = growing.prompt_b[rows] if level.first == 0 else rows  # rows of one prefix, one number

    def distinct(at: int, count: int) -> int:
        return max(len(np.unique(own[at : at + count])) for own in begins)

    def prefilled(at: int, count: int) -> int:
        return min(count, rounded_up(distinct(at, count)))

    def fits(count: int) -> bool:
        most = max(prefilled(at, count) for at in range(0, rows.shape[1], count))
        return most <= prefill_rows(widest, work.at_once)

    count = equal_pieces(rows.shape[1], fits)  # so that they are one program
    for at in range(0, rows.shape[1], count):
        size = prefilled(at, count)
        yield (
            at,
            _piece(growing, rows[:, at : at + count], begins[:, at : at + count], size, widest),
        )


def _piece(growing: _Growing, rows: np.ndarray, begins: np.ndarray, size: int, widest: int):
    """The prefixes of some rows, as `Prompts`.

    Args:
        growing: where they are.
        rows: int [devices, r].
        begins: int [devices, r], equal where prefixes are.
        size: distinct prefixes a device, at least those there are.
        widest: slots of a prefix.
    """
    chosen, which = [], []
    for own, begin in zip(rows, begins, strict=True):
        _, first, inverse = np.unique(begin, return_index=True, return_inverse=True)
        chosen += [int(own[i]) for i in np.resize(first, size)]
        which.append(inverse.reshape(-1))
    prefixes = [growing.prefix(row) for row in chosen]
    length_u = np.array([len(p) for p in prefixes], np.int32)
    tokens_uw = np.zeros((len(prefixes), bucket(int(length_u.max()), widest)), np.int32)
    for own, prefix in zip(tokens_uw, prefixes, strict=True):
        own[: len(prefix)] = prefix
    return Prompts(
        tokens_uw, length_u, np.concatenate(which).astype(np.int32), growing.row_b[rows].reshape(-1)
    )


def _record(
    growing: _Growing, lanes: np.ndarray, drawn: Choice, at: int, last: int, stop_ids: np.ndarray
) -> np.ndarray:
    """The lanes that continue, once the tokens drawn are recorded in `growing`.

    Args:
        growing: is updated.
        lanes: int [devices, places].
        drawn: of [devices * places, steps].
        at: the response position of its first token.
        last: the level's last, where responses are cut.
        stop_ids: int [n].
    """
    flat = lanes.reshape(-1)
    live = np.flatnonzero(flat >= 0)
    rows, cut = flat[live], slice(0, last - at)
    tokens = drawn.token_b[live, cut]
    stops = np.isin(tokens, stop_ids)
    stopped = stops.any(axis=1)
    count = np.where(stopped, stops.argmax(axis=1) + 1, tokens.shape[1])
    real = np.arange(tokens.shape[1])[None] < count[:, None]
    fields = (
        (growing.tokens_bt, tokens),
        (growing.logp_bt, drawn.logp_b[live, cut]),
        (growing.sampler_logp_bt, drawn.sampler_logp_b[live, cut]),
        (growing.entropy_bt, drawn.entropy_b[live, cut]),
    )
    for field, values in fields:
        field[rows, at : at + tokens.shape[1]] = np.where(real, values, 0)
    growing.length_b[rows] = at + count
    ends = tokens[np.arange(len(rows)), count - 1]
    growing.stop_b[rows] = np.where(stopped, ends, -1)
    return np.where(growing.stop_b[lanes] < 0, lanes, -1)


def _survivors(lanes: np.ndarray) -> np.ndarray:
    """The places of the lanes that continue, padded with -1 to a power of two on each device."""
    most = int((lanes >= 0).sum(axis=1).max())
    which = np.full((len(lanes), rounded_up(most)), -1, np.int32)
    for own, lane in zip(which, lanes, strict=True):
        live = np.flatnonzero(lane >= 0)
        own[: len(live)] = live
    return which
