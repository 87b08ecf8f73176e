"""The prefix axis: rows without a gap, cuts that equal shorter draws, look-up by row number."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from kdjax.base import Batch, Samples
from kdjax.rollouts.prefix import (
    assemble,
    assemble_samples,
    cut,
    from_dataset,
    from_student,
    from_teacher,
)

PROMPTS, RESPONSES = [3, 6, 1], [4, 5, 2]
P, T = 6, 5


def numbered_batch(*, response_lengths=RESPONSES, truncated=(False, True, False)) -> Batch:
    """Every prompt and response token is another number above 0; the padding holds junk (-7)."""
    prompt, response = np.full((3, P), -7), np.full((3, T), -7)
    for row in range(3):
        prompt[row, : PROMPTS[row]] = 100 * (row + 1) + np.arange(PROMPTS[row])
        response[row, : response_lengths[row]] = (
            100 * (row + 1) + 50 + np.arange(response_lengths[row])
        )
    return Batch(
        prompt_bp=prompt.astype(np.int32),
        prompt_length_b=np.array(PROMPTS, np.int32),
        response_bt=response.astype(np.int32),
        response_length_b=np.array(response_lengths, np.int32),
        response_truncated_b=np.array(truncated),
        row_b=np.array([2, 0, 1], np.int32),
    )


def numbered_samples(rows: int, length: int, seed: int = 0) -> Samples:
    """Random samples, right-padded with zeros; rows of full length are truncated ones."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, rows).astype(np.int32)
    lengths[0] = length
    real = np.arange(length)[None] < lengths[:, None]
    fields = [np.where(real, rng.random((rows, length)), 0).astype(np.float32) for _ in range(3)]
    tokens = np.where(real, rng.integers(1, 90, (rows, length)), 0).astype(np.int32)
    stops = np.where(lengths == length, -1, 7).astype(np.int32)
    return Samples(tokens, lengths, *fields, stops)


def expected_tokens(batch: Batch, lengths, width: int) -> list[list[int]]:
    """Prompt, response, zeros, row by row."""
    rows = []
    for row, length in enumerate(lengths):
        real = [*batch.prompt_bp[row, : PROMPTS[row]], *batch.response_bt[row, :length]]
        rows.append([int(t) for t in real] + [0] * (width - len(real)))
    return rows


@pytest.mark.parametrize("response_lengths", [RESPONSES, [0, 5, 1], [0, 0, 0]], ids=str)
def test_rows_have_no_gap_and_zero_padding(response_lengths):
    """A row is its prompt, its response and zeros, whatever junk stood in the padding."""
    batch = numbered_batch(response_lengths=response_lengths)
    logp = np.random.default_rng(0).random((3, T)).astype(np.float32)
    rollout = assemble(
        batch, batch.response_bt, batch.response_length_b, logp, batch.response_truncated_b
    )
    assert rollout.tokens_bs.tolist() == expected_tokens(batch, response_lengths, P + T)
    assert rollout.prompt_length_b.tolist() == PROMPTS
    assert rollout.response_length_b.tolist() == response_lengths
    np.testing.assert_array_equal(rollout.sampler_logp_bt, logp)
    assert rollout.truncated_b.tolist() == [False, True, False]
    chex.assert_trees_all_equal(rollout, jax.jit(assemble)(
        batch, batch.response_bt, batch.response_length_b, logp, batch.response_truncated_b
    ))  # fmt: skip


@pytest.mark.parametrize("limit", [5, 4, 2, 1])
def test_the_dataset_is_cut_and_flagged(limit):
    """from_dataset keeps `limit` tokens; cut rows, and rows that came cut, are truncated."""
    batch = numbered_batch()
    rollout = from_dataset(batch, None, None, limit)
    kept = [min(n, limit) for n in RESPONSES]
    assert rollout.tokens_bs.tolist() == expected_tokens(batch, kept, P + limit)
    assert rollout.response_length_b.tolist() == kept
    assert rollout.truncated_b.tolist() == [RESPONSES[0] > limit, True, RESPONSES[2] > limit]
    assert rollout.sampler_logp_bt.shape == (3, limit)
    assert not np.asarray(rollout.sampler_logp_bt).any()


@pytest.mark.parametrize("limit", [8, 5, 1])
def test_cutting_equals_drawing_shorter(limit):
    """cut keeps what a sampler with the shorter limit emits: the same rows, stopped earlier."""
    whole = numbered_samples(6, 8)
    shorter = cut(whole, limit)
    for row in range(6):
        length = min(int(whole.length_b[row]), limit)
        finished = not whole.truncated_b[row] and whole.length_b[row] <= limit
        assert int(shorter.length_b[row]) == length
        assert bool(shorter.truncated_b[row]) != finished
        for name in ("tokens_bt", "logp_bt", "sampler_logp_bt", "entropy_bt"):
            field = getattr(shorter, name)[row]
            assert field.tolist() == getattr(whole, name)[row, :limit].tolist()
            assert not field[length:].any()
    chex.assert_trees_all_equal(cut(cut(whole, 5), limit), cut(whole, min(limit, 5)))


def test_the_teacher_is_looked_up_by_row_number():
    """from_teacher reads the batch's row numbers in order, and cuts; it needs no model or key."""
    batch, kept = numbered_batch(), numbered_samples(5, T)
    asked = []

    def read(rows):
        asked.append(rows.tolist())
        return Samples(*(field[rows] for field in kept))

    rollout = from_teacher(read)(batch, None, None, 3)
    assert asked == [[2, 0, 1]]
    for row, number in enumerate([2, 0, 1]):
        length = min(int(kept.length_b[number]), 3)
        first = PROMPTS[row]
        assert (
            rollout.tokens_bs[row, first : first + length].tolist()
            == kept.tokens_bt[number, :length].tolist()
        )
        assert not rollout.tokens_bs[row, first + length :].any()
        assert int(rollout.response_length_b[row]) == length
        assert rollout.sampler_logp_bt[row].tolist() == kept.sampler_logp_bt[number, :3].tolist()


def test_the_student_is_drawn_from_with_what_it_is_given():
    """from_student hands on parameters, batch, key and limit, and assembles the samples."""
    batch, samples = numbered_batch(), numbered_samples(3, 4)
    given = []

    def sampler(*arguments):
        given.append(arguments)
        return samples

    rollout = from_student(sampler)(batch, "params", "key", 4)
    assert given == [("params", batch, "key", 4)]
    chex.assert_trees_all_equal(
        rollout._replace(own_logp_bt=None, entropy_bt=None), assemble_samples(batch, samples)
    )
    np.testing.assert_array_equal(rollout.own_logp_bt, samples.logp_bt)
    np.testing.assert_array_equal(rollout.entropy_bt, samples.entropy_bt)
    np.testing.assert_array_equal(rollout.sampler_logp_bt, samples.sampler_logp_bt)
    np.testing.assert_array_equal(rollout.truncated_b, samples.truncated_b)


def test_a_teacher_reads_the_response_behind_its_own_prompt():
    """By hand: the tokens of both, and for each response token the slot of the one before it."""
    none = np.zeros(2, np.int32)
    batch = Batch(
        np.array([[5, 6, 0], [7, 8, 9]], np.int32), np.array([2, 3], np.int32),
        none[:, None], none, none > 0, none,
        (np.array([[1, 2, 3, 4], [1, 0, 0, 0]], np.int32), np.array([4, 1], np.int32)),
    )  # fmt: skip
    response = np.array([[11, 12, 13], [21, 0, 0]], np.int32)
    length, logp = np.array([3, 1], np.int32), np.zeros((2, 3), np.float32)
    rollout = assemble(batch, response, length, logp, none > 0)
    np.testing.assert_array_equal(rollout.tokens_bs, [[5, 6, 11, 12, 13, 0], [7, 8, 9, 21, 0, 0]])
    rows = rollout.teacher_rows
    np.testing.assert_array_equal(
        rows.tokens_bs, [[1, 2, 3, 4, 11, 12, 13], [1, 21, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(rows.slot_bt, [[3, 4, 5], [0, -1, -1]])
    alike = assemble(batch._replace(teacher_prompts=None), response, length, logp, none > 0)
    assert alike.teacher_rows is None
    for ours, theirs in zip(alike[:5], rollout[:5], strict=True):
        np.testing.assert_array_equal(ours, theirs)
