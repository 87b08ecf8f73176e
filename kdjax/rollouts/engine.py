"""A sampler by an HTTP engine with OpenAI's /v1/completions: vLLM, SGLang.

Each row is one request of token ids; the answer has token ids and their log-probabilities. The
engine's default settings (it reads the model's generation_config.json) are overridden one by one.
docs/engines.md: versions, how to start an engine, what is not done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kdjax.base import PLAIN, Array, Batch, Key, Params, Sampler, Samples, Sampling, check_key
from kdjax.errors import ConfigError
from kdjax.rollouts.choose import check_sampling
from kdjax.rollouts.engine_answer import Drawn, read_answer
from kdjax.rollouts.engine_client import (
    Engine,
    Request,
    ask_all,
    check_room,
    context_of,
    open_client,
)

LogProbs = Literal["raw", "tempered", "drawn"]
"""Which distribution an engine's log-probabilities describe:

- raw: the model's own. vLLM by default; SGLang under SGLANG_RETURN_ORIGINAL_LOGPROB=1.
- tempered: softmax(logits / temperature), not truncated. SGLang by default.
- drawn: the one tokens are drawn from, truncated. vLLM --logprobs-mode processed_logprobs.
"""

COLDEST = 0.01
"""The least temperature over 0: vLLM silently raises lower ones to it."""


def row_seeds(key: Key, row_b: Array) -> np.ndarray:
    """A seed of 31 bits a row, from (key, row number) alone. Errors: ConfigError for a key of
    another kind (`base.KEYS`).

    >>> both, one = (row_seeds(jax.random.key(0), np.array(r)) for r in ([3, 5], [5]))
    >>> bool(both[1] == one[0] != both[0])
    True
    """
    check_key(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(row_b))
    return np.asarray(jax.vmap(jax.random.bits)(keys)) >> 1


class _Asking(NamedTuple):
    engine: Engine
    sampling: Sampling
    stop_ids: tuple[int, ...]
    vocabulary: int


class _Request(NamedTuple):
    row: int
    prompt: list[int]
    seed: int | None


def open_engine(
    url: str,
    model: str,
    *,
    stop_ids: Sequence[int],
    vocabulary: int,
    sampling: Sampling = PLAIN,
    log_probs: LogProbs = "raw",
    longest: int = 0,
    seeds: Callable[[Key, Array], np.ndarray] | None = row_seeds,
    at_once: int = 32,
    timeout_s: float = 600.0,
    retries: int = 4,
) -> Sampler:
    """A Sampler that asks the engine at `url` for responses of the model it serves as `model`.

    Opening asks for its models, so it must be up. With PLAIN sampling its log-probabilities are
    both logp and sampler_logp; greedy, they are logp (at temperature 0 both engines return the
    model's own distribution) and sampler_logp is 0; else `log_probs` names their distribution, and
    logp is None. Entropy is None. Parameters are None: the engine has weights of its own. The first
    row to fail ends the batch, and requests in flight are cancelled.

    Args:
        url: http(s)://host:port[/v1]; an API key is read from OPENAI_API_KEY.
        model: its name there.
        stop_ids: the tokens that end a response.
        vocabulary: tokens that exist; an answer with others is refused.
        sampling: temperature and truncation.
        log_probs: the distribution that the engine's log-probabilities describe (`LogProbs`).
        longest: tokens of the longest row to come, prompt and limit, where they are known: the
            engine's context must hold it.
        seeds: (key, row numbers) -> a seed a row; None for an engine that refuses them (vLLM on
            TPU): a row's draw is then not reproducible.
        at_once: requests in flight.
        timeout_s: of one request.
        retries: of one request, with the client's own back-off.

    Errors: ConfigError for arguments that don't fit, among them sampling whose sampler_logp the
    engine would not return; EngineError when it can't be reached, refuses, or answers nonsense.

    >>> open_engine("localhost", "m", stop_ids=[2], vocabulary=9)
    Traceback (most recent call last):
    kdjax.errors.ConfigError: open_engine: url must start with http:// or https://, got 'localhost'
    """
    engine = open_client(
        url, model, "open_engine", at_once=at_once, timeout_s=timeout_s, retries=retries
    )
    ask = _Asking(engine, sampling, tuple(map(int, stop_ids)), vocabulary)
    _check_arguments(ask)
    logp_said, sampler_said = _meaning(sampling, log_probs)
    context = context_of(engine)
    check_room(longest, context, "the longest row: prompt and limit")

    def draw(params: Params, batch: Batch, key: Key, max_new_tokens: int) -> Samples:
        if params is not None:
            raise ConfigError(
                "an engine samples with weights of its own and takes None as parameters; they are"
                " published to it apart (docs/engines.md)"
            )
        seed_b = None if seeds is None or sampling.temperature == 0 else seeds(key, batch.row_b)
        requests = _requests(batch, seed_b, max_new_tokens, context)
        drawn = _draw_all(ask, requests, max_new_tokens)
        tokens, logp = (np.zeros((len(drawn), max_new_tokens), t) for t in (np.int32, np.float32))
        for row, one in enumerate(drawn):
            tokens[row, : len(one.tokens)] = one.tokens
            logp[row, : len(one.logp)] = one.logp
        return Samples(
            tokens_bt=tokens,
            length_b=np.array([len(one.tokens) for one in drawn], np.int32),
            logp_bt=logp if logp_said else None,
            sampler_logp_bt=logp if sampler_said else np.zeros_like(logp),
            entropy_bt=None,
            stop_b=np.array([one.stop for one in drawn], np.int32),
        )

    return draw


def _check_arguments(ask: _Asking) -> None:
    check_sampling(ask.sampling, "open_engine: ")
    temperature = ask.sampling.temperature
    for name, good, wanted, got in (
        ("stop_ids", bool(ask.stop_ids), "name a token that ends a response", "none"),
        ("stop_ids", all(0 <= i < ask.vocabulary for i in ask.stop_ids),
         f"be in the vocabulary of {ask.vocabulary}", ask.stop_ids),
        ("temperature", temperature == 0 or temperature >= COLDEST,
         f"be 0 or at least {COLDEST} (engines raise it to that)", temperature),
    ):  # fmt: skip
        if not good:
            raise ConfigError(f"open_engine: {name} must {wanted}, got {got}")


def _meaning(sampling: Sampling, log_probs: LogProbs) -> tuple[bool, bool]:
    """(whether the engine's log-probabilities are logp, whether they are sampler_logp)."""
    if log_probs not in ("raw", "tempered", "drawn"):
        raise ConfigError(f"log_probs must be raw, tempered or drawn, got {log_probs!r}")
    if sampling.temperature == 0:
        return True, False
    if sampling == PLAIN:
        return True, True
    uncut = (sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0, 0)
    if log_probs == "drawn" or (log_probs == "tempered" and uncut):
        return False, True
    raise ConfigError(
        f"{sampling} is drawn from another distribution than the engine's {log_probs} log-"
        "probabilities describe: start vLLM with --logprobs-mode processed_logprobs and say"
        ' log_probs="drawn" (SGLang: temperature alone and "tempered"), or sample plainly'
    )


def _requests(
    batch: Batch, seed_b: np.ndarray | None, max_new_tokens: int, context: int | None
) -> list[_Request]:
    """Errors: ConfigError for a limit below 1, an empty prompt, one over the engine's context."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt_bp = np.asarray(batch.prompt_bp)
    length_b, row_b = np.asarray(batch.prompt_length_b), np.asarray(batch.row_b)
    requests = []
    for place, (length, row) in enumerate(zip(length_b.tolist(), row_b.tolist(), strict=True)):
        if length < 1:
            raise ConfigError(f"row {row}: its prompt is empty; an engine needs one token at least")
        what = f"row {row}: {length} tokens of prompt and {max_new_tokens} new ones"
        check_room(length + max_new_tokens, context, what)
        seed = None if seed_b is None else int(seed_b[place])
        requests.append(_Request(row, prompt_bp[place, :length].tolist(), seed))
    return requests


def _draw_all(ask: _Asking, requests: list[_Request], max_new_tokens: int) -> list[Drawn]:
    def read(number: int, text: str) -> Drawn:
        return read_answer(
            text,
            prompt=requests[number].prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=ask.stop_ids,
            vocabulary=ask.vocabulary,
        )

    bodies = [Request(_body(ask, one, max_new_tokens), f", row {one.row}") for one in requests]
    return ask_all(ask.engine, "/v1/completions", bodies, read)


def _body(ask: _Asking, request: _Request, max_new_tokens: int) -> dict[str, Any]:
    greedy = ask.sampling.temperature == 0
    cuts = PLAIN if greedy else ask.sampling
    seed = {} if request.seed is None else {"seed": request.seed}
    return {
        "model": ask.engine.model,
        "prompt": request.prompt,
        "max_tokens": max_new_tokens,
        "temperature": ask.sampling.temperature,
        "top_p": cuts.top_p,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logprobs": 1,
        **seed,
        "top_k": cuts.top_k or -1,  # SGLang knows no 0
        "min_p": cuts.min_p,
        "repetition_penalty": 1,
        "stop_token_ids": ask.stop_ids,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
