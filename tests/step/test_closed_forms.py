"""Every statistic of a comparison and its gradient, against float64 NumPy and against laws."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kdjax.step.closed_forms import Comparison, compare

KLS = ("forward_kl", "reverse_kl")
DIFFERENTIABLE = (*KLS, "student_logp", "student_entropy")

each_kl = pytest.mark.parametrize("name", KLS)
compared = jax.jit(compare)


def normal_logits(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    """Signed float32 logits."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def random_targets(seed: int, vocab_size: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def first_tokens(logits: np.ndarray) -> np.ndarray:
    """Targets for tests that do not look at them."""
    return np.zeros(logits.shape[:-1], np.int32)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def expectation64(logp: np.ndarray, value: np.ndarray) -> np.ndarray:
    """sum e^logp value over entries with mass."""
    return np.where(np.exp(logp) > 0, np.exp(logp) * value, 0.0).sum(-1)


@np.errstate(invalid="ignore")
def oracle(student, teacher, targets) -> Comparison:
    """The textbook definitions, in float64."""
    log_q, log_p = log_softmax64(student), log_softmax64(teacher)
    index = np.asarray(targets)[..., None]
    return Comparison(
        student_logp=np.take_along_axis(log_q, index, axis=-1)[..., 0],
        student_entropy=-expectation64(log_q, log_q),
        teacher_logp=np.take_along_axis(log_p, index, axis=-1)[..., 0],
        teacher_entropy=-expectation64(log_p, log_p),
        forward_kl=expectation64(log_p, log_p - log_q),
        reverse_kl=expectation64(log_q, log_q - log_p),
        top1_agreement=1.0 * (log_q.argmax(-1) == log_p.argmax(-1)),
        teacher_top1=1.0 * (log_p.argmax(-1) == np.asarray(targets)),
    )


def gradient_oracle(student, teacher, targets, **coefficients) -> np.ndarray:
    """The gradient of sum_field coefficient * field by the student's logits, in float64."""
    expected, log_q, log_p = (
        oracle(student, teacher, targets), log_softmax64(student), log_softmax64(teacher)
    )  # fmt: skip
    q, p = np.exp(log_q), np.exp(log_p)
    one_hot = np.arange(q.shape[-1]) == np.asarray(targets)[..., None]
    terms = {
        "forward_kl": q - p,
        "reverse_kl": q * (log_q - log_p - expected.reverse_kl[..., None]),
        "student_logp": one_hot - q,
        "student_entropy": -q * (log_q + expected.student_entropy[..., None]),
    }
    return sum(np.asarray(c)[..., None] * terms[name] for name, c in coefficients.items())


@jax.jit
def gradient(student, teacher, targets, coefficients):
    """The gradient of sum_field coefficient * field; a field that is not named is not touched."""

    def total(logits):
        comparison = compare(logits, teacher, targets)
        return sum(jnp.sum(c * getattr(comparison, name)) for name, c in coefficients.items())

    return jax.grad(total)(student)


def gradient_of(name: str, student, teacher, targets=None):
    """The gradient of one field, summed over the rows."""
    targets = first_tokens(student) if targets is None else targets
    return gradient(student, teacher, targets, {name: np.ones(student.shape[:-1], student.dtype)})


def gradient_of_all(student, teacher, targets):
    """The gradient of all four fields together, each row's under coefficients of its own."""
    shape = student.shape[:-1]
    random = np.random.default_rng(99)
    coefficients = {name: random.normal(size=shape).astype(np.float32) for name in DIFFERENTIABLE}
    return np.asarray(gradient(student, teacher, targets, coefficients))


def assert_close(comparison: Comparison, expected: Comparison, rtol: float) -> None:
    for name, got, wanted in zip(Comparison._fields, comparison, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol, err_msg=name)


def assert_relative(got, expected, bound: float) -> None:
    """The error's norm is below the bound times the expected array's."""
    error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(expected))
    assert error < bound * np.linalg.norm(np.asarray(expected))


@pytest.mark.parametrize("offset", [0, 1000], ids=["", "offset"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_fields_are_their_definitions(scale, offset):
    """Float32 on [2, 3, V] signed logits, one side's normaliser far off: float64's to 2e-6."""
    student, teacher = normal_logits(0, 2, 3, 512, scale=scale), normal_logits(1, 2, 3, 512)
    teacher = teacher + np.float32(offset)
    teacher[0, 1] = student[0, 1] + normal_logits(2, 512, scale=1e-3)  # one row that agrees
    targets = random_targets(2, 512, 2, 3)
    comparison, expected = compared(student, teacher, targets), oracle(student, teacher, targets)
    assert_close(comparison, expected, 2e-6)
    assert {x.shape for x in comparison} == {(2, 3)}
    assert {0.0, 1.0} == set(np.asarray(comparison.top1_agreement).flat)


@pytest.mark.parametrize("offset", [0, 1000], ids=["", "offset"])
def test_fields_are_their_definitions_in_float64(offset):
    """With float64 logits of deviation 30 the fields are float64, and right to 1e-12."""
    student, teacher = (np.float64(normal_logits(s, 2, 3, 512, scale=30.0)) for s in (3, 4))
    teacher = teacher + offset
    targets = random_targets(5, 512, 2, 3)
    with jax.enable_x64(True):
        comparison = compared(student, teacher, targets)
        assert {x.dtype for x in comparison} == {np.dtype(np.float64)}
    assert_close(comparison, oracle(student, teacher, targets), 1e-12)


def dense(name: str, student, teacher, targets):
    """The field as its plain formula, for automatic differentiation."""
    log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    match name:
        case "forward_kl":
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        case "reverse_kl":
            return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        case "student_entropy":
            return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    return jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("names", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradient_is_the_closed_form_and_the_dense_formulas(names, scale):
    """Alone and together, under a coefficient for each row: both float64 references to 1e-11."""
    student, teacher = (np.float64(normal_logits(s, 2, 3, 64, scale=scale)) for s in (6, 7))
    targets = random_targets(8, 64, 2, 3)
    random = np.random.default_rng(9)
    coefficients = {name: random.normal(size=(2, 3)) for name in names}
    with jax.enable_x64(True):
        got = gradient(student, teacher, targets, coefficients)

        @jax.jit
        def automatic(student, coefficients):
            return sum(
                jnp.sum(c * dense(name, student, teacher, targets))
                for name, c in coefficients.items()
            )

        expected = jax.grad(automatic)(student, coefficients)
        assert got.dtype == np.float64
        got, expected = np.asarray(got), np.asarray(expected)
    assert_relative(got, expected, 1e-11)
    assert_relative(got, gradient_oracle(student, teacher, targets, **coefficients), 1e-11)


def test_top1_agreement_and_teacher_fields_have_no_gradient():
    """Neither moves with the student's logits, and nothing at all flows to the teacher's."""
    student, teacher, targets = normal_logits(10, 2, 16), normal_logits(11, 2, 16), first_tokens
    for name in ("top1_agreement", "teacher_top1", "teacher_logp", "teacher_entropy"):
        np.testing.assert_array_equal(gradient_of(name, student, teacher), 0)

    @jax.jit
    @jax.grad
    def by_teacher(teacher):
        return sum(x.sum() for x in compare(student, teacher, targets(student)))

    np.testing.assert_array_equal(by_teacher(teacher), 0)


@pytest.mark.parametrize("apart", [1e-3, 0.1, 3.0])
@each_kl
def test_float32_gradient_near_convergence_and_far_from_it(name, apart):
    """With logits of deviation 30, 1e-3 to 3 apart, it is float64's to 1e-5 of the norm."""
    teacher = normal_logits(12, 4, 4096, scale=30.0)
    student = teacher + normal_logits(13, 4, 4096, scale=apart)
    expected = gradient_oracle(student, teacher, first_tokens(student), **{name: np.ones(4)})
    assert_relative(gradient_of(name, student, teacher), expected, 1e-5)


@pytest.mark.parametrize("shift", [0, 16], ids=["", "shifted"])
def test_equal_logits_give_exactly_zero(shift):
    """Equal distributions at V = 151,936: KLs and their gradients are 0, exactly, in float32."""
    student = np.round(normal_logits(14, 2, 151_936, scale=30.0) * 1024) / np.float32(1024)
    teacher = student + np.float32(shift)  # of multiples of 1/1024, an exact sum
    comparison = compared(student, teacher, first_tokens(student))
    for name in KLS:
        np.testing.assert_array_equal(getattr(comparison, name), 0)
        np.testing.assert_array_equal(gradient_of(name, student, teacher), 0)
    np.testing.assert_array_equal(comparison.top1_agreement, 1)


def test_equal_logits_give_exactly_zero_uncompiled():
    """Op by op, too."""
    logits = normal_logits(15, 2, 64, scale=30.0)

    def kls(student):
        comparison = compare(student, logits, first_tokens(logits))
        return comparison.forward_kl, comparison.reverse_kl

    values, back = jax.vjp(kls, logits)
    (slope,) = back(jax.tree.map(jnp.ones_like, values))
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("apart", [1e-7, 3e-7, 1e-5])
def test_kl_is_never_negative(apart):
    """Of 2,000 pairs nearly equal and nearly flat, where rounding exceeds the KL, none is below."""
    teacher = normal_logits(16, 2000, 128, scale=0.1)
    student = teacher + normal_logits(17, 2000, 128, scale=apart)
    comparison = compared(student, teacher, first_tokens(student))
    assert min(comparison.forward_kl.min(), comparison.reverse_kl.min()) >= 0


@pytest.mark.parametrize(("apart", "mean", "bound"), [(0.077, 3e-3, 3e-5), (4.5e-3, 1e-5, 5e-4)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_small_kls_keep_their_digits(scale, apart, mean, bound):
    """At V = 20,000 in float32: within 3e-5 of a KL of 0.003, within 5e-4 of one of 1e-5.

    The last columns are padding, which must not cost digits."""
    teacher = normal_logits(18, 16, 20_000, scale=scale)
    student = teacher + normal_logits(19, 16, 20_000, scale=apart)
    student[:, -9:] = teacher[:, -9:] = -np.inf
    targets = first_tokens(student)
    comparison, expected = compared(student, teacher, targets), oracle(student, teacher, targets)
    np.testing.assert_allclose(expected.forward_kl.mean(), mean, rtol=0.2)
    for name in KLS:
        np.testing.assert_allclose(getattr(comparison, name), getattr(expected, name), rtol=bound)


def test_entries_excluded_by_both_are_as_good_as_deleted():
    """-inf on both sides adds nothing to any field; the gradient there is 0, elsewhere as before.

    They stand at the ends and in between, and a target is never one of them."""
    kept = np.array([1, 2, 3, 5, 6, 9, 10, 11, 12, 14])
    student, teacher = normal_logits(20, 4, 16), normal_logits(21, 4, 16)
    excluded = np.setdiff1d(np.arange(16), kept)
    student[:, excluded] = teacher[:, excluded] = -np.inf
    rows = random_targets(22, len(kept), 4)
    comparison = compared(student, teacher, kept[rows])
    few = student[:, kept], teacher[:, kept], rows
    assert_close(comparison, compared(*few), 1e-6)
    slope = gradient_of_all(student, teacher, kept[rows])
    np.testing.assert_array_equal(slope[:, excluded], 0)
    np.testing.assert_allclose(slope[:, kept], gradient_of_all(*few), atol=2e-6)


def test_entries_that_only_the_teacher_excludes():
    """Reverse KL is infinite; all else is finite and right, and so is its gradient."""
    student, teacher = normal_logits(23, 4, 16), normal_logits(24, 4, 16)
    teacher[:, 12:] = -np.inf
    targets = random_targets(25, 12, 4)
    comparison, expected = compared(student, teacher, targets), oracle(student, teacher, targets)
    np.testing.assert_array_equal(comparison.reverse_kl, np.inf)
    assert_close(comparison, expected._replace(reverse_kl=np.full(4, np.inf)), 2e-6)
    for name in ("forward_kl", "student_logp", "student_entropy"):
        slope = gradient_of(name, student, teacher, targets)
        finite = gradient_oracle(student, np.maximum(teacher, -1e3), targets, **{name: np.ones(4)})
        np.testing.assert_allclose(slope, finite, atol=1e-6)


def test_entries_that_only_the_student_excludes():
    """Forward KL is infinite; reverse KL and its gradient are those without these entries."""
    student, teacher = normal_logits(26, 4, 16), normal_logits(27, 4, 16)
    student[:, 12:] = -np.inf
    targets = random_targets(28, 12, 4)
    comparison, expected = compared(student, teacher, targets), oracle(student, teacher, targets)
    np.testing.assert_array_equal(comparison.forward_kl, np.inf)
    assert_close(comparison, expected._replace(forward_kl=np.full(4, np.inf)), 2e-6)
    slope = gradient_of("reverse_kl", student, teacher, targets)
    finite = gradient_oracle(np.maximum(student, -1e3), teacher, targets, reverse_kl=np.ones(4))
    np.testing.assert_allclose(slope, finite, atol=2e-6)


@pytest.mark.parametrize("gap", [50.0, 95.0, 300.0])
@pytest.mark.parametrize("peaked", ["teacher", "student"])
def test_uniform_against_peaked(gap, peaked):
    """One flat side of 150,000 entries, all mass of the other on one, also where the rest
    underflows: KLs are right to 1e-5, gradients to 1e-4 and the gap's rounding."""
    flat, peak = np.zeros((2, 1, 150_000), np.float32)
    peak[0, 7] = gap
    student, teacher = (flat, peak) if peaked == "teacher" else (peak, flat)
    targets = np.array([7], np.int32)
    comparison, expected = compared(student, teacher, targets), oracle(student, teacher, targets)
    for name in KLS:
        np.testing.assert_allclose(getattr(comparison, name), getattr(expected, name), rtol=1e-5)
        slope = gradient_oracle(student, teacher, targets, **{name: np.ones(1)})
        error = np.linalg.norm(gradient_of(name, student, teacher) - slope)
        assert error < 1e-4 * np.linalg.norm(slope) + 1.2e-7 * gap


def test_a_constant_added_to_a_row_changes_nothing():
    """Each side's logits count only up to a constant of the row's own, in value and gradient."""
    student, teacher = normal_logits(29, 4, 64), normal_logits(30, 4, 64)
    targets = random_targets(31, 64, 4)
    constants = np.float32([[5, -9], [-40, 3], [0, 80], [16, 16]])
    shifted = student + constants[:, :1], teacher + constants[:, 1:]
    assert_close(compared(*shifted, targets), compared(student, teacher, targets), 1e-5)
    before = gradient_of_all(student, teacher, targets)
    np.testing.assert_allclose(gradient_of_all(*shifted, targets), before, atol=1e-5)


def test_the_order_of_the_vocabulary_does_not_matter():
    """Permuted columns and targets give the same fields, and the permuted gradient."""
    student, teacher = normal_logits(32, 4, 64), normal_logits(33, 4, 64)
    targets = random_targets(34, 64, 4)
    order = np.random.default_rng(35).permutation(64)
    permuted = student[:, order], teacher[:, order], np.argsort(order)[targets].astype(np.int32)
    assert_close(compared(*permuted), compared(student, teacher, targets), 1e-6)
    before = gradient_of_all(student, teacher, targets)
    np.testing.assert_allclose(gradient_of_all(*permuted), before[:, order], atol=2e-6)


def test_rows_are_independent():
    """One call on [2, 3, V] is two vmaps over rows, in value and gradient."""
    student, teacher = normal_logits(36, 2, 3, 16), normal_logits(37, 2, 3, 16)
    arguments = student, teacher, random_targets(38, 16, 2, 3)

    def both(*arguments):
        fields, back = jax.vjp(lambda s: compare(s, *arguments[1:]), arguments[0])
        return fields, back(jax.tree.map(jnp.ones_like, fields))[0]

    (rows, row_slopes), (whole, slopes) = (
        jax.jit(f)(*arguments) for f in (jax.vmap(jax.vmap(both)), both)
    )
    assert_close(rows, whole, 1e-6)
    np.testing.assert_allclose(row_slopes, slopes, atol=1e-6)


def test_top1_agreement_compares_the_places_of_maxima():
    """With distinct maxima it is whether the argmax is the same: where all else differs, and where
    the maxima are equal in value but elsewhere."""
    student, teacher = normal_logits(39, 400, 4), normal_logits(40, 400, 4)
    agrees = student.argmax(-1) == teacher.argmax(-1)
    assert 50 < agrees.sum() < 350
    comparison = compared(student, teacher, first_tokens(student))
    np.testing.assert_array_equal(comparison.top1_agreement, agrees)


def test_top1_agreement_of_ties():
    """They agree where some entry is a maximum of both."""
    student = np.float32([[1, 1, 0], [1, 1, 0], [1, 1, 1], [2, 1, 2]])
    teacher = np.float32([[0, 5, 5], [0, 0, 5], [0, 0, 5], [5, 7, 5]])
    comparison = compared(student, teacher, first_tokens(student))
    np.testing.assert_array_equal(comparison.top1_agreement, [1, 0, 1, 0])
    comparison = compared(student, teacher, np.int32([1, 0, 2, 2]))
    np.testing.assert_array_equal(comparison.teacher_top1, [1, 0, 1, 0])


def test_a_student_alone():
    """Without a teacher: the student's fields and gradients as with one, the others None; entries
    at -inf are excluded here too."""
    student, targets = normal_logits(41, 2, 3, 64), random_targets(42, 60, 2, 3)
    student[..., 60:] = -np.inf
    alone = compared(student, None, targets)
    expected = oracle(student, student, targets)
    np.testing.assert_allclose(alone.student_logp, expected.student_logp, rtol=2e-6)
    np.testing.assert_allclose(alone.student_entropy, expected.student_entropy, atol=2e-6)
    assert alone[2:] == (None,) * 6
    for name in ("student_logp", "student_entropy"):
        coefficients = {name: np.random.default_rng(43).normal(size=(2, 3)).astype(np.float32)}
        slope = gradient(student, None, targets, coefficients)
        few = student[..., :60], student[..., :60], targets
        assert_relative(slope[..., :60], gradient_oracle(*few, **coefficients), 1e-5)
        np.testing.assert_array_equal(slope[..., 60:], 0)


def test_gradient_of_log_likelihood_by_hand():
    """At logits log(1/2, 1/4, 1/4) and token 1: onehot - q = (-1/2, 3/4, -1/4)."""
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    slope = gradient_of("student_logp", logits, None, jnp.int32(1))
    np.testing.assert_allclose(slope, [-0.5, 0.75, -0.25], rtol=1e-6)


def value_and_gradient(student, teacher, targets, cotangents, axis=None):
    """(fields, the gradient by the student's logits under a cotangent for each field)."""
    fields, back = jax.vjp(lambda s: compare(s, teacher, targets, axis=axis), student)
    return fields, back(cotangents)[0]


def on_pieces(pieces: int, with_teacher: bool):
    """`value_and_gradient` with the vocabulary dealt over devices; each device's fields, stacked.

    It stands on automatic axes like the project's meshes."""
    mesh = jax.make_mesh(
        (pieces,), ("v",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:pieces]
    )
    columns, whole = PartitionSpec(None, "v"), PartitionSpec()

    def local(*arguments):
        fields, slope = value_and_gradient(*arguments, axis="v")
        return jax.tree.map(lambda x: x[None], fields), slope

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(columns, columns if with_teacher else None, whole, whole),
        out_specs=(PartitionSpec("v"), columns),
        check_vma=False,
    )


def sharded_case(with_teacher: bool):
    """Float64 arguments over 64 columns: a target in each of 8 pieces, the last piece padding."""
    student, teacher = (np.float64(normal_logits(s, 7, 64, scale=5.0)) for s in (44, 45))
    student[:, 56:] = teacher[:, 56:] = -np.inf
    student[2, 50], teacher[2, 50] = student[2].max() + 1, teacher[2].max() + 1
    targets = np.arange(7, dtype=np.int32) * 8 + np.array([0, 7, 3, 1, 7, 0, 5], np.int32)
    teacher = teacher if with_teacher else None
    fields = jax.eval_shape(compare, student, teacher, targets)
    random = np.random.default_rng(46)
    cotangents = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), fields)
    return student, teacher, targets, cotangents


@pytest.mark.parametrize("with_teacher", [True, False], ids=["", "alone"])
@pytest.mark.parametrize("pieces", [2, 8])
def test_a_sharded_vocabulary_gives_the_same(pieces, with_teacher):
    """Inside shard_map each device has every field of the whole vocabulary, and its columns of the
    gradient, to 1e-12 in float64; also where a piece holds nothing but padding."""
    with jax.enable_x64(True):
        arguments = sharded_case(with_teacher)
        fields, slope = jax.jit(on_pieces(pieces, with_teacher))(*arguments)
        expected, expected_slope = jax.jit(value_and_gradient)(*arguments)
    for name, got, wanted in zip(Comparison._fields, fields, expected, strict=True):
        if wanted is not None:
            wanted = np.broadcast_to(wanted, (pieces, 7))
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_teacher", [True, False], ids=["", "alone"])
def test_one_maximum_and_one_sum_go_over_the_axis(with_teacher):
    """All fields and the gradient take one pmax and one psum, and no other communication."""
    with jax.enable_x64(True):
        program = jax.make_jaxpr(on_pieces(8, with_teacher))(*sharded_case(with_teacher))
    collectives = re.findall(r"= (\w+)\[axes=\('v',\)|(\w*(?:all_|permute)\w*)\[", str(program))
    assert sorted(collectives) == [("pmax", ""), ("psum", "")]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_takes_no_exponentials_that_it_does_not_need(name):
    """Beyond those of the fields, q alone; for forward KL q/p - 1 and p as well."""

    def exponentials(function) -> int:
        program = jax.make_jaxpr(function)(normal_logits(47, 2, 8), normal_logits(48, 2, 8))
        return len(re.findall(r"= exp(?:m1|2)?(?:\[.*?\])? ", str(program)))

    of_fields = exponentials(lambda s, t: compare(s, t, first_tokens(s)))
    assert of_fields == 3
    made = exponentials(functools.partial(gradient_of, name)) - of_fields
    assert made == (3 if name == "forward_kl" else 1)
