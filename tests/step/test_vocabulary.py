"""Losses between two vocabularies: by float64 sums over shared tokens, stop and rest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from revocabulary import byte_level
from tiny import bigram, bigram_params, random_rollout

from kdjax import at_temperature, divergence, forward_kl, jensen_shannon, mix, reverse_kl
from kdjax.base import Rollout, TeacherRows
from kdjax.data.alignment import share, teacher_rows
from kdjax.data.tokenizer import load_tokenizer
from kdjax.losses.reductions import token_mean
from kdjax.numerics import LMHead
from kdjax.step.score import HeadPlan, scored_loss
from kdjax.step.stops import Stops
from kdjax.step.vocabulary import SharedHead, arranged, lay_out
from kdjax.training.parts.programs import Headed, headed

V, THEIRS = 11, 9
TEACHER_OF = np.array([4, -1, 0, -1, 8, 2, -1, 1, 6, 7, -1])  # 3 and 5 are the teacher's alone
STOPS = ((9, 10), (7, 3))


def softmax64(logits) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()


def taught(teacher_of, size, stops, params):
    """(the guide, its parameters) of a bigram teacher whose head is arranged."""
    columns, shared = lay_out(teacher_of, size, stops)
    head = arranged(LMHead(params["head"]), jnp.asarray(columns))
    return headed(bigram()), Headed(params, head if shared is None else SharedHead(head, shared))


def with_rows(rollout, seed: int, size: int):
    """The rollout with rows of the teacher's at random slots, some of which have no counterpart."""
    rng, (rows, length) = np.random.default_rng(seed), rollout.sampler_logp_bt.shape
    slots = rng.integers(-1, 12, (rows, length)).astype(np.int32)
    tokens = rng.integers(0, size, (rows, 12)).astype(np.int32)
    return rollout._replace(teacher_rows=TeacherRows(tokens, slots))


def events(p: np.ndarray, groups) -> np.ndarray:
    return np.array([p[list(group)].sum() for group in groups])


def groups_of(teacher_of, size, stops):
    """By hand: each event as (the student's tokens, the teacher's)."""
    pairs = [((s,), (int(t),)) for s, t in enumerate(teacher_of) if t >= 0 and s not in stops[0]]
    mine, theirs = {s for g, _ in pairs for s in g}, {t for _, g in pairs for t in g}
    if stops[0]:
        pairs.append(stops)
    own = [s for s in range(len(teacher_of)) if s not in mine and s not in stops[0]]
    others = [t for t in range(size) if t not in theirs and t not in stops[1]]
    return pairs + ([(tuple(own), tuple(others))] if own and others else []), others


KL64 = {
    "forward": lambda q, p: np.sum(p * (np.log(p) - np.log(q))),
    "reverse": lambda q, p: np.sum(q * (np.log(q) - np.log(p))),
}
LOSSES = {
    "forward": (forward_kl, KL64["forward"]),
    "reverse": (reverse_kl, KL64["reverse"]),
    "mix": (
        mix(forward_kl, reverse_kl, weight=0.3),
        lambda q, p: 0.3 * KL64["forward"](q, p) + 0.7 * KL64["reverse"](q, p),
    ),
    "jensen_shannon": (
        jensen_shannon(0.5),
        lambda q, p: (KL64["reverse"](q, (p + q) / 2) + KL64["reverse"](p, (p + q) / 2)) / 2,
    ),
    "tempered": (
        at_temperature(forward_kl, 2.0),
        lambda q, p: KL64["forward"](*(x**0.5 / np.sum(x**0.5) for x in (q, p))),
    ),
}


def total64(loss, student, teacher, rollout, groups, out_of):
    """The loss summed over the aligned tokens, in float64."""
    total, rows = 0.0, rollout.teacher_rows
    for b, length in enumerate(rollout.response_length_b):
        for t in range(length):
            if rows.slot_bt[b, t] < 0:
                continue
            before = rollout.tokens_bs[b, rollout.prompt_length_b[b] + t - 1]
            theirs = rows.tokens_bs[b, rows.slot_bt[b, t]]
            q = softmax64(student["embed"][before] @ student["head"].T)
            p = softmax64(np.float64(teacher["embed"])[theirs] @ np.float64(teacher["head"]).T)
            q, p = events(q, [g for g, _ in groups]), events(p, [g for _, g in groups])
            total += loss(q / q.sum(), p / p.sum()) if out_of else loss(q, p)
    return total


CASES = {
    "stop and rest": (TEACHER_OF, THEIRS, STOPS),
    "rest alone": (TEACHER_OF, THEIRS, ((), ())),
    "the teacher has more": (np.array([2, 0, 3]), 5, ((), ())),
    "the student has more": (np.array([2, -1, 0, 1]), 3, ((), ())),
}


COMPOSED = [("mix", "stop and rest"), ("tempered", "stop and rest")]


@pytest.mark.parametrize(
    ("name", "case"),
    COMPOSED + [(n, c) for n in ("forward", "reverse", "jensen_shannon") for c in CASES],
)
def test_loss_and_gradient_are_those_of_float64(name, case):
    """Loss by sums over events, gradient by central differences of it, with a chunk of 3 tokens."""
    teacher_of, size, stops = CASES[case]
    count = len(teacher_of)
    student, teacher = bigram_params(0, count), bigram_params(1, size, width=5)
    rollout = with_rows(random_rollout(3, count, [2, 3], [5, 4]), 4, size)
    groups, others = groups_of(teacher_of, size, stops)
    loss, loss64 = LOSSES[name]
    guide, given = taught(teacher_of, size, stops, teacher)

    def total(params):
        made, scores = scored_loss(
            bigram(), params, guide, given, rollout,
            token_loss=loss, objective=divergence, reduction=lambda mask, _: 1.0 * mask,
            plan=HeadPlan(chunk=3, vocabulary=count),
        )  # fmt: skip
        return made.total, scores

    (value, scores), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    wide = {key: np.asarray(x, np.float64) for key, x in student.items()}
    by64 = functools.partial(
        total64, loss64, teacher=teacher, rollout=rollout, groups=groups, out_of="more" in case
    )
    np.testing.assert_allclose(value, by64(student=wide), rtol=2e-5)
    for key, x in wide.items():
        for place in np.ndindex(x.shape):
            moved = []
            for step in (1e-5, -1e-5):
                nudged = {**wide, key: x.copy()}
                nudged[key][place] += step
                moved.append(by64(student=nudged))
            slope = (moved[0] - moved[1]) / 2e-5
            assert abs(slope - gradient[key][place]) < 2e-5 * (1 + abs(slope)), (key, place)
    for b, t in np.argwhere(np.asarray(scores.mask)):
        theirs = rollout.teacher_rows.tokens_bs[b, rollout.teacher_rows.slot_bt[b, t]]
        p = softmax64(np.float64(teacher["embed"])[theirs] @ np.float64(teacher["head"]).T)
        np.testing.assert_allclose(scores.teacher_shared[b, t], 1 - p[others].sum(), rtol=1e-5)
        before = rollout.tokens_bs[b, rollout.prompt_length_b[b] + t - 1]
        target = rollout.tokens_bs[b, rollout.prompt_length_b[b] + t]
        q = softmax64(wide["embed"][before] @ wide["head"].T)
        np.testing.assert_allclose(scores.student_logp[b, t], np.log(q[target]), rtol=1e-4)
        whole = events(p, [g for _, g in groups]).sum()
        for event in (p[list(g)].sum() / whole for mine, g in groups if target in mine):
            np.testing.assert_allclose(scores.teacher_logp[b, t], np.log(event), rtol=1e-4)


def results(guide, given, rollout, loss=forward_kl, stops=()):
    def total(params):
        made, scores = scored_loss(
            bigram(), params, guide, given, rollout, token_loss=loss, reduction=token_mean_of,
            plan=HeadPlan(chunk=4, vocabulary=V, stops=Stops("merge", stops) if stops else Stops()),
        )  # fmt: skip
        return made.total, scores

    student = bigram_params(0, V)
    return jax.jit(jax.value_and_grad(total, has_aux=True))(student)


def token_mean_of(mask, rollout):
    return token_mean(mask, rollout)


def test_one_vocabulary_is_the_ordinary_loss_to_the_bit():
    """The same tokens in the same order, read from rows of its own that are the student's: loss,
    scores and gradient are those of an ordinary teacher."""
    rollout, teacher = random_rollout(3, V, [2, 3], [5, 4]), bigram_params(1, V)
    plain = results(bigram(), teacher, rollout)
    slots = rollout.prompt_length_b[:, None] + np.arange(5)[None] - 1
    rows = TeacherRows(rollout.tokens_bs, np.minimum(slots, 7).astype(np.int32))
    guide, given = taught(np.arange(V), V, ((), ()), teacher)
    assert isinstance(given.head, LMHead)
    again = results(guide, given, rollout._replace(teacher_rows=rows))
    jax.tree.map(np.testing.assert_array_equal, plain, again)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jensen_shannon(0.5)])
def test_another_order_is_the_same_loss(loss):
    """A teacher whose tokens have other ids, its row in them: all is as it was, to rounding."""
    rollout, teacher = random_rollout(3, V, [2, 3], [5, 4]), bigram_params(1, V)
    plain = results(bigram(), teacher, rollout, loss)
    new = np.random.default_rng(5).permutation(V)
    other = {key: jnp.zeros_like(x).at[new].set(x) for key, x in teacher.items()}
    slots = rollout.prompt_length_b[:, None] + np.arange(5)[None] - 1
    rows = TeacherRows(new[rollout.tokens_bs].astype(np.int32), np.minimum(slots, 7))
    guide, given = taught(new, V, ((), ()), other)
    again = results(guide, given, rollout._replace(teacher_rows=rows), loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), plain, again)


def test_merged_stops_of_the_student_are_one_event_here_too():
    """Policy merge of the student's own stops makes of two shared tokens one event."""
    teacher = bigram_params(1, THEIRS, width=5)
    rollout = with_rows(random_rollout(3, V, [2, 3], [5, 4]), 4, THEIRS)
    guide, given = taught(TEACHER_OF, THEIRS, ((), ()), teacher)
    (value, _), _ = results(guide, given, rollout, stops=(7, 9))
    groups, _ = groups_of(TEACHER_OF, THEIRS, ((), ()))
    merged = [g for g in groups if g[0] not in ((7,), (9,))] + [((7, 9), (1, 7))]
    wide = {key: np.asarray(x, np.float64) for key, x in bigram_params(0, V).items()}
    expected = total64(KL64["forward"], wide, teacher, rollout, merged, False)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_two_small_tokenizers_by_hand(tmp_path):
    """From texts to a loss: two BPEs, their own prompts, a response that they cut differently; the
    aligned positions are found by their bytes, and the loss is the float64 sum over them."""
    folders = [
        byte_level(tmp_path / "a", ["the thin then in"] * 3, 262),
        byte_level(tmp_path / "b", ["in ether thesis"] * 3, 265, stop="<|over|>"),
    ]
    own, other = map(load_tokenizer, folders)
    shared = share(own, other)
    text = "then the 日 in"
    response = [*own.spelling().encode(text), own.stop_ids[0]]
    prompt, theirs = own.encode_prompt("?"), other.encode_prompt("?")
    rows = teacher_rows(own, other, shared, [theirs], [response], width=60, length=len(response))
    read = other.spelling().encode(text)
    ends = [np.cumsum([len(t.spelling().bytes_of[i]) for i in ids]).tolist()
            for t, ids in ((own, response[:-1]), (other, read))]  # fmt: skip
    spans = [list(zip([0, *end[:-1]], end, strict=True)) for end in ends]
    expected = [spans[1].index(s) + len(theirs) - 1 if s in spans[1] else -1 for s in spans[0]]
    assert rows.slot_bt[0].tolist() == [*expected, len(theirs) + len(read) - 1]
    assert -1 in expected

    tokens = np.array([[*prompt, *response]], np.int32)
    rollout = Rollout(
        tokens, np.array([len(prompt)]), np.array([len(response)]),
        np.zeros((1, len(response)), np.float32), np.array([False]), teacher_rows=rows,
    )  # fmt: skip
    student, teacher = bigram_params(0, own.size), bigram_params(1, other.size)
    guide, given = taught(shared.teacher_of_v, shared.size, shared.stops, teacher)
    made, _ = scored_loss(
        bigram(), student, guide, given, rollout, token_loss=reverse_kl,
        reduction=lambda mask, _: 1.0 * mask, plan=HeadPlan(chunk=4, vocabulary=own.size),
    )  # fmt: skip
    by_bytes = {b: i for i, b in enumerate(other.spelling().bytes_of) if b}
    by_hand = np.array([by_bytes.get(b, -1) for b in own.spelling().bytes_of])
    by_hand[own.encode("<|pad|>")[0]] = other.encode("<|pad|>")[0]
    groups, _ = groups_of(by_hand, other.size, (own.stop_ids, other.stop_ids))
    wide = {key: np.asarray(x, np.float64) for key, x in student.items()}
    expected = total64(KL64["reverse"], wide, teacher, rollout, groups, False)
    np.testing.assert_allclose(made.total, expected, rtol=2e-5)
