"""A teacher behind an engine: it reads given tokens and says its most probable ones at each place.

One request a row, prompt and response as token ids; docs/engines.md says which words and figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kdjax.base import Rollout, TopK
from kdjax.errors import ConfigError
from kdjax.losses.topk import TAIL_FLOOR
from kdjax.rollouts.engine_answer import MINUS_INFINITY, ROUNDING_NATS, only_choice, parsed
from kdjax.rollouts.engine_client import Request, ask_all, check_room, context_of, open_client

Speaks = Literal["vllm", "sglang"]

Scorer = Callable[[Rollout], TopK]
"""A rollout of host arrays -> the teacher's top k at its response tokens, [B, T, k]."""


class Place(NamedTuple):
    """What an engine says at one token: ids and log-probabilities of the k most probable, best
    first, and the token's own log-probability."""

    ids: list[int]
    logp: list[float]
    own: float


def open_scorer(
    url: str,
    model: str,
    *,
    k: int,
    vocabulary: int,
    speaks: Speaks = "vllm",
    longest: int = 0,
    at_once: int = 32,
    timeout_s: float = 600.0,
    retries: int = 4,
) -> Scorer:
    """A Scorer by the engine at `url`, of the model that it serves as `model`.

    Opening asks for its models, so it must be up. Log-probabilities are the model's own
    (temperature 1, nothing cut), zeros stand beyond a response. The tail is 1 - sum(p) in float64,
    at least TAIL_FLOOR, as no engine says it (and 0 where k is the vocabulary).

    Args:
        url, model, longest, at_once, timeout_s, retries: as of `engine.open_engine`.
        k: tokens at each place; vLLM refuses more than its --max-logprobs, 20 by default.
        vocabulary: tokens that exist; an answer with others is refused.
        speaks: whose words: vllm (/v1/completions) or sglang (/generate).

    Errors: ConfigError for arguments that don't fit; EngineError where it can't be reached,
    refuses, or answers nonsense.

    >>> open_scorer("http://localhost:1", "m", k=9, vocabulary=8)
    Traceback (most recent call last):
    kdjax.errors.ConfigError: open_scorer: k must be in 1..8 (the vocabulary), got 9
    """
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"open_scorer: k must be in 1..{vocabulary} (the vocabulary), got {k}")
    engine = open_client(
        url, model, "open_scorer", at_once=at_once, timeout_s=timeout_s, retries=retries
    )
    path, ask, read = WORDS[speaks]
    context = context_of(engine)
    check_room(longest, context, "the longest row to score: prompt, limit and a token")

    def score(rollout: Rollout) -> TopK:
        rows = _rows(rollout)
        for number, (prompt, response) in enumerate(rows):
            check_room(len(prompt) + len(response) + 1, context, f"row {number} to score")
        asked = [n for n, (_, response) in enumerate(rows) if response]
        requests = [
            Request(ask(model, *rows[number], k), f", scoring row {number}") for number in asked
        ]

        def read_row(number: int, text: str) -> list[Place]:
            prompt, response = rows[asked[number]]
            places = read(text, prompt, response, k)
            for place in places:
                _check(place, k, vocabulary)
            return places

        found = dict(zip(asked, ask_all(engine, path, requests, read_row), strict=True))
        width = np.shape(rollout.sampler_logp_bt)[1]
        return _as_arrays([found.get(n, []) for n in range(len(rows))], width, k, vocabulary)

    return score


def _rows(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each row, as the teacher reads them. Errors: ConfigError for an empty
    prompt, or where the teacher's row does not hold the response's tokens one after the other."""
    first_b, count_b = map(np.asarray, (rollout.prompt_length_b, rollout.response_length_b))
    own = rollout.teacher_rows
    if own is not None:
        slot_bt, steps = np.asarray(own.slot_bt), np.arange(np.shape(own.slot_bt)[1])[None]
        first_b = slot_bt[:, 0] + 1
        in_order = slot_bt + 1 == first_b[:, None] + steps
        if not in_order[steps < count_b[:, None]].all():
            raise ConfigError("an engine scores the student's own tokens, one after the other")
    tokens_bs = np.asarray(rollout.tokens_bs if own is None else own.tokens_bs)
    if (first_b[count_b > 0] < 1).any():
        raise ConfigError("an engine scores tokens after one token at least; a prompt is empty")
    return [
        (row[:start].tolist(), row[start : start + count].tolist())
        for row, start, count in zip(tokens_bs, first_b, count_b, strict=True)
    ]


def _as_arrays(rows: list[list[Place]], width: int, k: int, vocabulary: int) -> TopK:
    """[B, T, k] of the places of each row; zeros beyond them."""
    ids = np.zeros((len(rows), width, k), np.int32)
    logp = np.zeros((len(rows), width, k))
    own = np.zeros((len(rows), width), np.float32)
    mask = np.arange(width)[None] < np.array([len(row) for row in rows])[:, None]
    for number, row in enumerate(rows):
        for at, place in enumerate(row):
            ids[number, at], logp[number, at], own[number, at] = place
    with np.errstate(divide="ignore"):
        floor = TAIL_FLOOR if k < vocabulary else 0.0
        rest = np.maximum(1 - np.exp(logp).sum(-1), floor) if floor else np.zeros(mask.shape)
        tail = np.where(mask, np.log(rest), 0.0)
    made: Any = ids, logp.astype(np.float32), tail.astype(np.float32), own
    return TopK(*made)


def _check(place: Place, k: int, vocabulary: int) -> None:
    """Errors: ValueError for what is no top k of a distribution over the vocabulary."""
    if len(place.ids) != k or len({*place.ids}) != k:
        raise ValueError(f"it named {len({*place.ids})} tokens where {k} were asked for")
    for token in place.ids:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token id {token} is among its best {k} and outside the vocabulary of"
                f" {vocabulary}: another model, or one with rows that no token has (lower top_k)"
            )
    for value in (*place.logp, place.own):
        if type(value) not in (int, float) or not MINUS_INFINITY < value <= ROUNDING_NATS:
            raise ValueError(f"{value!r} is no log-probability")
    if sum(map(math.exp, place.logp)) > 1 + 100 * ROUNDING_NATS:
        raise ValueError(f"its best {k} tokens hold more than all probability: are they logits?")


def _ask_vllm(model: str, prompt: list[int], response: list[int], k: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": [*prompt, *response],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
    }


def _read_vllm(text: str, prompt: Sequence[int], response: Sequence[int], k: int) -> list[Place]:
    """vLLM: `prompt_logprobs` of the choice, null and then {"ID": {"logprob": ...}} for each token:
    the k best, and the token itself where it is not among them."""
    said = only_choice(text).get("prompt_logprobs")
    count = len(prompt) + len(response)
    if not isinstance(said, list) or len(said) != count:
        got = len(said) if isinstance(said, list) else "none"
        raise ValueError(f"it gave prompt_logprobs of {got} tokens for {count}")
    places = []
    for token, entries in zip(response, said[len(prompt) :], strict=True):
        try:
            logp = {int(name): entry["logprob"] for name, entry in entries.items()}
            own = logp[token] if len(logp) <= k else logp.pop(token)
            best = sorted(logp, key=logp.__getitem__, reverse=True)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"it said no log-probability of token {token}") from None
        places.append(Place(best, [logp[i] for i in best], own))
    return places


def _ask_sglang(model: str, prompt: list[int], response: list[int], k: int) -> dict[str, Any]:
    del model  # /generate serves one
    return {
        "input_ids": [*prompt, *response],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,  # of the first position none is said
        "top_logprobs_num": k,
    }


def _read_sglang(text: str, prompt: Sequence[int], response: Sequence[int], k: int) -> list[Place]:
    """SGLang: `meta_info.input_token_logprobs`, [log-probability, id, text] of each token from the
    place asked for, the first without a number; `input_top_logprobs`, a list of such, best first.
    """
    answer = parsed(text)
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    about: Any = answer.get("meta_info") if isinstance(answer, dict) else None
    places = []
    try:
        own, top = (about[f"input_{what}_logprobs"][1:] for what in ("token", "top"))
        if not len(own) == len(top) == len(response):
            raise ValueError(f"it said {len(own)} and {len(top)} tokens for {len(response)}")
        for token, (value, said, *_), best in zip(response, own, top, strict=True):
            if said != token:
                raise ValueError(f"it read token {said} where {token} was sent")
            places.append(Place([i for _, i, *_ in best], [x for x, *_ in best], value))
    except (KeyError, TypeError):
        raise ValueError(f"it gave no input_top_logprobs of {len(response)} tokens") from None
    return places


WORDS: dict[Speaks, Any] = {
    "vllm": ("/v1/completions", _ask_vllm, _read_vllm),
    "sglang": ("/generate", _ask_sglang, _read_sglang),
}
"""How each engine is asked: (path, body of a row, answer -> its places)."""
