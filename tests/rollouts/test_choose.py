"""Drawing a token: exact distributions, exact cuts, log-probabilities and entropies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.base import PLAIN, Sampling
from kdjax.errors import ConfigError
from kdjax.rollouts.choose import COLDEST, _top_k, choose, uniforms
from kdjax.training.parts.problems import run_key

V, DRAWS = 300, 20_000  # more than two blocks of the inverse CDF
chosen = jax.jit(choose, static_argnums=2)

SAMPLINGS = [
    PLAIN,
    Sampling(0.6),
    Sampling(top_p=0.8),
    Sampling(1.3, top_p=0.95),
    Sampling(top_k=7),
    Sampling(0.8, top_p=0.9, top_k=20),
    Sampling(min_p=0.05),
    Sampling(0.7, top_p=0.97, top_k=50, min_p=0.02),
    Sampling(top_k=V + 5),
]


def fixed_logits(seed: int = 5) -> np.ndarray:
    """Far from uniform, with entries of probability 0 at the front, inside and at the end."""
    logits = np.random.default_rng(seed).normal(0, 2.0, V).astype(np.float32)
    logits[[0, 11, 128, V - 1]] = -np.inf
    return logits


def by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution in float64, by sorting: top-k, then the nucleus, then min-p."""
    p = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # the mass of those more probable
    p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_distribution(sampling):
    """20,000 draws lie where the definition says, pass a chi-square test, and know their logp."""
    logits, wanted = fixed_logits(), by_definition(fixed_logits(), sampling)
    number = (np.random.default_rng(1).permutation(DRAWS) + 0.5).astype(np.float32) / DRAWS
    drawn = chosen(jnp.broadcast_to(logits, (DRAWS, V)), number, sampling)
    counts = np.bincount(drawn.token_b, minlength=V)
    assert counts[wanted == 0].sum() == 0
    np.testing.assert_allclose(counts, DRAWS * wanted, atol=1.01)  # the numbers are equally spaced
    np.testing.assert_allclose(
        drawn.sampler_logp_b, np.log(wanted[np.asarray(drawn.token_b)]), atol=1e-5
    )


@pytest.mark.parametrize("over", ["rows", "positions"])
def test_uniform_numbers_are_independent(over):
    """Over rows, and over positions of a row, draws pass a chi-square test (17 degrees)."""
    key, many = jax.random.key(3), jnp.arange(DRAWS)
    if over == "rows":
        numbers = uniforms(key, many, jnp.int32(4))
    else:
        numbers = jax.vmap(lambda t: uniforms(key, jnp.array([9]), t)[0])(many)
    counts = np.histogram(numbers, bins=18, range=(0, 1))[0]
    assert ((counts - DRAWS / 18) ** 2 / (DRAWS / 18)).sum() < 45
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.5, top_p=0.3, top_k=5)], ids=str)
def test_own_log_probability_and_entropy(sampling):
    """logp and entropy are the model's own, whatever the token was drawn from."""
    logits = np.stack([fixed_logits(seed) for seed in range(6)])
    drawn = chosen(logits, np.linspace(0.01, 0.99, 6, dtype=np.float32), sampling)
    p = np.stack([by_definition(row, PLAIN) for row in logits])
    own = p[np.arange(6), np.asarray(drawn.token_b)]
    np.testing.assert_allclose(drawn.logp_b, np.log(own), atol=1e-5)
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    np.testing.assert_allclose(drawn.entropy_b, -terms.sum(axis=1), atol=1e-5)


@pytest.mark.parametrize(("size", "k"), [(1000, 5), (1000, 8), (1000, 9), (128, 1), (131, 2)])
def test_top_k_by_blocks_is_top_k(size, k):
    """The same values as a sort of everything, at places that hold them; also all in one block."""
    rng = np.random.default_rng(size)
    values = rng.normal(size=(4, size)).astype(np.float32)
    values[1] = np.arange(size)
    values[2] = -np.inf
    values[2, -1] = 0
    best, ids = _top_k(jnp.asarray(values), k)
    np.testing.assert_array_equal(best, -np.sort(-values, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(ids) % size, axis=1), best)
    assert (np.asarray(ids)[[0, 1, 3]] < size).all()


def test_greedy():
    """Temperature 0 takes the best, with probability 1; ties go to the first."""
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, -jnp.inf]])
    drawn = chosen(logits, jnp.array([0.9, 0.9]), Sampling(0.0))
    assert drawn.token_b.tolist() == [1, 0]
    assert drawn.sampler_logp_b.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(drawn.logp_b[1], -np.log(2), atol=1e-6)


def test_one_token_of_all_the_mass():
    """A distribution on a point has entropy 0 and no NaN; the highest uniform number stays in."""
    logits = jnp.full((1, V), -jnp.inf).at[0, 200].set(4.0)
    for sampling in SAMPLINGS:
        drawn = chosen(logits, jnp.array([np.nextafter(np.float32(1), np.float32(0))]), sampling)
        assert drawn.token_b.tolist() == [200]
        assert [float(x[0]) for x in drawn[1:]] == [0.0, 0.0, 0.0]


def test_a_nucleus_at_the_full_vocabulary():
    """At 151,936 entries bisection keeps what a float64 sort keeps, but for mass of rounding."""
    logits = 2.5 * np.random.default_rng(0).normal(size=(2, 151_936)).astype(np.float32)
    for row in logits:
        p = np.exp(row.astype(np.float64) - row.max())
        ranked = np.sort(p)[::-1]
        size = int((np.cumsum(ranked) - ranked < 0.95 * ranked.sum()).sum())
        edge = [(1 - 1e-6) * ranked[: size - 9].sum(), ranked[: size + 9].sum()]
        number = np.array([np.nextafter(np.float32(1), np.float32(0)), 0.5], np.float32)
        drawn = chosen(np.stack([row, row]), number, Sampling(top_p=0.95))
        log_mass = np.asarray(drawn.logp_b) - np.asarray(drawn.sampler_logp_b)
        assert np.log(edge[0] / p.sum()) - 1e-5 < log_mass[0] < np.log(edge[1] / p.sum()) + 1e-5


@pytest.mark.parametrize("temperature", [COLDEST, 1e-12])
def test_the_coldest_temperature_draws_the_best(temperature):
    """With log-probability 0, and no NaN; a tie is drawn from."""
    logits = jnp.array([[0.0, 3.0, 2.0], [1.0, 1.0, -200.0]])
    drawn = choose(logits, jnp.array([0.9, 0.9]), Sampling(temperature))
    assert drawn.token_b.tolist() == [1, 1]
    np.testing.assert_allclose(drawn.sampler_logp_b, np.log([1.0, 0.5]), atol=1e-6)


def test_keys_of_another_kind_are_refused():
    """Under vmap the numbers of rbg keys depend on the batch: a row would know it. Ours are of one
    kind whatever JAX's default is."""
    with pytest.raises(ConfigError, match=r"a key is of kind rbg.*kdjax.base.random_key\(seed\)"):
        uniforms(jax.random.key(0, impl="rbg"), np.arange(2), np.int32(0))
    with jax.default_prng_impl("rbg"):
        key = run_key(0, 1)
        both, alone = (uniforms(key, np.array(r), np.int32(4)) for r in ([3, 5], [5]))
    assert float(both[1]) == float(alone[0])
    assert float(alone[0]) == float(uniforms(run_key(0, 1), np.array([5]), np.int32(4))[0])
