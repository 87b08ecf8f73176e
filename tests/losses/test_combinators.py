"""Combinators, their text, and the reductions: laws, and a parser that evaluates nothing."""

from __future__ import annotations

import contextlib
import math
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import (
    add,
    at_temperature,
    clip,
    divergence,
    forward_kl,
    importance,
    mix,
    negative_log_likelihood,
    reverse_kl,
    scale,
    sequence_mean,
    token_mean,
)
from kdjax.base import Scores, WeightedSum
from kdjax.config.names import OBJECTIVES, TOKEN_LOSSES, Names, parse
from kdjax.errors import ConfigError
from kdjax.losses.combinators import closed_form
from kdjax.losses.composition import describe
from kdjax.losses.reductions import reduce
from kdjax.numerics import gather_last, log_probs
from kdjax.step.closed_forms import compare

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def log_softmax(logits) -> np.ndarray:
    return np.float32(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


RNG = np.random.default_rng(0)
LOGP = tuple(jnp.asarray(log_softmax(RNG.normal(0, 2, (2, 3, 7)))) for _ in range(2))
"""(student, teacher) log-probabilities, [2, 3, 7]."""

SCORES = Scores(
    student_logp=jnp.float32(-RNG.exponential(size=(2, 3))),
    student_entropy=jnp.ones((2, 3)),
    sampler_logp=jnp.zeros((2, 3)),
    mask=jnp.ones((2, 3), bool),
    divergence=jnp.float32(RNG.exponential(size=(2, 3))),
)

LEVELS = {
    "token_loss": (forward_kl, reverse_kl, LOGP),
    "objective": (divergence, negative_log_likelihood, (SCORES,)),
}


@pytest.fixture(params=LEVELS.values(), ids=LEVELS)
def level(request):
    """(a, b, arguments) for each kind of function that combinators accept."""
    return request.param


def test_importance_weighs_by_the_ratio():
    """min(q / sampler, maximum) times the objective, by hand; the ratio carries no gradient."""
    student = jnp.log(jnp.array([0.5, 0.2, 0.9]))
    sampler = jnp.log(jnp.array([0.25, 0.4, 0.1]))

    def weighed(student):
        mask = jnp.ones(3, bool)
        return importance(negative_log_likelihood, 3.0)(Scores(student, student, sampler, mask))

    ratios = np.array([2.0, 0.5, 3.0])
    np.testing.assert_allclose(weighed(student), -ratios * student, rtol=1e-6)
    slope = jax.grad(lambda s: weighed(s).sum())(student)
    np.testing.assert_allclose(slope, -ratios, rtol=1e-6)
    with pytest.raises(ConfigError, match="importance: maximum must be above 0, got 0"):
        importance(negative_log_likelihood, 0)


def test_mixing_a_loss_with_itself_is_the_loss(level):
    """mix(a, a, w) = a."""
    a, _, arguments = level
    np.testing.assert_allclose(mix(a, a, weight=0.3)(*arguments), a(*arguments), rtol=1e-6)


def test_mix_at_its_ends(level):
    """The weight belongs to the first: mix(a, b, 1) = a and mix(a, b, 0) = b."""
    a, b, arguments = level
    chex.assert_trees_all_equal(mix(a, b, weight=1)(*arguments), a(*arguments))
    chex.assert_trees_all_equal(mix(a, b, weight=0)(*arguments), b(*arguments))


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_mix_is_linear_in_its_weight(level, weight):
    """mix(a, b, w) = b + w (a - b)."""
    a, b, arguments = level
    line = b(*arguments) + weight * (a(*arguments) - b(*arguments))
    np.testing.assert_allclose(mix(a, b, weight=weight)(*arguments), line, rtol=1e-5, atol=1e-6)


def test_combinators_nest(level):
    """mix(mix(a, b, u), b, w) = mix(a, b, u w): a combination is a loss like any other."""
    a, b, arguments = level
    nested = mix(mix(a, b, weight=0.5), b, weight=0.6)
    flat = mix(a, b, weight=0.3)
    np.testing.assert_allclose(nested(*arguments), flat(*arguments), rtol=1e-5)


@pytest.mark.parametrize("weight", [-0.1, 1.3, math.nan])
def test_mix_refuses_weights_outside_0_1(weight):
    """The error names the argument and what it got."""
    with pytest.raises(ConfigError, match=rf"mix: weight must be in \[0, 1\], got {weight}"):
        mix(forward_kl, reverse_kl, weight=weight)


def test_scale_and_add(level):
    """add(a, b, scale(a, -2)) = b - a; add(a) = a."""
    a, b, arguments = level
    expected = np.asarray(b(*arguments)) - np.asarray(a(*arguments))
    np.testing.assert_allclose(add(a, b, scale(a, -2))(*arguments), expected, atol=1e-6)
    chex.assert_trees_all_equal(add(a)(*arguments), a(*arguments))


def test_clip_is_the_minimum_and_drops_the_gradient_above(level):
    """clip(a, c) = min(a, c); above c the gradient is 0, below it is a's."""
    a, _, arguments = level
    values = np.asarray(a(*arguments))
    bound = float(np.median(values)) + 1e-4
    np.testing.assert_array_equal(clip(a, bound)(*arguments), np.minimum(values, np.float32(bound)))
    slope = jax.vmap(jax.grad(clip(lambda x: 3 * x, 6.0)))(jnp.array([1.0, 5.0]))
    np.testing.assert_array_equal(slope, [3.0, 0.0])


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_temperature_one_changes_nothing(loss):
    """at_temperature(a, 1) = a."""
    np.testing.assert_allclose(at_temperature(loss, 1.0)(*LOGP), loss(*LOGP), rtol=1e-5)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_temperature_flattens_logits(loss):
    """at_temperature(a, T) compares softmax(logits / T), and a shift of the logits is no matter."""
    student, teacher = RNG.normal(0, 2, (2, 4, 6)).astype(np.float32)
    flattened = loss(log_softmax(student / 2.5), log_softmax(teacher / 2.5))
    tempered = at_temperature(loss, 2.5)
    np.testing.assert_allclose(tempered(student, teacher), flattened, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(tempered(student + 3, teacher - 5), flattened, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_above_zero(temperature):
    """The error names the argument and what it got."""
    with pytest.raises(ConfigError, match=f"temperature must be above 0, got {temperature}"):
        at_temperature(forward_kl, temperature)


def numbers(low: float, high: float):
    return st.floats(low, high, allow_nan=False) | st.integers(math.ceil(low), math.floor(high))


def combined(losses):
    """One combinator around losses that exist, any of them, with any legal number."""
    return st.one_of(
        st.builds(lambda a, b, w: mix(a, b, weight=w), losses, losses, numbers(0, 1)),
        st.builds(scale, losses, numbers(-1e6, 1e6)),
        st.builds(clip, losses, numbers(-1e6, 1e6)),
        st.builds(at_temperature, losses, numbers(0.25, 64)),
        st.lists(losses, min_size=1, max_size=3).map(lambda some: add(*some)),
    )


expressions = st.recursive(st.sampled_from([forward_kl, reverse_kl]), combined, max_leaves=6)


@quick
@given(expressions)
def test_a_description_reads_back_as_the_same_loss(loss):
    """parse(describe(a)) has the same description, and the same values bit for bit."""
    again = parse(describe(loss), TOKEN_LOSSES)
    assert describe(again) == describe(loss)
    one_token = tuple(x[0, 0] for x in LOGP)
    chex.assert_trees_all_equal(again(*one_token), loss(*one_token))


def test_numpy_numbers_are_described_as_plain_ones():
    """A sweep over np.linspace leaves text that reads back."""
    for weight in np.linspace(0, 1, 3):
        loss = scale(mix(forward_kl, reverse_kl, weight=weight), np.float32(0.5))
        assert describe(parse(describe(loss), TOKEN_LOSSES)) == describe(loss)
        assert describe(loss) == f"scale(mix(forward_kl, reverse_kl, weight={weight!s}), 0.5)"


HOSTILE = [
    "", " ", "\0", "\ud800", "0.5", "-0.5", "True", "None", "'forward_kl'", "forward_kl()",
    "kl", "Forward_kl", "divergence", "parse", "_call", "forward_kl.__globals__",
    "forward_kl.__globals__['ast']", "__import__('os').system('true')", "exec('1')",
    "lambda s, t: s", "(lambda: forward_kl)()", "[forward_kl][0]", "{forward_kl}", "(forward_kl,)",
    "forward_kl if 1 else reverse_kl", "forward_kl or reverse_kl", "(x := forward_kl)",
    "f'{forward_kl}'", "forward_kl; reverse_kl", "forward_kl\nreverse_kl", "import os",
    "0.5 * forward_kl + reverse_kl", "scale(forward_kl, 1 + 1)", "scale(forward_kl, 2 ** 9999)",
    "scale(forward_kl, True)", "scale(forward_kl, 1j)", "scale(forward_kl, 1e999)",
    "scale(forward_kl, -1e999)", "scale(forward_kl, '1')", "scale(forward_kl, reverse_kl)",
    "scale(forward_kl, --1)", "scale(forward_kl, ~1)", "scale(0.5, forward_kl)",
    "scale(forward_kl)", "scale(forward_kl, 1, 2)", "scale(forward_kl, factr=1)",
    "scale(*forward_kl)", "scale(**forward_kl)", "scale(forward_kl, 1, factor=1)",
    "mix(forward_kl, reverse_kl, 0.5)", "mix(forward_kl, reverse_kl)", "mix(1, 2, weight=0.5)",
    "mix(forward_kl, reverse_kl, weight=reverse_kl)", "mix(forward_kl, reverse_kl, weight=2)",
    "mix(forward_kl, reverse_kl, weight=0.2, weight=0.8)", "add()", "add(forward_kl, 1)",
    "clip(forward_kl, maximum=forward_kl)", "at_temperature(forward_kl, 0)",
    "at_temperature(forward_kl, 2).__globals__", "mix.__globals__", "describe(forward_kl)",
]  # fmt: skip

HUGE = {
    "10,000 parentheses": "(" * 10_000 + "forward_kl" + ")" * 10_000,
    "10,000 calls": "scale(" * 10_000 + "forward_kl" + ", 1)" * 10_000,
    "100,000 minus signs": "-" * 100_000 + "1",
    "100,000 terms": "1+" * 100_000 + "1",
    "100,000 attributes": "forward_kl" + ".x" * 100_000,
    "a long name": "x" * 1_000_000,
    "a long number": "scale(forward_kl, " + "9" * 4_000 + ")",
    "a longer number": "9" * 100_000,
}


@pytest.mark.parametrize("text", HOSTILE)
def test_parse_refuses_everything_else(text):
    """A ConfigError of one line; only names of the table, numbers and combinator calls are read."""
    with pytest.raises(ConfigError) as caught:
        parse(text, TOKEN_LOSSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_parse_refuses_huge_texts_quickly_and_briefly(text):
    """Deep or long texts are a ConfigError too, whose message does not repeat all of them."""
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        parse(text, TOKEN_LOSSES)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 1_000


def test_parse_evaluates_nothing(tmp_path):
    """No call happens but a combinator's: not a builtin's, not that of a function of the table."""
    called = []
    spy = {"forward_kl": lambda *arguments: called.append(arguments)}
    names = Names(spy, TOKEN_LOSSES.combinators)
    written = tmp_path / "written"
    for text in (
        f"open({str(written)!r}, 'w')",
        f"scale(forward_kl, open({str(written)!r}, 'w'))",
        "forward_kl()",
        "forward_kl(1, 2)",
        "scale(forward_kl(), 1)",
        "add(forward_kl, forward_kl(1))",
    ):
        with pytest.raises(ConfigError):
            parse(text, names)
    parse("add(forward_kl, scale(forward_kl, 2))", names)
    assert called == []
    assert not written.exists()


@quick
@given(st.text(alphabet="mixscaleadd_kforwarv(),.=0123456789 -'[]", max_size=60))
def test_parse_gives_a_loss_or_a_config_error(text):
    """Whatever the text, nothing else is raised and nothing but a function comes back."""
    with contextlib.suppress(ConfigError):
        assert callable(parse(text, TOKEN_LOSSES))


def test_divergence_without_a_teacher():
    """Nothing to diverge from: ConfigError with the remedy, alone and inside a combination."""
    alone = SCORES._replace(divergence=None)
    for objective in (divergence, add(negative_log_likelihood, scale(divergence, 0.1))):
        with pytest.raises(ConfigError, match=r"needs divergence, .* set teacher"):
            objective(alone)


def test_negative_log_likelihood_is_forward_kl_to_a_one_hot_target():
    """SFT on a token is forward KL where the teacher is certain of that token."""
    student_logp = LOGP[0]
    token = np.array([[0, 3, 6], [1, 1, 2]])
    one_hot = jnp.where(np.arange(7) == token[..., None], 0.0, -jnp.inf)
    scores = SCORES._replace(student_logp=gather_last(student_logp, token))
    expected = forward_kl(student_logp, one_hot)
    np.testing.assert_allclose(negative_log_likelihood(scores), expected, rtol=1e-6)


def test_the_tables_hold_each_function_under_its_own_name():
    """describe is the key of the table that parse reads."""
    for table in (TOKEN_LOSSES, OBJECTIVES):
        names = table.functions
        assert {name: describe(f) for name, f in names.items()} == {name: name for name in names}


LENGTHS = np.array([5, 1, 0, 3])
MASK = jnp.asarray(np.arange(5)[None] < LENGTHS[:, None])
LOSS = jnp.asarray(RNG.exponential(size=(4, 5)), jnp.float32)


def rows() -> list[np.ndarray]:
    """The trained tokens' losses of each row that has any."""
    return [np.float64(LOSS[b, :n]) for b, n in enumerate(LENGTHS) if n]


def test_sequence_mean_by_hand():
    """The mean over sequences of each one's token mean; an empty row is not a sequence."""
    mean = reduce(LOSS, MASK, sequence_mean(MASK)).mean()
    np.testing.assert_allclose(mean, np.mean([row.mean() for row in rows()]), rtol=1e-6)


def test_token_mean_by_hand():
    """The mean over all trained tokens."""
    mean = reduce(LOSS, MASK, token_mean(MASK)).mean()
    np.testing.assert_allclose(mean, np.concatenate(rows()).mean(), rtol=1e-6)


reductions = pytest.mark.parametrize("reduction", [sequence_mean, token_mean])


@reductions
def test_masked_is_deleted(reduction):
    """Columns behind the mask may be cut off, and hold NaN or infinity, without a trace."""
    wide_mask = jnp.pad(MASK, ((0, 0), (0, 3)))
    padding = jnp.broadcast_to(jnp.array([jnp.nan, jnp.inf, 7.0]), (4, 3))
    wide_loss = jnp.concatenate([jnp.where(MASK, LOSS, jnp.nan), padding], axis=1)

    def mean(loss, mask):
        return reduce(loss, mask, reduction(mask)).mean()

    value, gradient = jax.value_and_grad(mean)(wide_loss, wide_mask)
    expected, expected_gradient = jax.value_and_grad(mean)(LOSS, MASK)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :5], expected_gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 5:], 0)


@reductions
def test_nothing_to_train_on_is_exactly_zero(reduction):
    """An all-masked batch has mean 0 and a gradient of 0, with NaN everywhere."""
    mask = jnp.zeros((2, 3), bool)
    value, gradient = jax.value_and_grad(lambda x: reduce(x, mask, reduction(mask)).mean())(
        jnp.full((2, 3), jnp.nan)
    )
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0)


@reductions
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(reduction, pieces):
    """Totals and weights of the parts, added and divided once, are the whole batch's mean."""
    parts = [
        reduce(loss, mask, reduction(mask))
        for loss, mask in zip(jnp.split(LOSS, pieces), jnp.split(MASK, pieces), strict=True)
    ]
    added = jax.tree.map(lambda *x: sum(x), *parts)
    assert isinstance(added, WeightedSum)
    whole = reduce(LOSS, MASK, reduction(MASK))
    chex.assert_trees_all_close(added, whole, rtol=1e-6)
    np.testing.assert_allclose(added.mean(), whole.mean(), rtol=1e-6)


mixed = mix(forward_kl, reverse_kl, weight=0.3)
CLOSED = [
    forward_kl,
    reverse_kl,
    mixed,
    scale(reverse_kl, -0.7),
    add(forward_kl, reverse_kl, scale(forward_kl, 0.5)),
    clip(forward_kl, 2.0),
    at_temperature(reverse_kl, 2.5),
    at_temperature(mixed, 0.5),
    at_temperature(at_temperature(forward_kl, 2.0), 1.7),
    add(at_temperature(clip(mixed, 1.0), 3.0), scale(at_temperature(mixed, 2.0), 4.0), reverse_kl),
]


CLOSED_LOGITS = np.random.default_rng(5).normal(0, 2, (2, 8, 12))
"""(student, teacher) logits, [8, 12] in float64."""


def total_variation(student_logp, teacher_logp):
    """A user's own token loss."""
    return 0.5 * jnp.abs(jnp.exp(student_logp) - jnp.exp(teacher_logp)).sum(-1)


def of_logits_in_closed_form(loss, student, teacher):
    """The loss from logits through `compare`, which reads no target here."""
    nowhere = jnp.zeros(student.shape[:-1], jnp.int32)
    return closed_form(loss)(lambda tau: compare(student / tau, teacher / tau, nowhere))


@pytest.mark.parametrize("loss", CLOSED, ids=describe)
def test_a_closed_form_is_the_loss(loss):
    """Value and gradient of the loss between log-probabilities, to 1e-11 in float64."""
    student, teacher = CLOSED_LOGITS
    weights = np.linspace(0.5, 2, 8)

    def value_and_gradient(of_logits):
        def total(student):
            value = of_logits(student)
            return jnp.sum(weights * value), value

        (_, value), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
        return np.asarray(value), np.asarray(gradient)

    with jax.enable_x64(True):
        made = value_and_gradient(lambda s: of_logits_in_closed_form(loss, s, teacher))
        expected = value_and_gradient(lambda s: loss(log_probs(s), log_probs(jnp.asarray(teacher))))
    assert made[0].dtype == np.float64
    for got, wanted in zip(made, expected, strict=True):
        assert np.linalg.norm(wanted) > 0.1
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-11)


def test_the_clipped_case_has_rows_on_both_sides_of_the_bound():
    """So its value and its gradient are looked at above the bound and below."""
    student, teacher = (log_softmax(logits) for logits in CLOSED_LOGITS)
    values = (np.exp(teacher) * (teacher - student)).sum(-1)
    assert values.min() < 1.9
    assert values.max() > 2.1


@pytest.mark.parametrize(
    "loss",
    [
        total_variation,
        scale(total_variation, 2.0),
        mix(forward_kl, total_variation, weight=0.5),
        add(forward_kl, reverse_kl, total_variation),
        clip(add(forward_kl, at_temperature(total_variation, 2.0)), 1.0),
        at_temperature(mix(total_variation, forward_kl, weight=0.1), 2.0),
    ],
    ids=describe,
)
def test_a_loss_of_the_users_own_has_no_closed_form(loss):
    """None, for it and whatever it is a part of."""
    assert closed_form(loss) is None
