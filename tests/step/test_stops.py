"""Stop policies: by hand, against float64, dealt over devices, and as laws of KL."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from release import by_default
from tiny import bigram, bigram_params, random_rollout

from kdjax import forward_kl, mix, reverse_kl
from kdjax.errors import ConfigError
from kdjax.losses.combinators import at_temperature
from kdjax.losses.objectives import divergence
from kdjax.losses.reductions import token_mean
from kdjax.losses.topk import top_k
from kdjax.sharding import make_mesh
from kdjax.step.closed_forms import compare
from kdjax.step.score import HeadPlan, scored_loss, token_function
from kdjax.step.stops import RAW, Stops, kept, merge_columns

MIXED = mix(forward_kl, reverse_kl, weight=0.3)
ROWS, V, IDS = 24, 21, (20, 4, 11)  # three rows are padding; dealt over 2, ids lie on both pieces
MERGE = Stops("merge", IDS)


def general(student_logp, teacher_logp):
    """MIXED without a closed form."""
    return MIXED(student_logp, teacher_logp)


@functools.cache
def graded(token_loss, stops, chunk=3, vocabulary=V, mesh=None):
    """((token mean, Scores), gradient by the student's parameters) of bigram models."""

    def loss(params, teacher_params, rollout):
        total, scores = scored_loss(
            bigram(), params, bigram(), teacher_params, rollout, token_loss=token_loss,
            reduction=token_mean, plan=HeadPlan(chunk, vocabulary, mesh, stops),
        )  # fmt: skip
        return total.mean(), scores

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


LN2 = math.log(2)
# Tokens a, b, stop of the student (2), stop of the teacher (3). The response is a, 2.
#   after b (predicts a):  q = [1/8, 1/8, 1/2, 1/4]   p = [1/4, 1/8, 1/8, 1/2]
#   after a (predicts 2):  q = [1/4, 1/4, 1/4, 1/4]   p = [1/2, 1/4, 1/8, 1/8]
STUDENT = {1: [1 / 8, 1 / 8, 1 / 2, 1 / 4], 0: [1 / 4] * 4}
TEACHER = {1: [1 / 4, 1 / 8, 1 / 8, 1 / 2], 0: [1 / 2, 1 / 4, 1 / 8, 1 / 8]}
# merged: q = [1/8, 1/8, 3/4], p = [1/4, 1/8, 5/8]; and q = [1/4, 1/4, 1/2], p = [1/2, 1/4, 1/4]
REVERSE = -LN2 / 8 + 3 / 4 * math.log(6 / 5)  # merged, after b: sum of q log(q / p)
BY_STOP = 3 / 4 * (math.log(6 / 5) - REVERSE)  # its gradient by the merged logit
BY_HAND = {
    # forward KL after b: 1/4 ln 2 + 0 + 1/8 ln(1/4) + 1/2 ln 2 = ln 2 / 2; after a:
    #   1/2 ln 2 + 0 - 1/8 ln 2 - 1/8 ln 2 = ln 2 / 4. Gradients q - p.
    ("raw", forward_kl): (
        [LN2 / 2, LN2 / 4],
        [-1 / 8, 0, 3 / 8, -1 / 4],
        [-1 / 4, 0, 1 / 8, 1 / 8],
    ),
    # the second token is a stop: only the first counts
    ("mask", forward_kl): ([LN2 / 2], [-1 / 8, 0, 3 / 8, -1 / 4], [0] * 4),
    # after b: 1/4 ln 2 + 5/8 ln((5/8) / (3/4)), gradient [-1/8, 0, 1/8], the last one dealt 2 : 1;
    # after a: 1/2 ln 2 - 1/4 ln 2, gradient [-1/4, 0, 1/4], dealt 1 : 1
    ("merge", forward_kl): (
        [LN2 / 4 + 5 / 8 * math.log(5 / 6), LN2 / 4],
        [-1 / 8, 0, 1 / 12, 1 / 24],
        [-1 / 4, 0, 1 / 8, 1 / 8],
    ),
    # reverse KL after b, in ln 2: -1/8 + 0 + 1/2 * 2 - 1/4 = 5/8; after a: -1/4 + 0 + 1/4 + 1/4.
    # Gradients q (log(q / p) - KL), in ln 2: 1/8 (-1 - 5/8), 1/8 (-5/8), 1/2 (2 - 5/8), ...
    ("raw", reverse_kl): (
        [5 / 8 * LN2, LN2 / 4],
        [-13 / 64 * LN2, -5 / 64 * LN2, 11 / 16 * LN2, -13 / 32 * LN2],
        [-5 / 16 * LN2, -1 / 16 * LN2, 3 / 16 * LN2, 3 / 16 * LN2],
    ),
    ("mask", reverse_kl): (
        [5 / 8 * LN2],
        [-13 / 64 * LN2, -5 / 64 * LN2, 11 / 16 * LN2, -13 / 32 * LN2],
        [0] * 4,
    ),
    # after a: -1/4 + 0 + 1/2 = 1/4, gradient 1/4 (-1 - 1/4), 1/4 (-1/4), 1/2 (1 - 1/4) dealt 1 : 1
    ("merge", reverse_kl): (
        [REVERSE, LN2 / 4],
        [(-LN2 - REVERSE) / 8, -REVERSE / 8, BY_STOP * 2 / 3, BY_STOP / 3],
        [-5 / 16 * LN2, -1 / 16 * LN2, 3 / 16 * LN2, 3 / 16 * LN2],
    ),
}


@pytest.mark.parametrize(("policy", "token_loss"), BY_HAND, ids=lambda x: getattr(x, "__name__", x))
def test_four_tokens_by_hand(policy, token_loss):
    """Value, scores and gradient by the logits of each policy, from the arithmetic above."""
    rollout = random_rollout(0, 4, [1], [2])._replace(tokens_bs=np.array([[1, 0, 2]], np.int32))
    student, teacher = (
        {"embed": jnp.log(jnp.array([kind[0], kind[1]])), "head": jnp.eye(4)}
        for kind in (STUDENT, TEACHER)
    )
    call = graded(token_loss, Stops(policy, (2, 3)), vocabulary=None)
    (value, scores), gradient = call(student, teacher, rollout)
    kls, after_b, after_a = BY_HAND[policy, token_loss]
    assert int(scores.mask.sum()) == len(kls)
    found = np.asarray(getattr(scores, token_loss.__name__))[0, : len(kls)]
    np.testing.assert_allclose(found, kls, atol=1e-6)
    np.testing.assert_allclose(value, np.mean(kls), atol=1e-6)
    wanted = np.array([after_a, after_b]) / len(kls)
    np.testing.assert_allclose(gradient["embed"], wanted, atol=1e-6)


@pytest.fixture(scope="module")
def pair():
    """Parameters of two bigram models of 24 rows and different width."""
    return bigram_params(1, ROWS), bigram_params(2, ROWS, width=6)


@pytest.fixture(scope="module")
def rollout():
    """Eight rows; four of their tokens are a stop id that is not the first."""
    return random_rollout(3, V, [3, 6, 1, 2, 4, 1, 5, 2], [5, 7, 2, 6, 1, 7, 3, 4])


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def events() -> np.ndarray:
    """[V, events] of 0 and 1: the ids are one event, any other token one of its own."""
    others = [v for v in range(V) if v not in IDS]
    matrix = np.zeros((V, len(others) + 1))
    matrix[others, range(len(others))] = 1
    matrix[list(IDS), -1] = 1
    return matrix


def by_numpy(pair, rollout, temperature=1.0):
    """The Scores' means over tokens of merged events and MIXED's gradient, in float64."""
    student, teacher = (jax.tree.map(np.float64, params) for params in pair)
    mean, count = {}, int(rollout.response_length_b.sum())
    gradient = jax.tree.map(np.zeros_like, student)
    matrix = events()
    for row, tokens in enumerate(rollout.tokens_bs):
        first = rollout.prompt_length_b[row]
        for at in range(first, first + rollout.response_length_b[row]):
            own, head = student["embed"][tokens[at - 1]], student["head"][:V]
            full = softmax(head @ own)
            p = softmax(teacher["head"][:V] @ teacher["embed"][tokens[at - 1]]) @ matrix
            q = full @ matrix
            event = int(matrix[tokens[at]].argmax())
            values = {"student_logp": np.log(q[event]), "teacher_logp": np.log(p[event])}
            values |= {"student_entropy": -q @ np.log(q), "teacher_entropy": -p @ np.log(p)}
            values |= {"forward_kl": p @ np.log(p / q), "reverse_kl": q @ np.log(q / p)}
            values["top1_agreement"] = float(p.argmax() == q.argmax())
            values["teacher_top1"] = float(p.argmax() == event)
            warm, warm_q = (softmax(np.log(x) / temperature) for x in (p, q))
            values["divergence"] = 0.3 * warm @ np.log(warm / warm_q)
            values["divergence"] += 0.7 * warm_q @ np.log(warm_q / warm)
            for name, value in values.items():
                mean[name] = mean.get(name, 0.0) + value / count
            by_q = matrix @ (0.3 * -p / q + 0.7 * (np.log(q / p) + 1)) / count
            by_logits = full * (by_q - full @ by_q)
            gradient["embed"][tokens[at - 1]] += by_logits @ head
            gradient["head"][:V] += np.outer(by_logits, own)
    return mean, gradient


@pytest.mark.parametrize("token_loss", [MIXED, general], ids=["closed", "general"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_merge_is_the_loss_between_events(pair, rollout, token_loss, chunk):
    """Scores, value and gradient equal float64 sums over events, in chunks, with padded heads."""
    (value, scores), gradient = graded(token_loss, MERGE, chunk)(*pair, rollout)
    wanted, by_params = by_numpy(pair, rollout)
    for name, mean in wanted.items():
        found = np.asarray(getattr(scores, name))[np.asarray(scores.mask)].mean()
        np.testing.assert_allclose(found, mean, atol=3e-6, rtol=3e-6, err_msg=name)
    np.testing.assert_allclose(value, wanted["divergence"], rtol=3e-6)
    chex.assert_trees_all_close(gradient, jax.tree.map(np.float32, by_params), atol=3e-6)


@pytest.mark.parametrize("loss", [MIXED, general], ids=["closed", "general"])
def test_temperature_comes_after_merging(pair, rollout, loss):
    """at_temperature softens merged probabilities; ids softened first would be another event."""
    (value, _), _ = graded(at_temperature(loss, 2.0), MERGE)(*pair, rollout)
    wanted, _ = by_numpy(pair, rollout, temperature=2.0)
    np.testing.assert_allclose(value, wanted["divergence"], rtol=3e-6)


@pytest.mark.parametrize("token_loss", [MIXED, general], ids=["closed", "general"])
@pytest.mark.parametrize("tensor", by_default([2, 4], 4))
def test_merge_dealt_over_a_mesh(pair, rollout, token_loss, tensor):
    """The vocabulary in pieces, the ids on several of them: as on one device, gradients too."""
    alone = graded(token_loss, MERGE)(*pair, rollout)
    dealt = graded(token_loss, MERGE, mesh=make_mesh(8, tensor=tensor))(*pair, rollout)
    chex.assert_trees_all_close(jax.device_get(dealt), jax.device_get(alone), atol=2e-6)


def test_masked_equals_deleted(pair, rollout):
    """A response that ends in a stop token counts like the one that ends before it."""
    tokens = rollout.tokens_bs.copy()
    stops = Stops("mask", (V - 1, V - 2))
    tokens[np.isin(tokens, stops.ids)] = 1
    ends = rollout.prompt_length_b + rollout.response_length_b - 1
    tokens[np.arange(8), ends] = np.resize(stops.ids, 8)
    stopped = rollout._replace(tokens_bs=tokens)
    cut = stopped._replace(response_length_b=rollout.response_length_b - 1)
    (value, scores), gradient = graded(MIXED, stops)(*pair, stopped)
    (wanted, shorter), by_params = graded(MIXED, RAW)(*pair, cut)
    np.testing.assert_array_equal(scores.mask, shorter.mask)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    chex.assert_trees_all_close(scores, shorter._replace(sampler_logp=scores.sampler_logp))
    chex.assert_trees_all_close(gradient, by_params, atol=1e-6)


@pytest.mark.parametrize("mesh", [None, 2], ids=["alone", "dealt"])
def test_equal_models_are_exactly_equal(pair, rollout, mesh):
    """KLs and gradient of a model against itself are exactly 0 after merging, too."""
    same = pair[0]
    call = graded(MIXED, MERGE, mesh=mesh and make_mesh(8, tensor=mesh))
    (value, scores), gradient = call(same, jax.tree.map(jnp.array, same), rollout)
    assert float(value) == 0
    assert not np.any([scores.forward_kl, scores.reverse_kl])
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


def test_merging_never_raises_a_kl():
    """Coarser events tell less: at each of 300 random pairs, both directions, any set of ids."""
    rng = np.random.default_rng(0)
    lower = 0
    for ids in ((0, 1), (5, 2, 9), tuple(range(11))):
        student, teacher = jnp.float32(4 * rng.normal(size=(2, 100, 12)))
        nowhere = jnp.zeros(100, jnp.int32)
        full = compare(student, teacher, nowhere)
        coarse = compare(merge_columns(student, ids), merge_columns(teacher, ids), nowhere)
        for name in ("forward_kl", "reverse_kl"):
            less = np.asarray(getattr(full, name) - getattr(coarse, name))
            assert less.min() >= -1e-5
            lower += np.sum(less > 1e-3)
    assert lower > 400


def test_raw_is_what_it_was(pair, rollout):
    """Policy raw, whatever its ids, compiles to the program without a policy; merge to another."""
    logits, extra = jnp.zeros((3, 8)), {"targets": jnp.arange(3), "sampler_logp": jnp.zeros(3)}

    def program(**given):
        return str(
            jax.make_jaxpr(token_function(MIXED, divergence, **given))(logits, logits, extra)
        )

    assert program(stops=Stops("raw", (1, 2))) == program() != program(stops=Stops("merge", (1, 2)))
    scores = jax.device_get(graded(MIXED, RAW)(*pair, rollout))
    chex.assert_trees_all_equal(
        scores, jax.device_get(graded(MIXED, Stops("raw", IDS))(*pair, rollout))
    )


def test_an_excluded_id_and_excluded_ids():
    """Ids of probability 0 add nothing; where all are, stop is impossible and gradients are 0."""
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [0.0, -jnp.inf, -jnp.inf]])
    merged, pull = jax.vjp(lambda x: merge_columns(x, (1, 2)), logits)
    np.testing.assert_array_equal(merged, [[0, 1, -np.inf], [0, -np.inf, -np.inf]])
    (gradient,) = pull(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, [[1, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stops("merged", (1,)), "raw, mask or merge, got 'merged'"),
        (lambda: Stops("mask"), "at least one stop id"),
        (lambda: Stops("merge", (3, 3)), r"distinct.*\(3, 3\)"),
        (lambda: merge_columns(jnp.zeros(4), (1, 4)), r"below the vocabulary's 4, got \(1, 4\)"),
        (
            lambda: token_function(MIXED, divergence, stops=Stops("merge", (0, 1)))(
                jnp.zeros((2, 4)),
                top_k(jnp.log(jnp.full((2, 4), 0.25)), 2),
                {"targets": jnp.zeros(2, jnp.int32), "sampler_logp": jnp.zeros(2)},
            ),
            "whole vocabulary, got a top-k teacher",
        ),
    ],
)
def test_what_cannot_be(make, message):
    """A policy that has no meaning is a ConfigError of one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_kept_only_changes_under_mask():
    """Policies raw and merge train on stop tokens."""
    targets, mask = jnp.array([1, 2]), jnp.array([True, True])
    for policy in ("raw", "merge"):
        assert kept(Stops(policy, (2,)), targets, mask).all()
