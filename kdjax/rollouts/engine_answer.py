"""One answer of an engine to /v1/completions: JSON text -> tokens, log-probabilities, stop id.

Nothing in it is trusted: an inconsistent answer is refused, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

ROUNDING_NATS = 1e-4
"""The largest log-probability over 0 that is rounding; it is then 0."""

MINUS_INFINITY = -9999.0
"""What vLLM writes for it."""


class Drawn(NamedTuple):
    """A response with its stop token, each token's log-probability, and the stop id (-1: the
    limit ended it)."""

    tokens: list[int]
    logp: list[float]
    stop: int


def read_answer(
    text: str,
    *,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Container[int],
    vocabulary: int,
) -> Drawn:
    """The response to one prompt.

    Args:
        text: JSON, the body of the answer.
        prompt: its token ids.
        max_new_tokens: the limit that was asked for.
        stop_ids: the tokens that end a response.
        vocabulary: tokens that exist.

    Token ids are in the choice's `token_ids` (vLLM and SGLang, where asked to
    `return_token_ids`), else as "token_id:7" in its `logprobs.tokens` (a vLLM of before, asked to
    `return_tokens_as_token_ids`); text is never looked at. A stop token that was left out is put
    back from `stop_reason` (vLLM) or `matched_stop` (SGLang).

    Errors: ValueError saying what is wrong.

    >>> said = '{"token_ids": [5, 2], "logprobs": {"token_logprobs": [-1.5, 0]}}'
    >>> asked = dict(prompt=[1], max_new_tokens=4, stop_ids={2}, vocabulary=9)
    >>> read_answer(f'{{"choices": [{said[:-1]}, "finish_reason": "stop"}}]}}', **asked)
    Drawn(tokens=[5, 2], logp=[-1.5, 0.0], stop=2)
    """
    choice = only_choice(text)
    if choice.get("prompt_token_ids") not in (None, list(prompt)):
        raise ValueError("it read another prompt than it was given: does it cut long ones?")
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    tokens = _token_ids(choice, logprobs, vocabulary)
    for said in (choice.get("stop_reason"), choice.get("matched_stop")):
        if type(said) is int and said in stop_ids and tokens[-1:] != [said]:
            tokens = [*tokens, said]
    _check_end(tokens, choice.get("finish_reason"), max_new_tokens, stop_ids)
    stop = tokens[-1] if tokens[-1] in stop_ids else -1
    return Drawn(tokens, _log_probabilities(logprobs, len(tokens)), stop)


def parsed(text: str) -> Any:
    """The JSON of an answer. Errors: ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"it answered no JSON: {shortened(text)!r}") from None


def only_choice(text: str) -> dict[str, Any]:
    """The choice of a completion of one prompt. Errors: ValueError."""
    answer = parsed(text)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise ValueError(f"it answered no completion: {shortened(text)!r}")
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"it gave {len(choices)} choices for one prompt")
    return choices[0]


def _token_ids(choice: dict[str, Any], logprobs: dict[str, Any], vocabulary: int) -> list[int]:
    tokens = choice.get("token_ids")
    named = logprobs.get("tokens")
    if tokens is None and isinstance(named, list):
        parts = [str(name).partition("token_id:") for name in named]
        if all(not before and number.isdecimal() for before, _, number in parts):
            tokens = [int(number) for _, _, number in parts]
    if not isinstance(tokens, list):
        raise ValueError(
            "it gave no token ids, and text is not tokenised again: it must know return_token_ids"
            " (docs/engines.md names versions)"
        )
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(
                f"token id {token!r} is outside the vocabulary of {vocabulary}: another model?"
            )
    return tokens


def _check_end(
    tokens: list[int], reason: Any, max_new_tokens: int, stop_ids: Container[int]
) -> None:
    """Rows end at their first stop id or at the limit, and the reason must be one of the two."""
    if not tokens:
        raise ValueError(f"it gave no token at all (finish_reason {reason!r})")
    if len(tokens) > max_new_tokens:
        raise ValueError(f"it gave {len(tokens)} tokens where {max_new_tokens} were asked for")
    if any(token in stop_ids for token in tokens[:-1]):
        raise ValueError("it went on after a stop token: it must know stop_token_ids")
    if reason not in ("stop", "length"):
        raise ValueError(f"it broke off with finish_reason {reason!r}")
    if tokens[-1] in stop_ids or len(tokens) == max_new_tokens:
        return
    if reason == "length":
        raise ValueError(
            f"it ended at {len(tokens)} of {max_new_tokens} tokens by a limit of its own: give it a"
            " longer context (vLLM --max-model-len, SGLang --context-length)"
        )
    raise ValueError(
        f"it stopped after token {tokens[-1]}, which is none of the stop ids: the two disagree on"
        " where a response ends; stop_ids must hold every stop id of its model"
    )


def _log_probabilities(logprobs: dict[str, Any], count: int) -> list[float]:
    values = logprobs.get("token_logprobs")
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else "none"
        raise ValueError(f"it gave {got} log-probabilities for {count} tokens, stop token included")
    for value in values:
        if type(value) not in (int, float) or not MINUS_INFINITY < value <= ROUNDING_NATS:
            raise ValueError(f"{value!r} is no log-probability of a token that was drawn")
    return [min(float(value), 0.0) for value in values]


def shortened(text: str, width: int = 200) -> str:
    """A text on one line, cut.

    >>> shortened("a\\n  b c", 3)
    'a b...'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}..."
