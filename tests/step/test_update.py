"""The training step: the plain gradient, however the batch is split, padded or dealt."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from release import by_default
from tiny import bigram, bigram_params, one_layer, random_rollout, tiny_config

from kdjax import forward_kl, make_optimizer, mix, reverse_kl
from kdjax.losses.objectives import divergence, negative_log_likelihood
from kdjax.losses.reductions import sequence_mean, token_mean
from kdjax.models.decoder import build
from kdjax.models.parameters import init_params
from kdjax.sharding import make_mesh, replicated, shard_batch
from kdjax.step.optimizer import guard_state
from kdjax.step.score import HeadPlan
from kdjax.step.update import init_state, make_step

V = 23
MIXED = mix(forward_kl, reverse_kl, weight=0.8)
PROMPTS, RESPONSES = [3, 6, 1, 2, 5, 4, 2, 3], [5, 7, 2, 1, 0, 7, 3, 6]
both_reductions = pytest.mark.parametrize(
    "reduction", [sequence_mean, token_mean], ids=lambda f: f.__name__
)
every_loss = pytest.mark.parametrize(
    "token_loss", [forward_kl, reverse_kl, MIXED], ids=lambda f: f.__name__
)
ALWAYS = {
    "loss", "gradient_norm", "response_tokens", "response_length", "truncated", "empty",
    "student_logp", "student_entropy", "sampler_logp",
}  # fmt: skip
WITH_TEACHER = {
    "teacher_logp", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement",
    "teacher_top1", "entropy_excess",
}  # fmt: skip


@functools.cache
def descent():
    """Plain gradient descent at rate 1: the update is the gradient."""
    return optax.with_extra_args_support(optax.sgd(1.0))


@functools.cache
def adam():
    """The project's optimizer: turns rounding noise into steps of the whole learning rate."""
    return make_optimizer(final_fraction=1.0, learning_rate=0.05, steps=50, warmup_fraction=0.0)


@pytest.fixture(scope="module")
def pair():
    """Parameters of two bigram models of different width."""
    return bigram_params(1, V), bigram_params(2, V, width=6)


@functools.cache
def bigram_step(optimizer, teacher=True, **options):
    """The jitted step of bigram models, compiled once for each shape of a rollout."""
    return jax.jit(make_step(bigram(), bigram() if teacher else None, optimizer, **options))


def bigram_rollout(seed: int, responses=RESPONSES):
    """Eight rows of unequal lengths with padding after the longest; one has no response."""
    return random_rollout(seed, V, PROMPTS, responses, prompt_width=6, response_width=9)


def run(step, optimizer, params, teacher_params, rollout):
    """(parameters, metrics) after one step from fresh optimizer state."""
    state, metrics = step(init_state(params, optimizer), teacher_params, rollout)
    assert int(state.step) == 1
    return state.params, metrics


def one_bigram_step(pair, rollout, **options):
    return run(bigram_step(descent(), **options), descent(), *pair, rollout)


def assert_bitwise_equal(first, second):
    chex.assert_trees_all_equal_structs(first, second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def plain_loss(params, teacher_params, rollout, reduction):
    """The mean forward KL, written from the definition for a loop over rows, with [T, V] logits."""
    sums, counts = [], []
    for tokens, prompt, response in zip(
        rollout.tokens_bs, rollout.prompt_length_b, rollout.response_length_b, strict=True
    ):
        if response:
            before = tokens[prompt - 1 : prompt + response - 1]
            q, p = (
                jax.nn.log_softmax(w["embed"][before] @ w["head"].T)
                for w in (params, teacher_params)
            )
            sums.append(jnp.sum(jnp.exp(p) * (p - q)))
            counts.append(int(response))
    if reduction is token_mean:
        return sum(sums) / sum(counts)
    return sum(s / n for s, n in zip(sums, counts, strict=True)) / len(counts)


@both_reductions
def test_the_update_is_the_gradient_of_the_plain_mean(pair, reduction):
    """Token mean, or mean of row means: value, gradient and its norm as by definition."""
    rollout = bigram_rollout(0)
    plain = jax.jit(jax.value_and_grad(lambda *both: plain_loss(*both, rollout, reduction)))
    value, gradient = plain(*pair)
    params, metrics = one_bigram_step(pair, rollout, reduction=reduction)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-5)
    for name, updated in params.items():
        np.testing.assert_allclose(pair[0][name] - updated, gradient[name], atol=1e-6)


def test_the_reductions_differ_as_by_hand(pair):
    """Rows of 1 and 7 tokens: the token mean weighs them 1 : 7, the sequence mean 1 : 1."""
    losses = {}
    for name, rows in {"both": [1, 7], "first": [1, 0], "second": [0, 7]}.items():
        rollout = bigram_rollout(1, [1, 7, 0, 0, 0, 0, 0, 0])
        lengths = np.array([*rows, 0, 0, 0, 0, 0, 0], np.int32)
        rollout = rollout._replace(response_length_b=lengths)
        for reduction in (token_mean, sequence_mean):
            metrics = one_bigram_step(pair, rollout, reduction=reduction)[1]
            losses[name, reduction.__name__] = float(metrics["loss"])
    first, second = losses["first", "token_mean"], losses["second", "token_mean"]
    assert abs(first - second) > 0.1
    assert losses["both", "token_mean"] == pytest.approx((first + 7 * second) / 8, rel=1e-5)
    assert losses["both", "sequence_mean"] == pytest.approx((first + second) / 2, rel=1e-5)


@both_reductions
@pytest.mark.parametrize("micro_batches", by_default([2, 4], 4))
def test_micro_batches_do_not_matter(pair, reduction, micro_batches):
    """Rows of unequal lengths in 2 or 4 micro-batches: parameters and every metric as in one."""
    rollout = bigram_rollout(2)
    whole = one_bigram_step(pair, rollout, reduction=reduction)
    split = one_bigram_step(pair, rollout, reduction=reduction, micro_batches=micro_batches)
    chex.assert_trees_all_close(split, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", by_default([1, 3, 16], 3))
def test_chunk_size_does_not_matter(pair, chunk):
    """The same parameters and metrics in chunks of 1, 3 or 16 positions as of all 9."""
    rollout = bigram_rollout(3)
    whole = one_bigram_step(pair, rollout, plan=HeadPlan(9))
    chex.assert_trees_all_close(
        one_bigram_step(pair, rollout, plan=HeadPlan(chunk)), whole, rtol=1e-5, atol=1e-6
    )


@both_reductions
def test_masked_equals_deleted(pair, reduction):
    """Rows without a response, and columns of padding, change no parameter, loss or token mean."""
    kept = [row for row, length in enumerate(RESPONSES) if length]
    padded = bigram_rollout(4)
    tight = jax.tree.map(lambda x: x[kept], padded)
    tight = tight._replace(
        tokens_bs=tight.tokens_bs[:, :13], sampler_logp_bt=tight.sampler_logp_bt[:, :7]
    )
    (params, metrics), (padded_params, padded_metrics) = (
        one_bigram_step(pair, rollout, reduction=reduction) for rollout in (tight, padded)
    )
    chex.assert_trees_all_close(padded_params, params, rtol=1e-6, atol=1e-7)
    for name in metrics.keys() - {"response_length", "truncated", "empty"}:
        np.testing.assert_allclose(padded_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    assert float(padded_metrics["empty"]) == 1 / 8
    assert float(metrics["empty"]) == 0


def test_eight_devices_step_as_one():
    """Dealt over 8 devices: the same parameters after a step, and metrics, as on one."""
    (model, params), (other, other_params) = one_layer(V, 1), one_layer(V, 2)
    rollout = bigram_rollout(5)
    step = jax.jit(make_step(model, other, descent(), token_loss=MIXED, plan=HeadPlan(4)))
    alone = run(step, descent(), params, other_params, rollout)
    mesh = make_mesh(8)
    state, metrics = step(
        jax.device_put(init_state(params, descent()), replicated(mesh)),
        jax.device_put(other_params, replicated(mesh)),
        shard_batch(rollout, mesh),
    )
    for weight in jax.tree.leaves(state.params):
        assert weight.sharding.is_fully_replicated
        assert len(weight.sharding.device_set) == 8
    dealt = jax.tree.map(np.asarray, (state.params, metrics))
    chex.assert_trees_all_close(dealt[0], alone[0], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(dealt[1], alone[1], rtol=1e-5, atol=1e-6)
    assert float(metrics["gradient_norm"]) > 0.1


def sharper_kl64(params, teacher_params, rollout, scale):
    """Mean forward KL a token with the student's logits times a scale, float64, row by row."""
    total, count = 0.0, 0
    for tokens, prompt, response in zip(
        rollout.tokens_bs, rollout.prompt_length_b, rollout.response_length_b, strict=True
    ):
        for before in np.asarray(tokens)[prompt - 1 : prompt + response - 1]:
            z, u = (
                np.float64(w["embed"][before]) @ np.float64(w["head"]).T
                for w in (params, teacher_params)
            )
            log_q, log_p = (x - np.log(np.sum(np.exp(x))) for x in (scale * z, u))
            total, count = total + np.sum(np.exp(log_p) * (log_p - log_q)), count + 1
    return total / count


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_entropy_excess_is_the_slope_of_forward_kl_by_sharpness(pair, micro_batches):
    """H(s) - H(t) - KL(t||s) is minus d KL / d log scale of the student's logits; so 0 at the scale
    where forward KL is least."""
    rollout, scales = bigram_rollout(14), np.linspace(0.02, 4, 400)
    slope = (sharper_kl64(*pair, rollout, 1 + 1e-5) - sharper_kl64(*pair, rollout, 1 - 1e-5)) / 2e-5
    _, metrics = one_bigram_step(pair, rollout, micro_batches=micro_batches)
    assert abs(slope) > 0.01
    np.testing.assert_allclose(metrics["entropy_excess"], -slope, atol=1e-5)
    best = scales[np.argmin([sharper_kl64(*pair, rollout, scale) for scale in scales])]
    assert scales[0] < best < scales[-1]
    student = {**pair[0], "head": pair[0]["head"] * best}
    _, there = one_bigram_step((student, pair[1]), rollout, micro_batches=micro_batches)
    assert abs(float(there["entropy_excess"])) < 0.05 * abs(slope)


@every_loss
def test_identical_models_stay_where_they_are(token_loss):
    """A student that is its teacher: KLs and loss exactly 0, no parameter moved by one bit."""
    model, params = one_layer(V, 3)
    rollout = bigram_rollout(6)
    step = jax.jit(make_step(model, model, adam(), token_loss=token_loss, plan=HeadPlan(4)))
    moved, metrics = run(step, adam(), params, params, rollout)
    assert float(metrics["forward_kl"]) == float(metrics["reverse_kl"]) == 0.0
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0.0
    assert float(metrics["top1_agreement"]) == 1.0
    assert_bitwise_equal(moved, params)


@both_reductions
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_without_a_response_moves_nothing(pair, reduction, micro_batches):
    """Every position masked: loss exactly 0, metrics finite, no parameter moved, rows counted."""
    rollout = bigram_rollout(7)
    rollout = rollout._replace(response_length_b=np.zeros(8, np.int32))
    step = bigram_step(adam(), reduction=reduction, micro_batches=micro_batches)
    params, metrics = run(step, adam(), *pair, rollout)
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["empty"]) == 1.0
    assert float(metrics["response_tokens"]) == 0.0
    assert all(np.isfinite(value) for value in metrics.values())
    assert_bitwise_equal(params, pair[0])


@every_loss
def test_nan_in_padding_does_not_reach_the_update(pair, token_loss):
    """NaN states of both models and NaN sampler_logp at padding: every update as without."""
    rollout = bigram_rollout(8)
    real = np.arange(9)[None] < rollout.response_length_b[:, None]
    spoilt = [{**params, "embed": params["embed"].at[0].set(jnp.nan)} for params in pair]
    spoilt_rollout = rollout._replace(
        sampler_logp_bt=np.where(real, rollout.sampler_logp_bt, np.nan).astype(np.float32)
    )
    clean = run(bigram_step(adam(), token_loss=token_loss), adam(), *pair, rollout)
    params, metrics = run(
        bigram_step(adam(), token_loss=token_loss), adam(), *spoilt, spoilt_rollout
    )
    assert_bitwise_equal(metrics, clean[1])
    assert_bitwise_equal(params["head"], clean[0]["head"])
    assert_bitwise_equal(params["embed"][1:], clean[0]["embed"][1:])


def test_an_objective_may_be_nan_where_nothing_is_trained(pair):
    """An objective's NaN at masked positions is selected away, not multiplied by 0."""
    rollout = bigram_rollout(15)

    def spoilt(scores):
        return jnp.where(scores.mask, scores.divergence, jnp.nan)

    chex.assert_trees_all_close(
        one_bigram_step(pair, rollout, objective=spoilt), one_bigram_step(pair, rollout), rtol=1e-6
    )


@every_loss
def test_training_brings_the_student_to_the_teacher(pair, token_loss):
    """40 steps on one batch take three quarters of the loss away, whichever loss."""
    optimizer = adam()
    step = bigram_step(optimizer, token_loss=token_loss)
    rollout = bigram_rollout(9, [9] * 8)
    state, losses = init_state(pair[0], optimizer), []
    for _ in range(40):
        state, metrics = step(state, pair[1], rollout)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.25 * losses[0]
    assert int(state.step) == 40


def test_the_teacher_has_no_optimizer_state(pair):
    """Moments exist for the student's parameters alone, before and after a step."""
    optimizer = adam()
    state = init_state(pair[0], optimizer)
    stepped, _ = bigram_step(optimizer)(state, pair[1], bigram_rollout(10))
    chex.assert_trees_all_equal_shapes_and_dtypes(stepped, state)
    moments = {name: own for name, own in stepped.opt_state.items() if name != "gate"}
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(moments)]
    assert sorted(s for s in shapes if s) == sorted(2 * [w.shape for w in jax.tree.leaves(pair[0])])


def test_what_the_guard_decided_is_a_metric(pair):
    """Updates skipped in a row, as the optimizer's state counts them; 0 where one is made."""
    optimizer, (student, teacher) = adam(), pair
    broken = jax.tree.map(lambda w: w * np.nan, teacher)
    step, state, said = bigram_step(optimizer), init_state(student, optimizer), []
    for given in (teacher, broken, broken, teacher, broken):
        state, metrics = step(state, given, bigram_rollout(9))
        said.append(float(metrics["skipped_in_a_row"]))
        assert int(guard_state(state.opt_state).in_a_row) == said[-1]
        assert np.isfinite(metrics["gradient_norm"]) == (said[-1] == 0)
    assert said == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("objective", [divergence, negative_log_likelihood])
@every_loss
def test_metrics_are_there_whichever_loss_is_trained(pair, token_loss, objective):
    """KLs, entropies and agreement are reported under every loss, with equal values."""
    rollout = bigram_rollout(11)
    metrics = one_bigram_step(pair, rollout, token_loss=token_loss, objective=objective)[1]
    assert set(metrics) == ALWAYS | WITH_TEACHER
    plain = one_bigram_step(pair, rollout)[1]
    for name in metrics.keys() - {"loss", "gradient_norm"}:
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-6, err_msg=name)
    assert float(metrics["response_tokens"]) == sum(RESPONSES)
    assert float(metrics["response_length"]) == sum(RESPONSES) / 8


def test_metrics_are_token_means(pair):
    """Reported KLs are means over all response tokens, also when the loss is a sequence mean."""
    rollout = bigram_rollout(12)
    rollout = rollout._replace(truncated_b=np.arange(8) < 3)
    metrics = one_bigram_step(pair, rollout, reduction=sequence_mean)[1]
    expected = jax.jit(lambda *both: plain_loss(*both, rollout, token_mean))(*pair)
    np.testing.assert_allclose(metrics["forward_kl"], expected, rtol=1e-5)
    mean_logp = rollout.sampler_logp_bt.sum() / sum(RESPONSES)
    np.testing.assert_allclose(metrics["sampler_logp"], mean_logp, rtol=1e-5)
    assert float(metrics["truncated"]) == 3 / 8


def test_a_step_without_a_teacher(pair):
    """Plain SFT: the loss is the mean -log q, and no metric speaks of a teacher."""
    rollout = bigram_rollout(13)
    step = bigram_step(
        descent(), teacher=False, objective=negative_log_likelihood, reduction=token_mean
    )
    _, metrics = run(step, descent(), pair[0], None, rollout)
    assert set(metrics) == ALWAYS
    np.testing.assert_allclose(metrics["loss"], -metrics["student_logp"], rtol=1e-6)


def largest_array(program: str) -> int:
    """Elements of the largest array that a compiled program's text names."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([0-9,]+)\]", program)
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_no_array_of_all_logits():
    """The compiled step names no array near [B, T, V], unless asked for a single chunk."""
    vocabulary, batch, length = 523, 3, 22
    model = build(tiny_config(vocabulary, num_hidden_layers=1))
    params = jax.eval_shape(lambda key: init_params(model.config, key), jax.random.key(0))
    state = jax.eval_shape(lambda p: init_state(p, descent()), params)
    rollout = random_rollout(14, vocabulary, [6] * batch, [length] * batch)

    def program(chunk: int) -> str:
        step = jax.jit(make_step(model, model, descent(), token_loss=MIXED, plan=HeadPlan(chunk)))
        return step.lower(state, params, rollout).compile().as_text()

    chunked = program(2)
    assert f"[2,{vocabulary}]" in chunked
    assert largest_array(chunked) < batch * length * vocabulary / 2
    assert largest_array(program(batch * length)) >= batch * length * vocabulary


def test_a_loss_without_a_hash(pair):
    """A dataclass with __call__ is a token loss like any function."""

    @dataclasses.dataclass
    class Own:
        factor: float

        def __call__(self, student_logp, teacher_logp):
            return self.factor * forward_kl(student_logp, teacher_logp)

    own = run(
        jax.jit(make_step(bigram(), bigram(), descent(), token_loss=Own(1.0))),
        descent(), *pair, bigram_rollout(0),
    )  # fmt: skip
    plain = one_bigram_step(pair, bigram_rollout(0), token_loss=forward_kl)
    chex.assert_trees_all_close(own[0], plain[0], atol=1e-6)
