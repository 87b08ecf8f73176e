"""What scoring says of each sampled response: its entropy, and its text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdjax.base import Samples, Scores
from kdjax.tokenizer import Tokenizer, pieces

SHOWN_PROBLEMS, SHOWN_TOKENS = 4, 300
"""Of how many problems, spread over the set, the first sample is kept token by token; how far."""


def readings(
    tokenizer, rows, samples: int, problems: int, drawn: Samples, scores: Scores
) -> Iterator[dict[str, Any]]:
    """What scoring adds to the records: the response's entropy, and the pieces of shown samples."""
    shown = {*range(0, problems, -(-problems // SHOWN_PROBLEMS))}
    entropies = _mean_entropies(scores)
    for position, row in enumerate(rows):
        problem, sample = divmod(int(row), samples)
        found: dict[str, Any] = {"entropy": entropies[position]}
        if sample == 0 and problem in shown:
            ids = drawn.tokens_bt[position, : int(drawn.length_b[position])].tolist()
            found["pieces"] = _pieces(tokenizer, ids, _log_ratios(scores, position))
        yield found


def _log_ratios(scores: Scores, position: int) -> list[float | None]:
    """log p(teacher) - log q(student) in nats of each token of a row; None where no teacher says
    it, or where the stop policy leaves the token out."""
    kept = np.asarray(scores.mask[position])
    if scores.teacher_logp is None:
        return [None] * len(kept)
    rows = (np.asarray(x[position], np.float64) for x in (scores.teacher_logp, scores.student_logp))
    ratios = np.subtract(*rows)
    return [float(ratio) if keep else None for ratio, keep in zip(ratios, kept, strict=True)]


def _pieces(tokenizer: Tokenizer, ids: list[int], log_ratios: list[float | None]) -> list[list]:
    """[text, log-ratio] of a response's first pieces (`kdjax.tokenizer.pieces`); that of several
    tokens is their sum, and None where one of them has none."""
    found, at = [], 0
    for text, tokens in pieces(tokenizer, ids[:SHOWN_TOKENS]):
        known = [ratio for ratio in log_ratios[at : at + tokens] if ratio is not None]
        found.append([text, round(sum(known), 3) if len(known) == tokens else None])
        at += tokens
    if len(ids) > SHOWN_TOKENS:
        found.append([f" ... and {len(ids) - SHOWN_TOKENS} tokens more", None])
    return found


def _mean_entropies(scores: Scores) -> list[float]:
    """Of each row, the student's entropy in nats a token; 0 for a response without a token."""
    mask = np.asarray(scores.mask)
    nats = np.where(mask, np.asarray(scores.student_entropy), 0.0).sum(axis=1, dtype=np.float64)
    return (nats / np.maximum(mask.sum(axis=1), 1)).tolist()
