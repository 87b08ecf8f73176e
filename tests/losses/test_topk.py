"""A teacher known by its top k: buckets hold sums of probabilities, and only lose divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import (
    add,
    divergence,
    forward_kl,
    mix,
    reverse_divergence,
    reverse_kl,
    tail_residual,
)
from kdjax.base import TopK
from kdjax.errors import ConfigError
from kdjax.losses.topk import buckets, top_k
from kdjax.numerics import log_probs
from kdjax.step.closed_forms import compare
from kdjax.step.score import token_function

KLS = ("forward_kl", "reverse_kl")


def normal_logits(seed: int, *shape: int, scale: float = 2.0) -> np.ndarray:
    """Signed float32 logits."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def softmax64(logits) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = np.exp(wide - wide.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


def known(teacher_logits, k: int) -> TopK:
    """What top k leaves of a teacher, the ids ordered by NumPy's sort."""
    p = softmax64(teacher_logits)
    ids = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    logp = np.log(np.take_along_axis(p, ids, axis=-1)).astype(teacher_logits.dtype)
    return TopK(ids.astype(np.int32), logp, tail64(p, ids).astype(teacher_logits.dtype))


def tail64(probabilities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """log of the sum of all probabilities but the named ones."""
    with np.errstate(divide="ignore"):
        return np.log(bucketed64(probabilities, ids)[..., -1])


def bucketed64(probabilities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[..., V] -> [..., k + 1]: the named ones, and the sum of all others."""
    others = np.ones_like(probabilities)
    np.put_along_axis(others, ids, 0.0, axis=-1)
    tail = (probabilities * others).sum(-1, keepdims=True)
    return np.concatenate([np.take_along_axis(probabilities, ids, axis=-1), tail], axis=-1)


def kl64(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * np.log(first / second)).sum(-1)


def with_gradients(function):
    """jit of (KLs by name, their rows' gradients by the student's logits by name)."""

    @jax.jit
    def both(student_logits, teacher):
        nowhere = jnp.zeros(student_logits.shape[:-1], jnp.int32)

        def kls(student_logits):
            comparison = compare(*function(student_logits, teacher), nowhere)
            return {name: getattr(comparison, name) for name in KLS}

        values, back = jax.vjp(kls, student_logits)
        ones, zeros = (jax.tree.map(f, values) for f in (jnp.ones_like, jnp.zeros_like))
        return values, {name: back({**zeros, name: ones[name]})[0] for name in KLS}

    return both


merged = with_gradients(buckets)
whole = with_gradients(lambda student_logits, teacher_logits: (student_logits, teacher_logits))


def test_top_k_keeps_the_most_probable():
    """Ids in falling order of probability, and log-probabilities over the whole vocabulary."""
    logits = normal_logits(0, 2, 3, 20)
    kept, expected = top_k(log_probs(logits), 5), known(logits, 5)
    np.testing.assert_array_equal(kept.ids, expected.ids)
    np.testing.assert_allclose(kept.logp, expected.logp, rtol=1e-6)


def test_buckets_hold_sums_of_probabilities():
    """On [2, 3, V]: softmax of either side's bucket logits is NumPy's sums, to 1e-6."""
    student, teacher = normal_logits(1, 2, 3, 50), normal_logits(2, 2, 3, 50)
    kept = known(teacher, 7)
    both = jax.jit(buckets)(student, kept)
    for logits, whole in zip(both, (student, teacher), strict=True):
        assert logits.shape == (2, 3, 8)
        np.testing.assert_allclose(
            softmax64(logits), bucketed64(softmax64(whole), kept.ids), atol=1e-6
        )


def test_the_whole_vocabulary_loses_nothing():
    """k = V: values and gradients are those of the full KLs, finite though the tail is empty."""
    student, teacher = normal_logits(3, 2, 3, 16), normal_logits(4, 2, 3, 16)
    (values, slopes), expected = merged(student, known(teacher, 16)), whole(student, teacher)
    for name in KLS:
        np.testing.assert_allclose(values[name], expected[0][name], rtol=1e-6, atol=1e-6)
        assert np.isfinite(slopes[name]).all()
        np.testing.assert_allclose(slopes[name], expected[1][name], atol=1e-6)


def test_naming_all_that_exists_loses_nothing():
    """Padding at -inf beyond the named tokens is no tail: KLs and gradients as without it."""
    student, teacher = normal_logits(3, 2, 3, 16), normal_logits(4, 2, 3, 16)
    padded = np.concatenate([student, np.full((2, 3, 4), -np.inf, np.float32)], axis=-1)
    (values, slopes), expected = merged(padded, known(teacher, 16)), whole(student, teacher)
    for name in KLS:
        np.testing.assert_allclose(values[name], expected[0][name], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(slopes[name][..., :16], expected[1][name], atol=1e-6)
        np.testing.assert_array_equal(slopes[name][..., 16:], 0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_merging_tokens_never_raises_a_kl(scale):
    """Of 500 random pairs in float64: the more tokens are named the larger, up to the full KL."""
    student, teacher = (np.float64(normal_logits(s, 500, 12, scale=scale)) for s in (5, 6))
    with jax.enable_x64(True):
        named = [merged(student, known(teacher, k))[0] for k in (1, 5)]
        every = [*named, whole(student, teacher)[0]]
        rising_by_name = {name: np.stack([kls[name] for kls in every]) for name in KLS}
    for rising in rising_by_name.values():
        assert np.all(rising[0] >= 0)
        assert np.diff(rising, axis=0).min() > -1e-10
        assert np.median(rising[-1] - rising[0]) > 0


def test_any_tokens_may_be_named():
    """Ids need not be the teacher's best, nor in order: KLs are NumPy's of the merged sums."""
    student, teacher = normal_logits(9, 40, 30), normal_logits(10, 40, 30)
    random = np.random.default_rng(11)
    ids = random.permuted(np.tile(np.arange(30, dtype=np.int32), (40, 1)), axis=-1)[:, :6]
    p = softmax64(teacher)
    logp = np.log(np.take_along_axis(p, ids, axis=-1)).astype(np.float32)
    q, merged_p = bucketed64(softmax64(student), ids), bucketed64(p, ids)
    order = random.permutation(6)
    for chosen in (slice(None), order):
        tail = np.float32(tail64(p, ids))
        values, _ = merged(student, TopK(ids[:, chosen], logp[:, chosen], tail))
        np.testing.assert_allclose(values["forward_kl"], kl64(merged_p, q), rtol=1e-5)
        np.testing.assert_allclose(values["reverse_kl"], kl64(q, merged_p), rtol=1e-5)


def test_gradient_is_the_dense_definitions():
    """Automatic differentiation of the merged softmax in float64, to 1e-11 of the norm."""
    student, teacher = (np.float64(normal_logits(s, 2, 3, 20)) for s in (12, 13))
    kept = known(teacher, 4)
    named = np.arange(20) == kept.ids[..., None]
    tail = ~named.any(-2, keepdims=True)
    members = np.concatenate([named, tail], axis=-2).astype(np.float64)  # [2, 3, 5, 20]

    def dense(student, members):
        q = jnp.einsum("...kv,...v->...k", members, jax.nn.softmax(student))
        p = jnp.einsum("...kv,...v->...k", members, jax.nn.softmax(teacher))
        return jnp.stack([jnp.sum(p * jnp.log(p / q)), jnp.sum(q * jnp.log(q / p))])

    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(jax.jacrev(dense))(student, members))
        _, slopes = jax.tree.map(np.asarray, merged(student, kept))
    for name, wanted in zip(KLS, expected, strict=True):
        assert slopes[name].dtype == np.float64
        assert np.linalg.norm(slopes[name] - wanted) < 1e-11 * np.linalg.norm(wanted)


def test_a_small_tail_of_the_student_keeps_its_digits():
    """Where named tokens hold all but 1e-6 of the student's mass, its tail is right to 1e-5."""
    student = normal_logits(14, 5, 1000)
    student[:, :8] += np.float32(18.5)
    ids, logp = np.tile(np.arange(8, dtype=np.int32), (5, 1)), np.full((5, 8), np.log(0.1), "f")
    kept = TopK(ids, logp, np.full(5, np.log(0.2), "f"))
    expected = bucketed64(softmax64(student), kept.ids)
    assert np.all((expected[:, -1] > 1e-7) & (expected[:, -1] < 1e-5))
    both = jax.jit(buckets)(student, kept)
    np.testing.assert_allclose(np.exp(log_probs(both[0])), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs(both[1]))[:, -1], 0.2, rtol=1e-5)


def total_variation(student_logp, teacher_logp):
    """A user's own token loss, without a closed form."""
    return 0.5 * jnp.abs(jnp.exp(student_logp) - jnp.exp(teacher_logp)).sum(-1)


def scored(token_loss, student, kept: TopK, targets, sampler_logp):
    """((loss, Scores), the gradient of the loss's sum by the student's logits)."""
    function = token_function(token_loss, divergence)
    extra = {"targets": targets, "sampler_logp": sampler_logp}

    def total(student):
        loss, scores = function(student, kept, extra)
        return loss.sum(), (loss, scores)

    (_, made), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    return made, gradient


def gradient64(student, ids: np.ndarray, by_bucket: np.ndarray) -> np.ndarray:
    """By the logits, of a function of the merged q whose derivative by them is `by_bucket`."""
    q, k = softmax64(student), ids.shape[-1]
    bucket = np.full(q.shape, k)
    np.put_along_axis(bucket, ids, np.arange(k) + np.zeros_like(ids), axis=-1)
    mean = (bucketed64(q, ids) * by_bucket).sum(-1, keepdims=True)
    return q * (np.take_along_axis(by_bucket, bucket, axis=-1) - mean)


@pytest.mark.parametrize("loss", [mix(forward_kl, reverse_kl, weight=0.8), total_variation])
def test_scores_against_a_top_k_teacher(loss):
    """Divergences are between buckets, the student's own scores over the vocabulary, on [2, 3, V];
    what top-k can't tell is None."""
    student, teacher = normal_logits(15, 2, 3, 20), normal_logits(16, 2, 3, 20)
    student[0, :2, 7] = teacher[0, :2, 7] = 6.0  # two tokens whose best is the same
    kept, targets = known(teacher, 4), np.arange(6, dtype=np.int32).reshape(2, 3)
    sampler_logp = -np.random.default_rng(17).random((2, 3)).astype(np.float32)
    (made, scores), gradient = scored(loss, student, kept, targets, sampler_logp)
    assert scores.teacher_logp is None
    assert scores.teacher_entropy is None
    log_q = np.log(softmax64(student))
    own = np.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.student_logp, own, rtol=1e-6)
    np.testing.assert_allclose(scores.student_entropy, -(np.exp(log_q) * log_q).sum(-1), rtol=1e-5)
    agrees = student.argmax(-1) == teacher.argmax(-1)
    assert 0 < agrees.sum() < 6
    np.testing.assert_array_equal(scores.top1_agreement, agrees)
    np.testing.assert_array_equal(scores.teacher_top1, teacher.argmax(-1) == targets)
    np.testing.assert_array_equal(scores.sampler_logp, sampler_logp)
    assert scores.mask.all()
    q, p = (bucketed64(softmax64(x), kept.ids) for x in (student, teacher))
    np.testing.assert_allclose(scores.forward_kl, kl64(p, q), rtol=1e-5)
    np.testing.assert_allclose(scores.reverse_kl, kl64(q, p), rtol=1e-5)
    if loss is total_variation:
        expected, by_bucket = 0.5 * np.abs(q - p).sum(-1), 0.5 * np.sign(q - p)
    else:
        expected = 0.8 * kl64(p, q) + 0.2 * kl64(q, p)
        by_bucket = -0.8 * p / q + 0.2 * np.log(q / p)
    np.testing.assert_allclose(scores.divergence, expected, rtol=1e-5)
    np.testing.assert_array_equal(made, scores.divergence)
    np.testing.assert_allclose(gradient, gradient64(student, kept.ids, by_bucket), atol=2e-6)


def test_top1_agreement_reads_the_ids_that_are_given():
    """The best named token counts wherever it stands among the ids."""
    student = np.float32([[0, 3, 1, 0], [0, 3, 1, 0]])
    logp, tail = np.log(np.float32([[0.2, 0.6], [0.2, 0.6]])), np.log(np.float32([0.2, 0.2]))
    kept = TopK(np.int32([[2, 1], [1, 2]]), logp, tail)
    zeros = np.zeros(2, np.int32)
    function = token_function(forward_kl, divergence)
    asked = {"targets": np.int32([1, 1]), "sampler_logp": zeros}
    _, scores = jax.jit(function)(student, kept, asked)
    np.testing.assert_array_equal(scores.top1_agreement, [1, 0])
    np.testing.assert_array_equal(scores.teacher_top1, [1, 0])


def test_a_sure_teacher_keeps_its_tail():
    """Where the unnamed mass is under 1e-15, divergences are finite and at most the full ones."""
    student, teacher = (np.random.default_rng(s).normal(0, 3, (20, 5000)) for s in (15, 16))
    teacher[:, 0] = 40.0
    student, teacher = np.float32(student), np.float32(teacher)
    values, gradients = merged(student, jax.jit(top_k, static_argnums=1)(log_probs(teacher), 8))
    full, _ = whole(student, teacher)
    for name in KLS:
        assert np.isfinite(gradients[name]).all()
        assert np.all(values[name] <= full[name] * (1 + 1e-5))
        assert np.all(values[name] > 1)


def expectation_over_samples(objective, student, kept, logp):
    """(mean value, mean gradient by the logits) over all sampled tokens, each as probable as the
    student makes it, in float64; the teacher says each token's log-probability."""
    size = student.shape[-1]
    q = jax.nn.softmax(student)

    def of(token):
        extra = {"targets": token[None], "sampler_logp": jnp.zeros(1)}
        function = token_function(reverse_kl, objective)
        alone = jax.tree.map(lambda x: x[None], kept._replace(sampled_logp=logp[token]))
        return jax.value_and_grad(lambda s: function(s[None], alone, extra)[0][0])(student)

    values, slopes = jax.jit(jax.vmap(of))(jnp.arange(size))
    return np.asarray(q @ values), np.asarray(q @ slopes)


@pytest.mark.parametrize("tail", ["right", "floored", "any"])
@pytest.mark.parametrize("k", [1, 4, 11, 12])
def test_the_sampled_token_undoes_what_merging_loses(k, tail):
    """By enumeration over a vocabulary of 12, in float64: buckets and tail_residual have, in
    expectation over tokens of the student, the gradient of reverse KL over the vocabulary to
    1e-12, whatever mass the tail is said to have; the value too, less the log of the mass that is
    then said in all. Without the residual neither is near."""
    rng = np.random.default_rng(20 + k)
    student, teacher = rng.normal(0, 2, 12), rng.normal(0, 2, 12)
    p, q = softmax64(teacher), softmax64(student)
    kept = known(teacher, k)
    said = {"right": kept.tail_logp, "floored": np.log(1e-6), "any": np.log(0.3)}[tail]
    if k == 12:
        said = -np.inf  # nothing is outside
    total = np.exp(kept.logp).sum() + np.exp(said)
    full = (q * np.log(q / p)).sum()
    by_logits = q * (np.log(q / p) - full)
    with jax.enable_x64(True):
        kept = TopK(*map(jnp.asarray, (kept.ids, kept.logp, np.float64(said))))
        both = add(reverse_divergence, tail_residual)
        value, slope = expectation_over_samples(both, student, kept, jnp.asarray(np.log(p)))
        coarse = expectation_over_samples(reverse_divergence, student, kept, jnp.asarray(np.log(p)))
    np.testing.assert_allclose(slope, by_logits, atol=1e-12)
    np.testing.assert_allclose(value, full + np.log(total), rtol=1e-12)
    if k < 11:  # of a tail of one token nothing is lost
        assert np.abs(coarse[1] - by_logits).max() > 1e-3 * np.abs(by_logits).max()


def test_the_residual_of_a_whole_vocabulary_is_none():
    """A teacher whose vocabulary is known leaves nothing out; one whose sampled token is not known
    is refused in one line; the residual is logged as a term of the sum."""
    student, teacher = normal_logits(21, 5, 12), normal_logits(22, 5, 12)
    extra = {"targets": np.arange(5), "sampler_logp": np.zeros(5, np.float32)}
    both = token_function(reverse_kl, add(reverse_divergence, tail_residual))
    plain = token_function(reverse_kl, reverse_divergence)
    made, scores = jax.jit(both)(student, teacher, extra)
    np.testing.assert_array_equal(made, jax.jit(plain)(student, teacher, extra)[0])
    np.testing.assert_array_equal(scores.parts["tail_residual"], 0)
    assert scores.residual is None
    with pytest.raises(ConfigError, match="the objective needs residual"):
        both(student, known(teacher, 3), extra)


def test_a_teacher_that_knows_the_sampled_token():
    """Its log-probability, and the residual, as NumPy has them; 0 of tokens that are named."""
    student, teacher = normal_logits(23, 40, 12), normal_logits(24, 40, 12)
    p, q, targets = softmax64(teacher), softmax64(student), np.arange(40) % 12
    at = targets[:, None]
    kept = known(teacher, 3)
    own = np.take_along_axis(np.log(p), at, -1)[:, 0]
    kept = kept._replace(sampled_logp=own.astype(np.float32))
    extra = {"targets": targets, "sampler_logp": np.zeros(40, np.float32)}
    _, scores = jax.jit(token_function(reverse_kl, reverse_divergence))(student, kept, extra)
    np.testing.assert_allclose(scores.teacher_logp, own, rtol=1e-6)
    named = (kept.ids == at).any(-1)
    rest = [np.log(bucketed64(x, kept.ids)[:, -1]) for x in (q, p)]
    wanted = (np.log(np.take_along_axis(q, at, -1)[:, 0]) - rest[0]) - (own - rest[1])
    assert 0 < named.sum() < 40
    np.testing.assert_allclose(scores.residual, np.where(named, 0, wanted), atol=2e-5)
