"""Scores: every field by hand, the right positions, nothing from padding."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from release import by_default
from tiny import bigram, bigram_params, one_layer, random_rollout

from kdjax import forward_kl, mix, reverse_kl
from kdjax.base import Scores, TeacherRows
from kdjax.errors import ConfigError
from kdjax.losses.objectives import disagreement, negative_log_likelihood, student_entropy
from kdjax.losses.reductions import sequence_mean, token_mean
from kdjax.losses.selection import top_share, top_tokens
from kdjax.step.head import head_loss
from kdjax.step.score import HeadPlan, sampled_logp, score, scored_loss

V = 23
PROMPTS, RESPONSES = [3, 6, 1], [5, 7, 2]
MIXED = mix(forward_kl, reverse_kl, weight=0.3)
ELSEWHERE = {"reference_logp", "old_logp", "advantage", "parts", "teacher_shared", "residual"}
FIELDS = set(Scores._fields) - ELSEWHERE
every_loss = pytest.mark.parametrize(
    "token_loss", [forward_kl, reverse_kl, MIXED], ids=lambda f: f.__name__
)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def distribution(params, token: int) -> np.ndarray:
    """A bigram model's next-token log-probabilities after a token, in float64."""
    embed, head = (np.asarray(params[name], np.float64) for name in ("embed", "head"))
    return log_softmax64(head @ embed[token])


def by_hand(student, teacher, tokens, position: int) -> dict[str, float]:
    """The scores of the token at a position of a row, from the definitions."""
    q, p = (distribution(params, tokens[position - 1]) for params in (student, teacher))
    forward, reverse = np.sum(np.exp(p) * (p - q)), np.sum(np.exp(q) * (q - p))
    return {
        "student_logp": q[tokens[position]],
        "teacher_logp": p[tokens[position]],
        "student_entropy": -np.sum(np.exp(q) * q),
        "teacher_entropy": -np.sum(np.exp(p) * p),
        "forward_kl": forward,
        "reverse_kl": reverse,
        "top1_agreement": float(q.argmax() == p.argmax()),
        "teacher_top1": float(tokens[position] == p.argmax()),
        "divergence": 0.3 * forward + 0.7 * reverse,
    }


@pytest.fixture(scope="module")
def pair():
    """Parameters of two bigram models of different width."""
    return bigram_params(1, V), bigram_params(2, V, width=6)


@jax.jit
def bigram_scores(params, teacher_params, rollout) -> Scores:
    return score(bigram(), params, bigram(), teacher_params, rollout, MIXED, plan=HeadPlan(3))


@functools.cache
def bigram_loss(token_loss=MIXED, chunk=3):
    """((loss, Scores), gradients by both models' parameters) of a rollout: the token mean."""

    def loss(params, teacher_params, rollout):
        loss, scores = scored_loss(
            bigram(), params, bigram(), teacher_params, rollout,
            token_loss=token_loss, reduction=token_mean, plan=HeadPlan(chunk),
        )  # fmt: skip
        return loss.mean(), scores

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def with_nan_in_padding(rollout):
    """The rollout with NaN in place of the sampler's log-probabilities after each response."""
    steps = np.arange(rollout.sampler_logp_bt.shape[1])[None]
    real = steps < rollout.response_length_b[:, None]
    logp = np.where(real, rollout.sampler_logp_bt, np.nan).astype(np.float32)
    return rollout._replace(sampler_logp_bt=logp)


def test_every_field_by_hand(pair):
    """Position t is predicted from the token before it, t = 0 from the last prompt token."""
    rollout = random_rollout(0, V, PROMPTS, RESPONSES, prompt_width=8, response_width=9)
    scores = jax.tree.map(np.asarray, bigram_scores(*pair, rollout))
    assert scores.mask.tolist() == [[t < length for t in range(9)] for length in RESPONSES]
    np.testing.assert_array_equal(scores.sampler_logp, rollout.sampler_logp_bt)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(response):
            wanted = by_hand(*pair, rollout.tokens_bs[row], prompt + t)
            assert set(wanted) == FIELDS - {"mask", "sampler_logp"}
            for name, value in wanted.items():
                found = getattr(scores, name)[row, t]
                np.testing.assert_allclose(found, value, atol=2e-6, rtol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def real():
    """(value, student gradient, Scores) of a rollout, under decoders with attention."""
    (model, params), (other, other_params) = one_layer(V, 1), one_layer(V, 2)

    def loss(params, rollout):
        loss, scores = scored_loss(
            model, params, other, other_params, rollout,
            token_loss=MIXED, reduction=token_mean, plan=HeadPlan(4),
        )  # fmt: skip
        return loss.mean(), scores

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call(rollout):
        (value, scores), gradient = both(params, rollout)
        return value, gradient, jax.tree.map(np.asarray, scores)

    return call


def changed_at(rollout, row: int, position: int):
    """The rollout with one token replaced."""
    tokens = rollout.tokens_bs.copy()
    tokens[row, position] = (tokens[row, position] + 7) % (V - 1) + 1
    return rollout._replace(tokens_bs=tokens)


def test_which_token_moves_which_score(real):
    """The first response token is scored at t = 0, the stop token at its place, padding nowhere."""
    rollout = random_rollout(1, V, PROMPTS, RESPONSES, prompt_width=8, response_width=9)
    value, gradient, scores = real(rollout)
    row, first, last = 0, PROMPTS[0], RESPONSES[0] - 1

    def moved(position: int, field: str) -> list[int]:
        other = real(changed_at(rollout, row, position))[2]
        same = getattr(scores, field) == getattr(other, field)
        assert same[1:].all()
        return np.flatnonzero(~same[row]).tolist()

    everything = list(range(RESPONSES[0]))
    assert moved(first - 1, "student_entropy") == everything  # the last prompt token predicts t = 0
    assert moved(first, "student_entropy") == everything[1:]
    assert moved(first, "student_logp") == everything
    assert moved(first + last, "student_logp") == [last]
    assert moved(first + last, "divergence") == []  # the stop token is a target, never a context
    after_value, after_gradient, after = real(changed_at(rollout, row, first + last + 1))
    np.testing.assert_array_equal(value, after_value)
    jax.tree.map(np.testing.assert_array_equal, gradient, after_gradient)
    jax.tree.map(np.testing.assert_array_equal, scores, after)


def test_masked_equals_deleted(real):
    """Padding columns, and a row without a response, change neither loss nor gradient."""
    wide = random_rollout(1, V, PROMPTS, [5, 7, 0], prompt_width=8, response_width=9)
    tokens = np.where(wide.tokens_bs == 0, 17, wide.tokens_bs)
    tight = jax.tree.map(lambda x: x[:2], wide)
    tight = tight._replace(tokens_bs=tokens[:2, :13], sampler_logp_bt=wide.sampler_logp_bt[:2, :7])
    value, gradient, _ = real(tight)
    padded_value, padded_gradient, _ = real(wide._replace(tokens_bs=tokens))
    assert float(value) > 0.5
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6),
        padded_gradient,
        gradient,
    )


@pytest.mark.parametrize("chunk", by_default([1, 3, 16], 3))
def test_chunk_size_does_not_matter(pair, chunk):
    """Loss, gradient and every score are the same in chunks of 1, 3 or 16 positions as of all 7."""
    rollout = random_rollout(3, V, PROMPTS, RESPONSES)
    pieces, whole = (bigram_loss(chunk=n)(*pair, rollout) for n in (chunk, 7))
    chex.assert_trees_all_close(pieces, whole, rtol=1e-5, atol=1e-6)


@every_loss
def test_the_teacher_gets_no_gradient(pair, token_loss):
    """The loss's gradient by teacher parameters is exactly 0, by student parameters it is not."""
    rollout = random_rollout(4, V, PROMPTS, RESPONSES)
    _, (ours, theirs) = bigram_loss(token_loss)(*pair, rollout)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(theirs))
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(ours))


@pytest.mark.parametrize(
    "field", by_default(sorted(FIELDS - {"mask", "sampler_logp"}), "divergence", "student_logp")
)
def test_scores_carry_no_gradient(pair, field):
    """Differentiating a score that was handed out is an error that says where it belongs."""
    rollout = random_rollout(5, V, PROMPTS, RESPONSES)

    def total(params):
        return jnp.sum(getattr(bigram_scores(params, pair[1], rollout), field))

    with pytest.raises(ConfigError, match=r"Scores\) carry no gradient.*stop_gradient"):
        jax.grad(total)(pair[0])


def test_without_a_teacher(pair):
    """Plain SFT: the student's fields are the same, those that need a teacher are None."""
    rollout = random_rollout(6, V, PROMPTS, RESPONSES)
    alone = jax.jit(lambda params: score(bigram(), params, None, None, rollout))(pair[0])
    both = bigram_scores(*pair, rollout)
    for name in FIELDS:
        if name in ("student_logp", "student_entropy", "sampler_logp", "mask"):
            np.testing.assert_allclose(getattr(alone, name), getattr(both, name), rtol=1e-6)
        else:
            assert getattr(alone, name) is None


@every_loss
def test_nan_in_padding_stays_there(pair, token_loss):
    """NaN states and NaN sampler_logp at padding: all scores and gradients as without."""
    rollout = random_rollout(7, V, PROMPTS, RESPONSES, response_width=9)
    spoilt = [
        {**params, "embed": params["embed"].at[0].set(jnp.nan)} for params in pair
    ]  # 0 is the padding id, and no real token
    clean = bigram_loss(token_loss)(*pair, rollout)
    found = bigram_loss(token_loss)(*spoilt, with_nan_in_padding(rollout))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))
    jax.tree.map(np.testing.assert_array_equal, found[1], clean[1])
    assert float(found[0][0]) == float(clean[0][0])
    mask = np.asarray(clean[0][1].mask)
    scores = (jax.tree.leaves(x[0][1]) for x in (found, clean))
    for after, before in zip(*scores, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[mask], np.asarray(before)[mask])


def test_nan_in_padding_stays_out_of_an_importance_ratio(pair):
    """An objective that reads sampler_logp, exp(log q - log mu), gets no NaN from padding."""
    rollout = random_rollout(8, V, PROMPTS, RESPONSES, response_width=9)

    def ratio(scores):
        return jnp.exp(scores.student_logp - scores.sampler_logp)

    @jax.jit
    @jax.value_and_grad
    def loss(params, rollout):
        return scored_loss(
            bigram(), params, None, None, rollout, objective=ratio, reduction=token_mean
        )[0].mean()

    clean, found = loss(pair[0], rollout), loss(pair[0], with_nan_in_padding(rollout))
    assert np.isfinite(clean[0])
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_a_chunk_holds_a_position(pair):
    """A chunk of less than one token is a ConfigError that says what it got."""
    rollout = random_rollout(9, V, PROMPTS, RESPONSES)
    with pytest.raises(ConfigError, match="head chunk must be at least 1 token, got 0"):
        score(bigram(), pair[0], bigram(), pair[1], rollout, plan=HeadPlan(0))


def test_micro_batches_read_fewer_rows_at_a_time():
    """A policy's log-probabilities are the same however many rows are read at once, and what is in
    memory falls with them."""
    model, params = one_layer(V, 3)
    rollout = random_rollout(0, V, [3, 6, 1, 2, 4, 4, 5, 1], [5, 7, 2, 9, 1, 3, 4, 60])

    @functools.partial(jax.jit, static_argnames="micro_batches")
    def read(params, rollout, micro_batches):
        return sampled_logp(model, params, rollout, micro_batches=micro_batches, plan=HeadPlan(4))

    whole, parts = (read(params, rollout, n) for n in (1, 4))
    assert float(jnp.abs(whole).sum(1).min()) > 0
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-6)
    needed = [
        read.lower(params, rollout, n).compile().memory_analysis().temp_size_in_bytes
        for n in (1, 4)
    ]
    assert needed[1] < 0.4 * needed[0]


def test_a_teacher_that_reads_rows_of_its_own():
    """The same rows give the ordinary loss, to the bit; another prompt gives the KL to what the
    teacher says after it; tokens without a slot are not trained on."""
    (student, params), (teacher, teacher_params) = one_layer(V, 1), one_layer(V, 2)
    rollout = random_rollout(3, V, [3, 2], [4, 2])
    other = random_rollout(4, V, [6, 1], [4, 2])  # other prompts before the same responses
    for row in range(2):
        own, theirs = (int(r.prompt_length_b[row]) for r in (rollout, other))
        other.tokens_bs[row, theirs : theirs + 4] = rollout.tokens_bs[row, own : own + 4]
    steps = np.arange(4)[None]

    def rows_of(read, mask=True):
        slot = np.where(mask, read.prompt_length_b[:, None] + steps - 1, -1)
        return TeacherRows(read.tokens_bs, slot.astype(np.int32))

    def scored(rollout):
        return score(student, params, teacher, teacher_params, rollout)

    plain = scored(rollout)
    chex.assert_trees_all_equal(scored(rollout._replace(teacher_rows=rows_of(rollout))), plain)

    found = scored(rollout._replace(teacher_rows=rows_of(other)))
    logits = (
        teacher.hidden(teacher_params, other.tokens_bs) @ teacher.head(teacher_params).weight_vd.T
    )
    theirs = log_softmax64(logits)
    for row, step in [(0, 0), (0, 3), (1, 1)]:
        token = rollout.tokens_bs[row, rollout.prompt_length_b[row] + step]
        wanted = theirs[row, other.prompt_length_b[row] + step - 1, token]
        np.testing.assert_allclose(found.teacher_logp[row, step], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found.student_logp, plain.student_logp)

    known = np.array([[True, False, True, False], [False, True, True, True]])
    partly = scored(rollout._replace(teacher_rows=rows_of(other, known)))
    np.testing.assert_array_equal(partly.mask, np.asarray(plain.mask) & known)
    np.testing.assert_array_equal(partly.forward_kl, np.where(partly.mask, found.forward_kl, 0))


@pytest.mark.parametrize("chunk", [2, 64])
def test_scores_first_then_weights(pair, chunk):
    """A reduction that ranks by scores is given those of all tokens; loss, gradient and Scores are
    those of the same weights given by hand, and the student's layers run once."""
    rollout = random_rollout(5, V, PROMPTS, RESPONSES)
    ranked = top_share(sequence_mean, disagreement, 0.4)
    params, teacher_params = pair
    runs = []

    def counted(*args):
        runs.append(1)
        return bigram().hidden(*args)

    student = bigram()._replace(hidden=counted)

    def made_by(reduction):
        def loss(params):
            total, scores = scored_loss(
                student, params, bigram(), teacher_params, rollout,
                token_loss=MIXED, reduction=reduction, plan=HeadPlan(chunk),
            )  # fmt: skip
            return total.mean(), scores

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    plain = bigram_scores(params, teacher_params, rollout)
    q, p = (
        np.exp(np.asarray(plain.student_logp, np.float64)),
        np.exp(np.asarray(plain.teacher_logp)),
    )
    rank = np.where(plain.mask, (p - q) * np.log(p / q), -1)
    chosen = rank >= -np.sort(-rank, axis=1)[np.arange(3), [1, 2, 0]][:, None]  # 2, 3 and 1 of each
    assert chosen.sum(1).tolist() == [2, 3, 1]
    weights = chosen / chosen.sum(1, keepdims=True)
    (loss, scores), gradient = made_by(ranked)
    assert len(runs) == 1
    (wanted, same), by_hand = made_by(lambda mask, rollout: jnp.asarray(weights))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    chex.assert_trees_all_close(gradient, by_hand, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(scores, same, rtol=1e-5, atol=1e-6)
    assert 0 < loss != made_by(sequence_mean)[0][0]


def test_the_second_pass_reads_the_chosen_tokens_alone(monkeypatch):
    """Its mask holds no token of weight 0, so the loop over chunks ends after those."""
    read = []

    def spied(function, hidden, head, teacher, known, weights, mask, **plan):
        read.append((np.asarray(weights), np.asarray(mask)))
        return head_loss(function, hidden, head, teacher, known, weights, mask, **plan)

    monkeypatch.setattr("kdjax.step.score.head_loss", spied)
    rollout = random_rollout(5, V, PROMPTS, RESPONSES)
    scored_loss(
        bigram(), bigram_params(1, V), None, None, rollout,
        objective=negative_log_likelihood, reduction=top_tokens(token_mean, student_entropy, 2),
    )  # fmt: skip
    (nothing, every), (weights, chosen) = read
    assert not nothing.any()
    assert every.sum(1).tolist() == RESPONSES
    np.testing.assert_array_equal(chosen, weights != 0)
    assert chosen.sum(1).tolist() == [2, 2, 2]
