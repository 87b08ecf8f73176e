"""Sequence KL = the sum of token KLs at the first distribution's own prefixes (2605.16826)."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import forward_kl, reverse_kl

VOCABULARY, STOP, HORIZON = 3, 0, 3
PREFIXES = [
    prefix
    for length in range(HORIZON)
    for prefix in itertools.product(range(VOCABULARY), repeat=length)
    if STOP not in prefix
]
"""Where a next token is drawn: shorter than the horizon, not stopped yet."""

SEQUENCES = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(VOCABULARY)
    if token == STOP or len(prefix) == HORIZON - 1
]
"""Every complete response: stopped, or cut at the horizon."""


def random_tables(seed: int) -> dict[tuple[int, ...], np.ndarray]:
    """A model: log-probabilities of the next token at every prefix, unrelated between prefixes."""
    rng = np.random.default_rng(seed)
    logits = {prefix: rng.normal(0, 2, VOCABULARY) for prefix in PREFIXES}
    return {prefix: z - np.log(np.exp(z).sum()) for prefix, z in logits.items()}


def logp(tables, tokens: tuple[int, ...]) -> float:
    """log-probability of a prefix or a complete response."""
    return sum(tables[tokens[:t]][token] for t, token in enumerate(tokens))


def sequence_kl(first, second) -> float:
    """KL(first || second) over complete responses, by enumeration."""
    return sum(np.exp(logp(first, y)) * (logp(first, y) - logp(second, y)) for y in SEQUENCES)


def token_sum(token_loss, *, prefixes_of, student, teacher) -> float:
    """sum_t E_{s_t ~ prefixes_of}[token_loss(student, teacher at s_t)]."""
    with jax.enable_x64(True):
        student_logp = jnp.asarray([student[s] for s in PREFIXES])
        losses = np.asarray(token_loss(student_logp, jnp.asarray([teacher[s] for s in PREFIXES])))
    return float(sum(np.exp(logp(prefixes_of, s)) * losses[i] for i, s in enumerate(PREFIXES)))


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def models(request):
    return {"student": random_tables(request.param), "teacher": random_tables(request.param + 100)}


def test_complete_responses_have_total_probability_one(models):
    """The enumeration misses nothing and counts nothing twice."""
    for tables in models.values():
        assert sum(np.exp(logp(tables, y)) for y in SEQUENCES) == pytest.approx(1, abs=1e-14)


def test_teacher_prefixes_with_forward_kl_are_the_forward_sequence_kl(models):
    """KL(p || q)(x) = sum_t E_{s_t ~ d^T}[KL(p(.|s_t) || q(.|s_t))]."""
    summed = token_sum(forward_kl, prefixes_of=models["teacher"], **models)
    assert summed == pytest.approx(sequence_kl(models["teacher"], models["student"]), rel=1e-12)


def test_student_prefixes_with_reverse_kl_are_the_reverse_sequence_kl(models):
    """KL(q || p)(x) = sum_t E_{s_t ~ d^S}[KL(q(.|s_t) || p(.|s_t))]."""
    summed = token_sum(reverse_kl, prefixes_of=models["student"], **models)
    assert summed == pytest.approx(sequence_kl(models["student"], models["teacher"]), rel=1e-12)


def test_the_crossed_cells_are_neither(models):
    """Decoupled: the other two cells of the 2x2 are objectives of their own, no sequence KL."""
    forward = sequence_kl(models["teacher"], models["student"])
    reverse = sequence_kl(models["student"], models["teacher"])
    for token_loss, prefixes_of in ((forward_kl, "student"), (reverse_kl, "teacher")):
        crossed = token_sum(token_loss, prefixes_of=models[prefixes_of], **models)
        assert abs(crossed - forward) > 1e-3
        assert abs(crossed - reverse) > 1e-3
