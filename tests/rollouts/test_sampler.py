"""The sampler: agrees with the scorer, draws the distribution, rows don't know their batch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lively, random_prompts

from kdjax import models
from kdjax.base import PLAIN, Batch, Samples, Sampling
from kdjax.errors import ConfigError
from kdjax.models import unstacked
from kdjax.numerics import project
from kdjax.rollouts import decoding, sampler
from kdjax.rollouts import levels as levels_module
from kdjax.rollouts.choose import choose, uniforms
from kdjax.rollouts.prefix import assemble_samples
from kdjax.rollouts.sampler import generate, open_sampler
from kdjax.sharding import make_mesh, replicated
from kdjax.step.score import score

LENGTHS = [3, 8, 5, 1, 8, 4, 7, 2]
ROWS = [40, 7, 19, 3, 101, 64, 5, 88]
LIMIT = 20  # more than one round of the decoding scan, and no multiple of it
STOP_IDS = tuple(range(90, 125))  # so many that most rows stop on the way


@pytest.fixture(scope="module")
def decoder(student):
    """The tiny student with weights so large that its distributions are far from uniform."""
    model, params = student
    return model, lively(params)


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    return random_prompts(tokenizer.size, LENGTHS, ROWS)


@pytest.fixture(scope="module")
def draw(decoder):
    """draw(batch, ...) -> Samples, with the sampler's own settings open."""
    model, params = decoder

    def call(
        batch, seed=0, sampling=PLAIN, limit=LIMIT, stop_ids=STOP_IDS, params=params, **settings
    ):
        sampler = open_sampler(model, stop_ids=stop_ids, sampling=sampling, **settings)
        return sampler(unstacked(params), batch, jax.random.key(seed), limit)

    return call


@pytest.fixture(scope="module")
def samples(draw, batch) -> Samples:
    return draw(batch)


@pytest.fixture(scope="module")
def rescored(decoder):
    """(Scores, logits [B, T, V]) of samples, by the scorer and by the whole-sequence forward."""
    model, params = decoder

    @jax.jit
    def both(batch, samples):
        rollout = assemble_samples(batch, samples)
        logits = project(model.hidden(params, rollout.tokens_bs), model.head(params))
        here = batch.prompt_length_b[:, None] - 1 + jnp.arange(samples.tokens_bt.shape[1])[None]
        picked = jnp.take_along_axis(logits, here[..., None], axis=1)
        return score(model, params, None, None, rollout), picked

    return lambda batch, samples: jax.tree.map(np.asarray, both(batch, samples))


def take(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_scorer_agree(draw, batch, rescored, temperature):
    """logp and entropy are the scorer's; sampler_logp is that of softmax(logits / temperature)."""
    samples = draw(batch, sampling=Sampling(temperature))
    scores, logits = rescored(batch, samples)
    mask = scores.mask
    assert mask.sum() == samples.length_b.sum() > 40
    assert scores.student_logp[mask].std() > 0.5
    for ours, wanted in (
        (samples.logp_bt, scores.student_logp),
        (samples.entropy_bt, scores.student_entropy),
    ):
        np.testing.assert_allclose(ours[mask], wanted[mask], atol=1e-4)
    tempered = np.take_along_axis(
        log_softmax64(logits / temperature), samples.tokens_bt[..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(samples.sampler_logp_bt[mask], tempered[mask], atol=1e-4)


def test_rows_end_with_their_stop_token(samples):
    """A stop id ends its row and counts in the length; nothing follows; without one: truncated."""
    assert 0 < samples.truncated_b.sum() < 8
    for row in range(8):
        tokens, length = samples.tokens_bt[row], samples.length_b[row]
        stops = np.isin(tokens[:length], STOP_IDS)
        if samples.truncated_b[row]:
            assert length == LIMIT
            assert not stops.any()
        else:
            assert stops.tolist() == [False] * (length - 1) + [True]
        for field in (tokens, samples.logp_bt[row], samples.sampler_logp_bt[row]):
            assert not field[length:].any()
        assert not samples.entropy_bt[row, length:].any()
        assert (samples.entropy_bt[row, :length] > 0).all()
    assert samples.tokens_bt.shape == (8, LIMIT)
    assert len(set(samples.length_b.tolist())) > 3


def test_a_shorter_limit_cuts_the_same_responses(draw, batch, samples):
    """Under a limit the tokens are the same up to it; a stop just at the limit is no truncation."""
    finished = samples.length_b[~samples.truncated_b]
    limit = int(np.sort(finished)[len(finished) // 2])
    assert (samples.length_b > limit).any()
    shorter = draw(batch, limit=limit)
    np.testing.assert_array_equal(shorter.tokens_bt, samples.tokens_bt[:, :limit])
    np.testing.assert_array_equal(shorter.length_b, np.minimum(samples.length_b, limit))
    np.testing.assert_array_equal(shorter.truncated_b, samples.length_b > limit)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: (take(batch, [4]), [4]),
        lambda batch: (take(batch, [6, 4, 1, 0, 7, 3, 2, 5]), [6, 4, 1, 0, 7, 3, 2, 5]),
        lambda batch: (
            batch._replace(prompt_bp=np.pad(batch.prompt_bp, [(0, 0), (0, 5)], constant_values=9)),
            range(8),
        ),
        lambda batch: (
            batch._replace(row_b=np.where(np.arange(8) == 2, batch.row_b, 1000 + batch.row_b)),
            [None, None, 2, None, None, None, None, None],
        ),
    ],
    ids=["alone", "another order", "more padding", "other neighbours"],
)
def test_a_row_does_not_know_its_batch(draw, batch, samples, change):
    """A row's tokens depend on key, row number and prompt alone."""
    changed, rows = change(batch)
    others = draw(changed)
    for place, row in enumerate(rows):
        if row is not None:
            np.testing.assert_array_equal(others.tokens_bt[place], samples.tokens_bt[row])
            assert others.length_b[place] == samples.length_b[row]
            np.testing.assert_allclose(others.logp_bt[place], samples.logp_bt[row], atol=1e-5)
    if None in rows:
        assert (others.tokens_bt[0] != samples.tokens_bt[0]).any()


def test_eight_devices_draw_what_one_does(draw, decoder, batch, samples):
    """Dealt over an 8-device mesh, every row draws the same tokens."""
    mesh = make_mesh(8)
    params = jax.device_put(decoder[1], replicated(mesh))
    dealt = draw(batch, params=params, mesh=mesh)
    for name in ("tokens_bt", "length_b", "stop_b"):
        np.testing.assert_array_equal(getattr(dealt, name), getattr(samples, name))
    np.testing.assert_allclose(dealt.logp_bt, samples.logp_bt, atol=1e-5)


def test_keys_and_row_numbers_choose_the_sample(draw, batch, samples):
    """The same key draws the same; other keys, or row numbers of one prompt, draw otherwise."""
    np.testing.assert_array_equal(draw(batch).tokens_bt, samples.tokens_bt)
    assert (draw(batch, seed=1).tokens_bt != samples.tokens_bt).any(axis=1).sum() >= 7
    same_prompt = take(batch, [1] * 8)._replace(row_b=batch.row_b)
    assert len({tuple(row) for row in np.asarray(draw(same_prompt).tokens_bt)}) >= 7


def test_greedy_takes_the_likeliest(draw, batch, rescored):
    """At temperature 0 each token is the argmax of the whole-sequence forward, with logp 0."""
    samples = draw(batch, sampling=Sampling(0.0))
    scores, logits = rescored(batch, samples)
    picked = logits.argmax(-1)
    np.testing.assert_array_equal(samples.tokens_bt[scores.mask], picked[scores.mask])
    assert not samples.sampler_logp_bt.any()
    np.testing.assert_array_equal(draw(batch, seed=9, sampling=Sampling(0.0))[0], samples.tokens_bt)


@pytest.fixture
def short_levels(monkeypatch):
    """Levels of 4, 8, 16 and 20 tokens, and a look every 2."""
    monkeypatch.setattr(levels_module, "FIRST", (4, 4))
    monkeypatch.setattr(levels_module, "STEPS", (2, 2))


def test_every_token_is_the_one_by_definition(decoder, draw, batch, short_levels):
    """Token by token from whole-sequence logits, without cache, batch or levels: the same text."""
    model, params = decoder
    sampling = Sampling(0.9, top_p=0.9)
    drawn = draw(batch, sampling=sampling)

    @jax.jit
    def following(tokens, length, row, position):
        states = model.hidden(params, tokens[None])[:, length - 1]
        number = uniforms(jax.random.key(0), row[None], position)
        return choose(project(states, model.head(params)), number, sampling).token_b[0]

    for place, row in enumerate(ROWS):
        tokens, length = np.zeros(8 + LIMIT, np.int32), LENGTHS[place]
        tokens[:length] = batch.prompt_bp[place, :length]
        for position in range(drawn.length_b[place]):
            tokens[length] = following(tokens, length, np.int32(row), position)
            assert tokens[length] == drawn.tokens_bt[place, position]
            length += 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"rows": 1}, marks=pytest.mark.release),
        {"rows": 3},
        pytest.param({"cache_bytes": 5e4}, marks=pytest.mark.release),
        pytest.param({"mesh": 2}, marks=pytest.mark.release),
        {"rows": 4, "mesh": 4},
    ],
    ids=str,
)
def test_levels_draw_what_one_batch_does(decoder, draw, batch, samples, settings, short_levels):
    """However rows are batched, compacted, prefilled again and dealt: the same tokens."""
    if "mesh" in settings:
        mesh = make_mesh(settings["mesh"])
        settings = settings | {"mesh": mesh, "params": jax.device_put(decoder[1], replicated(mesh))}
    grown = draw(batch, **settings)
    for name in ("tokens_bt", "length_b", "stop_b"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(samples, name))
    for name in ("logp_bt", "sampler_logp_bt", "entropy_bt"):
        np.testing.assert_allclose(getattr(grown, name), getattr(samples, name), atol=2e-5)


def test_so_many_rows_are_decoded(draw, tokenizer, monkeypatch, short_levels):
    """Twenty prompts are prefilled and decoded as twenty rows, those that go on as sixteen or as
    twenty; no row more."""
    rows, made = [], sampler.decoder

    def counted(*args):
        programs = made(*args)

        def prefill(params, state, prompts, *rest):
            rows.append(len(prompts.tokens_uw))
            return programs.prefill(params, state, prompts, *rest)

        def decode(params, state, *rest):
            rows.append(len(state.start_b))
            return programs.decode(params, state, *rest)

        return programs._replace(prefill=prefill, decode=decode)

    monkeypatch.setattr(sampler, "decoder", counted)
    twenty = random_prompts(tokenizer.size, [3, 8, 5, 1] * 5, range(20))
    draw(twenty, limit=5, stop_ids=(1,))
    assert rows == [20] * 5  # two levels, of two looks and of one


def test_samples_of_a_prompt_share_its_prefill(draw, batch, samples, monkeypatch):
    """Eight samples of each of two prompts: one prefill of two prefixes; texts as drawn apart."""
    seen, piece = [], sampler._piece

    def counted(*args):
        made = piece(*args)
        seen.append(len(made.tokens_uw))
        return made

    both = take(batch, [1] * 8 + [4] * 8)._replace(row_b=np.arange(16, dtype=np.int32))
    monkeypatch.setattr(sampler, "_piece", counted)
    together = draw(both)
    assert seen == [2]
    for place in (0, 5, 8, 15):
        alone = draw(take(both, [place]))
        np.testing.assert_array_equal(alone.tokens_bt[0], together.tokens_bt[place])


def test_the_cache_is_written_in_place():
    """Decoding reserves at most 5 % of its cache, copies none of it, and reuses its memory."""
    config = models.DecoderConfig(256, 64, 128, 8, 4, 2, 64)
    model = models.build(config)
    params = jax.eval_shape(unstacked, models.abstract_params(config, jnp.float32))
    programs = decoding.decoder(model, PLAIN)
    state = jax.eval_shape(lambda p: programs.empty(p, 32, 2048), params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = programs.decode.lower(params, state, key, np.int32(9), np.int32(1), 16).compile()
    memory = compiled.memory_analysis()
    leaves = jax.tree.leaves(state.cache)
    cache = sum(x.size * x.dtype.itemsize for x in leaves)
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.05 * cache
    size = ",".join(map(str, leaves[0].shape))
    assert not re.findall(rf"\[{size}\]\S* copy\(", compiled.as_text())


def test_a_second_draw_compiles_nothing(decoder, draw, batch, short_levels):
    """Four levels of at most eight rows are a handful of programs, made once."""
    decoding.decoder.cache_clear()
    draw(batch)
    programs = decoding.decoder(decoder[0], PLAIN, None, None)
    made = [program._cache_size() for program in programs]
    assert made[2] <= 8
    draw(batch)
    assert [program._cache_size() for program in programs] == made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stop_ids": ()}, "stop_ids is empty"),
        ({"stop_ids": (3, 96), "vocabulary": 96}, "stop id 96 is beyond the model's 96 tokens"),
        ({"stop_ids": (3,), "vocabulary": 90}, "a prompt holds id "),
        ({"batch": "empty"}, "the prompt of row 19 is empty"),
        ({"sampling": Sampling(-0.1)}, "temperature must be at least 0"),
        ({"limit": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_bad_arguments(draw, batch, changes, says):
    """A ConfigError at trace, of one line that names the argument."""
    if changes == {"batch": "empty"}:
        changes = {}
        batch = batch._replace(prompt_length_b=np.where(np.arange(8) == 2, 0, LENGTHS))
    with pytest.raises(ConfigError) as caught:
        draw(batch, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_are_never_drawn(decoder, batch, temperature):
    """Logits past the vocabulary have no probability, however large: samples are as without."""
    model, params = decoder
    tokens = params["embed"].shape[0]
    pad = np.full((3, params["embed"].shape[1]), 9.0, np.float32)
    wide = {**params, "embed": np.concatenate([params["embed"], pad])}

    def drawn(params):
        return generate(
            model, params, batch, jax.random.key(0), max_new_tokens=4, stop_ids=STOP_IDS,
            sampling=Sampling(temperature), vocabulary=tokens,
        )  # fmt: skip

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        drawn(wide),
        drawn(params),
    )
