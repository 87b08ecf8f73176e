"""The loss head: the plain dense loss in value, gradient and scores; its cost read in programs."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from release import by_default

from kdjax import forward_kl, mix, reverse_kl
from kdjax.base import Scores, TopK
from kdjax.errors import ConfigError
from kdjax.losses.combinators import add, at_temperature, scale
from kdjax.losses.objectives import divergence, negative_log_likelihood
from kdjax.numerics import LMHead
from kdjax.sharding import DATA, TENSOR, make_mesh, vocabulary_axis
from kdjax.step.closed_forms import compare
from kdjax.step.head import TeacherLogits, TeacherStates, head_loss
from kdjax.step.score import token_function

MIXED = mix(forward_kl, reverse_kl, weight=0.3)
CLOSED = token_function(MIXED, divergence)
ADVANTAGE = 1.3
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile; the same HLO

Case = collections.namedtuple("Case", "hidden head teacher extra weights mask")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def case(seed, shape=(37,), rows=(29, 29), widths=(6, 9), columns=None, std=3.0, heads=({}, {})):
    """Random float64 arguments of `head_loss`: a fifth of the tokens masked, a fifth weigh 0."""
    rng = np.random.default_rng(seed)
    hidden, theirs = (rng.normal(size=(*shape, width)) for width in widths)
    sizes = zip(rows, widths, strict=True)
    weights = [std * width**-0.5 * rng.normal(size=(count, width)) for count, width in sizes]
    ours, other = (LMHead(w, **shaped) for w, shaped in zip(weights, heads, strict=True))
    ours.weight_vd[columns or min(rows) :] *= 10
    targets = rng.integers(0, columns or min(rows), (*shape, 1))
    logp = np.take_along_axis(log_softmax(hidden @ ours.weight_vd[:columns].T), targets, -1)
    extra = {
        "targets": np.int32(targets[..., 0]),
        "sampler_logp": logp[..., 0] + 0.3 * rng.normal(size=shape),
        "forward": rng.uniform(size=shape) < 0.5,
    }
    weigh, mask = rng.uniform(size=(2, *shape)) < 0.8
    weigh = weigh * rng.uniform(0.1, 2.0, shape)
    return Case(hidden, ours, TeacherStates(theirs, other), extra, weigh, mask)


def cast(tree, dtype=jnp.float32):
    """The tree with its floating arrays in another type."""
    floating = functools.partial(jnp.issubdtype, arg2=jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x.dtype) else x, tree)


def by_token(change, given: Case) -> Case:
    """The Case with every array that has a row for each token changed."""
    theirs = given.teacher._replace(hidden=change(given.teacher.hidden))
    changed = jax.tree.map(change, given._replace(head=None, teacher=None))
    return changed._replace(head=given.head, teacher=theirs)


def taught(given: Case, kind: str, columns=None, k=5) -> Case:
    """The Case with its teacher in another form: "states", "logits", "top-k" or "none"."""
    if kind == "states":
        return given
    logits = (given.teacher.hidden @ given.teacher.head.weight_vd.T)[..., :columns]
    ids = np.int32(np.argsort(-logits, -1)[..., :k])
    logp = log_softmax(logits)
    rest = logp.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(-1)).astype(logits.dtype)
    known = TopK(ids, np.take_along_axis(logp, ids, -1), tail)
    forms = {"logits": TeacherLogits(logits), "top-k": known, "none": None}
    return given._replace(teacher=forms[kind])


@functools.cache
def fused(function, chunk=16, vocabulary=None, mesh=None, quick=True):
    """Jitted (*case, factor) -> ((factor * total, statistics), gradients by hidden and head)."""

    def loss(hidden, head, teacher, extra, weights, mask, factor):
        arguments = (function, hidden, head, teacher, extra, weights, mask)
        total, statistics = head_loss(*arguments, chunk=chunk, vocabulary=vocabulary, mesh=mesh)
        return factor * total, statistics

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(both, compiler_options=QUICK if quick else None)


def run(function, given: Case, factor=1.0, **options):
    return jax.tree.map(np.asarray, fused(function, **options)(*given, factor))


def forward(q, p):
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def mixed(q, p):
    return 0.3 * forward(q, p) + 0.7 * forward(p, q)


def warm(q, p):
    return mixed(jax.nn.log_softmax(q / 2), jax.nn.log_softmax(p / 2))


def jensen_shannon(q, p):
    """0.3 and 0.7 of two skewed KLs."""
    middle = jnp.logaddexp(math.log(0.3) + p, math.log(0.7) + q)
    return 0.3 * forward(middle, p) + 0.7 * forward(middle, q)


def total_variation(q, p):
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(q) - jnp.exp(p)), axis=-1)


def clipped_ratio(scores):
    ratio = jnp.exp(scores.student_logp - scores.sampler_logp)
    return -jnp.minimum(ratio * ADVANTAGE, jnp.clip(ratio, 0.8, 1.2) * ADVANTAGE)


def plain_scores(token_loss, q, teacher, extra, mask) -> Scores:
    """Every field from its definition; q and the teacher are log-probabilities [..., V]."""

    def at_target(logp):
        return jnp.take_along_axis(logp, extra["targets"][..., None], -1)[..., 0]

    scores = Scores(at_target(q), -jnp.sum(jnp.exp(q) * q, -1), extra["sampler_logp"], mask)
    if teacher is None:
        return scores
    if isinstance(teacher, TopK):
        agrees = q.argmax(-1) == teacher.ids[..., 0]
        named = jnp.stack([jnp.take_along_axis(q, teacher.ids, -1), teacher.logp])
        tails = jnp.log1p(-jnp.exp(named).sum(-1, keepdims=True))
        q, p = jnp.concatenate([named, tails], -1)
    else:
        p, agrees = teacher, q.argmax(-1) == teacher.argmax(-1)
        entropy = -jnp.sum(jnp.exp(p) * p, -1)
        scores = scores._replace(teacher_logp=at_target(p), teacher_entropy=entropy)
    kls = dict(forward_kl=forward(q, p), reverse_kl=forward(p, q), divergence=token_loss(q, p))
    best = teacher.ids[..., 0] if isinstance(teacher, TopK) else teacher.argmax(-1)
    drawn = (best == extra["targets"]).astype(q.dtype)
    return scores._replace(top1_agreement=agrees.astype(q.dtype), teacher_top1=drawn, **kls)


def dense(token_loss, objective, columns=None):
    """The jitted counterpart of `fused`, with [..., V] logits and automatic differentiation."""

    def plain_logp(hidden, head):
        logits = (head.scale * hidden @ head.weight_vd.T)[..., :columns]
        capped = logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
        return jax.nn.log_softmax(capped)

    def loss(hidden, head, teacher, extra, weights, mask):
        theirs = plain_logp(*teacher[:2]) if isinstance(teacher, TeacherStates) else teacher
        scores = plain_scores(token_loss, plain_logp(hidden, head), theirs, extra, mask)
        total = jnp.sum(jnp.where(mask, weights * objective(scores), 0.0))
        return total, jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), scores)

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(both, compiler_options=QUICK)


def assert_close(found, wanted, bound: float):
    """Every array's largest difference is at most the bound times its largest entry."""
    chex.assert_trees_all_equal_structs(found, wanted)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        ours, theirs = map(np.float64, pair)
        assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


SHAPED = (dict(scale=0.5, softcap=5.0), dict(scale=2.0))
LAYOUTS = {  # (the case, chunk, columns that exist)
    "ragged": (dict(columns=23), 16, 23),
    "rows": (dict(shape=(3, 7), rows=(29, 26), widths=(6, 4), heads=SHAPED), 1, 26),
    "peaked": (dict(shape=(2, 3, 5), std=30.0, heads=({}, dict(softcap=50.0))), 64, 29),
}
POLICY = add(divergence, clipped_ratio, scale(lambda scores: scores.student_entropy, -0.1))
ORACLES = {
    "forward": ("rows", forward_kl, forward, divergence, "states"),
    "reverse": ("peaked", reverse_kl, lambda q, p: forward(p, q), divergence, "states"),
    "warm": ("peaked", at_temperature(MIXED, 2.0), warm, divergence, "states"),
    "policy": ("ragged", MIXED, mixed, POLICY, "states"),
    "SFT": ("rows", None, None, negative_log_likelihood, "none"),
    "jensen": ("ragged", jensen_shannon, jensen_shannon, divergence, "states"),
    "variation": ("peaked", total_variation, total_variation, divergence, "states"),
    "mixed top-k": ("ragged", MIXED, mixed, divergence, "top-k"),
    "jensen top-k": ("rows", jensen_shannon, jensen_shannon, divergence, "top-k"),
}


@pytest.mark.parametrize("name", ORACLES)
def test_the_plain_dense_loss_in_float64(name):
    """Total, gradients and every score as by autodiff of definitions over the columns there are."""
    layout, token_loss, plain, objective, kind = ORACLES[name]
    shape, chunk, columns = LAYOUTS[layout]
    given = taught(case(1, **shape), kind, columns)
    vocabulary = None if name == "forward" else columns  # by default what both heads have
    options = dict(chunk=chunk, vocabulary=vocabulary, quick=False)
    with jax.enable_x64(True):
        found = run(token_function(token_loss, objective), given, **options)
        (total, scores), gradients = found
        known = (
            (total, scores._replace(parts=None)),
            gradients,
        )  # tests/losses/test_composition.py has those
        assert_close(known, dense(plain, objective, columns)(*given), 1e-11)
    assert not found[1][1].weight_vd[columns:].any()


@pytest.fixture(scope="module")
def given() -> Case:
    return cast(case(2))


@pytest.fixture(scope="module")
def plain_run(given):
    """((total, Scores), gradients) of the closed form in chunks of 16."""
    return run(CLOSED, given)


def test_gradients_scale_with_the_cotangent(given, plain_run):
    """The gradient of 2.5 * total is 2.5 times the gradient of total."""
    gradients = run(CLOSED, given, 2.5)[1]
    assert_close(gradients, jax.tree.map(lambda g: 2.5 * g, plain_run[1]), 1e-6)


def test_closed_form_and_chunk_size_do_not_matter(given, plain_run):
    """The same loss behind a lambda, so differentiated automatically, in chunks of 5: the same."""
    general = token_function(lambda q, p: MIXED(q, p), divergence)
    assert_close(run(general, given, chunk=5), plain_run, 3e-6)


def test_blocks_of_rows_do_not_matter(given, plain_run, monkeypatch):
    """Chunks whose logits outgrow a CPU's cache are swept over in blocks, here of 4: the same."""
    monkeypatch.setattr("kdjax.step.head.CACHED_LOGITS", 4 * 29)
    assert_close(run(lambda *rows: CLOSED(*rows), given), plain_run, 1e-6)


def test_other_forms_of_a_teacher(given, plain_run):
    """The teacher by its logits, or by all its tokens as a top-k, is the teacher by its states."""
    (total, scores), gradients = plain_run
    assert_close(run(CLOSED, taught(given, "logits")), plain_run, 3e-6)
    wanted = (total, scores._replace(teacher_logp=None, teacher_entropy=None)), gradients
    assert_close(run(CLOSED, taught(given, "top-k", k=29)), wanted, 1e-5)


def test_masked_equals_deleted(given, plain_run):
    """Without the masked tokens: the same total, gradients and scores; masked entries are 0."""
    kept, ((total, scores), (by_hidden, by_head)) = given.mask, plain_run
    found = run(CLOSED, by_token(lambda x: x[kept], given))
    scores_left, by_hidden_left = jax.tree.map(lambda x: x[kept], (scores, by_hidden))
    assert_close(found, ((total, scores_left), (by_hidden_left, by_head)), 1e-6)
    assert not any(x[~kept].any() for x in jax.tree.leaves((scores, by_hidden)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_masked_reaches_nothing(given, plain_run, bad):
    """NaN or infinity in all that masked tokens have: every result as without, bit by bit."""

    def spoil(x):
        kept = given.mask.reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(kept, x, np.float32(bad)) if x.dtype.kind == "f" else x

    jax.tree.map(np.testing.assert_array_equal, run(CLOSED, by_token(spoil, given)), plain_run)


def test_a_token_of_weight_zero_spoils_nothing(given, plain_run):
    """Its loss is NaN, in the mask: total and gradients are as they were, its own gradient 0."""
    at = np.flatnonzero(given.mask & (given.weights == 0))[0]
    states = given.teacher.hidden.copy()
    states[at] = np.nan
    spoilt = given._replace(teacher=given.teacher._replace(hidden=states))
    (total, scores), gradients = run(CLOSED, spoilt)
    assert np.isnan(scores.divergence[at])
    assert not gradients[0][at].any()
    both = (total, gradients), (plain_run[0][0], plain_run[1])
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_masked_tokens_cost_nothing(given):
    """The loop runs ceil(tokens in the mask / chunk) rounds; other masks trace nothing anew; of no
    token, whatever it holds, all results are exactly 0."""
    rounds, traces, traced = [], [], None

    def counted(logits, teacher, extra):
        traces.append(1)
        jax.debug.callback(lambda: rounds.append(1))
        return CLOSED(logits, teacher, extra)

    for count, wanted in {37: 3, 33: 3, 32: 2, 16: 1, 1: 1, 0: 0}.items():
        mask = np.random.default_rng(count).permutation(np.arange(37) < count)
        rounds.clear()
        hidden = given.hidden if count else np.nan * given.hidden
        results = run(counted, given._replace(hidden=hidden, mask=mask))
        jax.effects_barrier()
        traced = traced or len(traces)
        assert (len(rounds), len(traces)) == (wanted, traced)
    assert not any(np.any(x) for x in jax.tree.leaves(results))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_tokens(given, shape):
    """An empty batch, or one of no response tokens: a total and gradients of 0."""
    tokens = given.mask.ndim

    def none(x):
        return np.zeros((*shape, *x.shape[tokens:]), x.dtype)

    teacher = given.teacher._replace(hidden=none(given.teacher.hidden))
    empty = Case(
        none(given.hidden), given.head, teacher, jax.tree.map(none, given.extra),
        none(given.weights), none(given.mask),
    )  # fmt: skip
    (total, scores), (by_hidden, by_head) = run(CLOSED, empty)
    assert total == 0
    assert by_hidden.shape == empty.hidden.shape
    assert not by_head.weight_vd.any()
    assert {leaf.shape for leaf in jax.tree.leaves(scores)} == {shape}


def switched(logits, teacher, extra):
    """A function of the test's own: forward KL at some tokens, reverse KL at the others."""
    comparison = compare(logits, teacher, extra["targets"])
    chosen = jnp.where(extra["forward"], comparison.forward_kl, comparison.reverse_kl)
    return chosen, jax.lax.stop_gradient(comparison)


@pytest.mark.parametrize(
    ("dtype", "shaped"), [(jnp.bfloat16, {}), (jnp.float32, dict(scale=0.3, softcap=5.0))]
)
def test_identical_models(dtype, shaped):
    """A student that is its teacher: both KLs and their gradients are exactly 0, top-1 agrees."""
    same = cast(case(3, heads=(shaped, {})), dtype)
    same = same._replace(teacher=TeacherStates(same.hidden, same.head))
    (total, comparison), gradients = run(switched, same, quick=False)
    zeros = (total, comparison.forward_kl, comparison.reverse_kl, gradients)
    assert not any(np.any(x) for x in jax.tree.leaves(zeros))
    np.testing.assert_array_equal(comparison.top1_agreement, same.mask)


@pytest.mark.parametrize(
    ("noise", "level"), by_default([(0.078, 0.26), (0.008, 0.003)], (0.008, 0.003))
)
def test_precision_at_a_large_vocabulary(noise, level):
    """V = 151,936 in bfloat16, logits of deviation 30: KLs to 1e-4, dW to 3e-3 of float64."""
    near = case(6, (16,), rows=(151_936, 151_936), widths=(64, 64), std=30.0)
    theirs = near.hidden + noise * np.random.default_rng(5).normal(size=near.hidden.shape)
    near = near._replace(teacher=TeacherStates(theirs, near.head), mask=np.ones(16, bool))
    near = cast(near, jnp.bfloat16)
    master = near._replace(head=cast(near.head))
    (_, found), (_, by_head) = run(switched, master, chunk=4, quick=False)
    exact = cast(near, np.float64)
    student, teacher = exact.hidden @ exact.head.weight_vd.T, taught(exact, "logits").teacher.logits
    q, p = log_softmax(student), log_softmax(teacher)
    kl, other = (np.exp(p) * (p - q)).sum(-1), (np.exp(q) * (q - p)).sum(-1)
    assert 25 < student.std() < 35
    assert level / 1.5 < kl.mean() < level * 1.5
    by_forward, by_reverse = np.exp(q) - np.exp(p), np.exp(q) * (q - p - other[:, None])
    by_logits = np.where(exact.extra["forward"][:, None], by_forward, by_reverse)
    by_weight = (exact.weights[:, None] * by_logits).T @ exact.hidden
    ours = (found.forward_kl, found.reverse_kl, by_head.weight_vd)
    for x, wanted, bound in zip(ours, (kl, other, by_weight), (1e-4, 1e-4, 3e-3), strict=True):
        assert np.linalg.norm(np.float64(x) - wanted) <= bound * np.linalg.norm(wanted)


def equal_tokens(weights, mesh=None) -> np.ndarray:
    """dW of 512 equal tokens with the given weights, in bfloat16, in chunks of one token."""
    many = by_token(lambda x: np.repeat(x, 512, 0), cast(case(5, (1,)), jnp.bfloat16))
    many = many._replace(mask=np.ones(512, bool), weights=np.float32(weights))
    return np.float64(run(CLOSED, many, chunk=1, mesh=mesh)[1][1].weight_vd)


def test_sums_of_the_gradient_are_float32():
    """Over chunks: of 512 tokens, where bfloat16 stalls at 256. Over devices: of two shards that
    nearly cancel, as on one device, though dW is bfloat16 in the end."""
    one = equal_tokens(np.arange(512) == 300)
    assert_close(equal_tokens(np.ones(512)), 512 * one, 2**-8)
    weights = np.repeat([1.003, -1.0], 256)
    assert_close(equal_tokens(weights, make_mesh(2)), equal_tokens(weights), 2**-7)


def test_the_sum_over_vocabulary_pieces_is_float32():
    """dH in bfloat16 is rounded once, after its pieces are added: as on one device."""
    given = cast(case(11, (64,), rows=(32, 32)), jnp.bfloat16)
    ways = {TENSOR: make_mesh(2, tensor=2), None: None}.items()
    dealt, alone = (
        run(token_function(MIXED, divergence, axis), given, mesh=mesh)[1][0] for axis, mesh in ways
    )
    assert np.mean(dealt == alone) > 0.95


@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_types(tensor):
    """A gradient has the type of what it is for; total and statistics are float32."""
    mesh = make_mesh(8, tensor=tensor) if tensor else None
    function = token_function(MIXED, divergence, vocabulary_axis(mesh))
    for types in itertools.product([jnp.float32, jnp.bfloat16], repeat=2):
        given = cast(case(6, (8,), rows=(16, 16)))
        given = given._replace(hidden=cast(given.hidden, types[0]), head=cast(given.head, types[1]))
        results, gradients = jax.eval_shape(fused(function, mesh=mesh), *given, 1.0)
        assert {x.dtype.name for x in jax.tree.leaves(results)} == {"float32", "bool"}
        assert tuple(g.dtype for g in jax.tree.leaves(gradients)) == types


@pytest.mark.parametrize(
    ("rows", "tensor", "options", "message"),
    [
        ((29, 29), 1, dict(chunk=0), "chunk must be at least 1 token, got 0"),
        ((29, 29), 1, dict(vocabulary=0), r"vocabulary must be in 1\.\.29 .* got 0"),
        ((29, 26), 1, dict(vocabulary=27), r"vocabulary must be in 1\.\.26 .* got 27"),
        ((26, 26), 4, {}, r"heads of .*26.* rows can't be sharded over 4 vocabulary pieces"),
        ((32, 28), 4, {}, r"heads of .*32.* rows can't be sharded over 4 vocabulary pieces"),
    ],
)
def test_what_cannot_be(rows, tensor, options, message):
    """A chunk, a vocabulary or a mesh that does not fit the heads is a ConfigError with numbers."""
    states = case(8, (8,), rows=rows)
    for given in (states, taught(states, "logits")):
        with pytest.raises(ConfigError, match=message):
            fused(CLOSED, mesh=make_mesh(8, tensor=tensor), **options)(*given, 1.0)


def test_statistics_carry_no_gradient(given):
    """Differentiating them is a ConfigError that says what to do; behind stop_gradient it works."""
    given = jax.tree.map(jnp.asarray, given)

    def loss(hidden, guard):
        total, scores = head_loss(CLOSED, hidden, *given[1:])
        return total + jnp.sum(guard(scores.student_entropy))

    with pytest.raises(ConfigError, match=r"carry no gradient.*objective.*stop_gradient"):
        jax.eval_shape(jax.grad(lambda hidden: loss(hidden, lambda x: x)), given.hidden)
    jax.eval_shape(jax.grad(lambda hidden: loss(hidden, jax.lax.stop_gradient)), given.hidden)


def test_numpy_arrays_may_be_closed_over(given):
    """The constants of a loss that is differentiated need not be JAX's arrays."""
    jax.eval_shape(jax.grad(lambda hidden: head_loss(CLOSED, hidden, *given[1:])[0]), given.hidden)


def test_products_with_the_heads(given):
    """Undifferentiated only both models' logits are formed; one product more for each gradient, of
    2 V D FLOPs a token, and a gradient asked for alone has the same bits."""
    loss = functools.partial(head_loss, CLOSED, chunk=37)
    by = functools.partial(jax.value_and_grad, loss, has_aux=True)
    given, flops, found = by_token(jnp.asarray, given), {}, {}
    for argnums, products in (((), 2), ((0,), 3), ((1,), 3), ((0, 1), 4)):
        lowered = jax.jit(by(argnums=argnums) if argnums else loss).lower(*given)
        assert lowered.as_text().count("stablehlo.dot_general") == products
        program = lowered.compile()
        flops[argnums], found[argnums] = program.cost_analysis()["flops"], program(*given)
    for argnum in (0, 1):
        saved = flops[0, 1] - flops[argnum,]
        assert saved == pytest.approx(2 * 37 * given.head.weight_vd.size, rel=0.1)
        chex.assert_trees_all_equal(found[argnum,][1][0], found[0, 1][1][argnum])


CHUNK, ROWS, VOCABULARY = 4, 104, 85
MESHES = {
    "alone": lambda: None,
    "data": lambda: make_mesh(8),
    "both": lambda: make_mesh(8, tensor=2),
    "tensor": lambda: make_mesh(8, tensor=8),
    "explicit": lambda: jax.make_mesh((4, 2), (DATA, TENSOR), (AxisType.Explicit,) * 2),
}


def deal(given: Case, mesh) -> Case:
    """The arguments on the devices: tokens over the data axis, head rows over the tensor axis."""

    axis = vocabulary_axis(mesh)
    tokens, rows = (NamedSharding(mesh, PartitionSpec(name)) for name in (DATA, axis))
    teacher = {
        TeacherStates: TeacherStates(tokens, rows),
        TeacherLogits: NamedSharding(mesh, PartitionSpec(DATA, None, axis)),
        TopK: tokens,
    }[type(given.teacher)]
    return jax.device_put(given, Case(tokens, rows, teacher, tokens, tokens, tokens))


@functools.cache
def on_mesh(name: str, token_loss=MIXED, kind: str = "states"):
    """(results, the compiled program's text) of 16 x 4 tokens, the first 4 rows of them masked."""
    mesh = MESHES[name]()
    given = case(9, (16, 4), rows=(ROWS, ROWS), widths=(6, 10), columns=VOCABULARY)
    given.mask[:4] = False
    given = cast(taught(given, kind, VOCABULARY if kind == "top-k" else None))
    given = deal(given, mesh) if mesh else given
    function = token_function(token_loss, divergence, vocabulary_axis(mesh))
    program = fused(function, CHUNK, VOCABULARY, mesh).lower(*given, 1.0).compile()
    return jax.tree.map(np.asarray, program(*given, 1.0)), program.as_text()


@pytest.mark.parametrize(
    ("mesh", "token_loss", "kind"),
    [
        *((mesh, MIXED, "states") for mesh in ("data", "both", "explicit")),
        *(("both", MIXED, "logits"), ("tensor", total_variation, "top-k")),
        pytest.param("tensor", MIXED, "states", marks=pytest.mark.release),
        pytest.param("both", total_variation, "states", marks=pytest.mark.release),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.split("(")[0],
)
def test_dealt_over_a_mesh(mesh, token_loss, kind):
    """Unequal shards, some without a token, and padded rows: all results as on one device."""
    found = on_mesh(mesh, token_loss, kind)[0]
    alone = on_mesh("alone", token_loss, kind.replace("logits", "states"))[0]
    assert_close(found, alone, 1e-5)
    assert not found[1][1].weight_vd[VOCABULARY:].any()


def in_loops(program: str) -> list[str]:
    """A compiled program's text in two: what its while loops run, and all else."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.S | re.M)
    computations, inside = dict(found), set()
    waiting = re.findall(r"\bbody=%?([\w.-]+)", program)
    while waiting:
        inside.add(name := waiting.pop())
        called = re.findall(r"\b(?:body|calls|to_apply)=%?([\w.-]+)", computations[name])
        waiting += set(called) - inside
    both = (inside, computations.keys() - inside)
    return ["\n".join(computations[name] for name in names) for names in both]


def operations(text: str, kind: str) -> list[str]:
    """What is made by operations of a kind: "name shape shape ...", sorted."""
    found = re.findall(rf"= (\([^)]*\)|\S+) ({kind})(?:-start)?\(", text)
    return sorted(" ".join([name, *re.findall(r"\w+\[[\d,]*\]", shape)]) for shape, name in found)


def collectives(text: str) -> list[str]:
    return operations(text, r"(?:all-|reduce-scatter|collective-|ragged-)[\w-]*?")


def sizes(text: str) -> list[int]:
    """Elements of every array that the text names."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", text)
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize("mesh", ["data", "both"])
def test_a_frozen_head_on_a_mesh(mesh):
    """dH alone, of a head that is not differentiated, is what it is beside dW."""
    axes = MESHES[mesh]()
    given = deal(cast(case(9, (16, 4), rows=(ROWS, ROWS), widths=(6, 10))), axes)
    function = token_function(MIXED, divergence, vocabulary_axis(axes))
    loss = functools.partial(head_loss, function, chunk=CHUNK, mesh=axes)
    alone = jax.jit(jax.grad(lambda *case: loss(*case)[0]))(*given)
    both = fused(function, CHUNK, None, axes)(*given, 1.0)[1][0]
    assert_close(alone, both, 1e-6)


@pytest.mark.parametrize("mesh", ["data", "both", "explicit"])
def test_what_devices_do_and_say(mesh):
    """Four products in the loop, of a chunk of own tokens; 2 + 10 numbers a token over the tensor
    axis alone; then total, dH and dW are summed, once."""
    text = on_mesh(mesh)[1]
    inside, outside = in_loops(text)
    tokens, pieces = (8, 1) if mesh == "data" else (16, 2)
    columns = ROWS // pieces
    products = [(CHUNK, columns), (CHUNK, columns), (CHUNK, 6), (columns, 6)]
    assert operations(inside, "dot") == sorted(f"dot f32[{m},{n}]" for m, n in products)
    assert f"s32[{tokens}]" in text  # the packed order
    assert not re.search(r"\[(64|16,4)[,\]]", text)  # nothing has the tokens of all shards
    sums = [f"all-reduce f32[{count},{CHUNK}]" for count in (10, 2)]
    assert collectives(inside) == (sums if pieces > 1 else [])
    after = " ".join(collectives(outside))
    assert set(re.findall(r"[a-z]+-[\w-]+", after)) == {"all-reduce"}
    assert sum(sizes(after)) == 1 + columns * 6 + (tokens * 6 if pieces > 1 else 0)


def test_a_general_loss_on_a_mesh_exchanges_rows():
    """Total variation: rows of logits change hands by all-to-all, only losses are gathered."""
    inside, outside = map(collectives, in_loops(on_mesh("both", total_variation)[1]))
    assert {found.split()[0] for found in inside} == {"all-reduce", "all-to-all", "all-gather"}
    assert [found for found in inside if "gather" in found] == [f"all-gather f32[{CHUNK}]"]
    assert {found.split()[0] for found in outside} == {"all-reduce"}


def test_memory():
    """No array of all logits; a token more adds dH thrice at most; a fifth of the dense loss."""

    def compiled(jitted, tokens, *factor):
        given = cast(case(10, (tokens,), rows=(4096, 4096), widths=(16, 16), columns=8))
        program = jitted.lower(*given, *factor).compile()
        return max(sizes(program.as_text())), program.memory_analysis().temp_size_in_bytes

    (_, once), (largest, twice) = (compiled(fused(CLOSED), n, 1.0) for n in (1024, 2048))
    largest_dense, whole = compiled(dense(mixed, divergence), 2048)
    assert largest < 2048 * 4096 / 8
    assert largest_dense >= 2048 * 4096
    assert twice - once <= 1024 * (3 * 16 * 4 + 128)
    assert twice < whole / 5
