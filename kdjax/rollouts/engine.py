"""A sampler by an HTTP engine with OpenAI's /v1/completions: vLLM, SGLang.

Each row is one request of token ids; the answer has token ids and their log-probabilities. The
engine's default settings (it reads the model's generation_config.json) are overridden one by one.
docs/engines.md: versions, how to start an engine, what is not done.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kdjax.base import PLAIN, Array, Batch, Key, Params, Sampler, Samples, Sampling, check_key
from kdjax.errors import ConfigError, EngineError
from kdjax.rollouts.choose import check_sampling
from kdjax.rollouts.engine_answer import Drawn, read_answer, shortened

LogProbs = Literal["raw", "tempered", "drawn"]
"""Which distribution an engine's log-probabilities describe:

- raw: the model's own. vLLM by default; SGLang under SGLANG_RETURN_ORIGINAL_LOGPROB=1.
- tempered: softmax(logits / temperature), not truncated. SGLang by default.
- drawn: the one tokens are drawn from, truncated. vLLM --logprobs-mode processed_logprobs.
"""

CONNECT_S = 10.0
"""The most seconds that an engine may take to accept a connection."""

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


class _Engine(NamedTuple):
    url: str
    model: str
    sampling: Sampling
    stop_ids: tuple[int, ...]
    vocabulary: int
    at_once: int
    timeout_s: float
    retries: int


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
    engine = _Engine(
        url.rstrip("/").removesuffix("/v1") + "/v1",
        model, sampling, tuple(map(int, stop_ids)), vocabulary, at_once, timeout_s, retries,
    )  # fmt: skip
    _check_arguments(engine)
    logp_said, sampler_said = _meaning(sampling, log_probs)
    context = _run(_check_model(engine))
    _check_room(longest, context, "the longest row: prompt and limit")

    def draw(params: Params, batch: Batch, key: Key, max_new_tokens: int) -> Samples:
        if params is not None:
            raise ConfigError(
                "an engine samples with weights of its own and takes None as parameters; weights"
                " are not synchronised to it (docs/engines.md)"
            )
        seed_b = None if seeds is None or sampling.temperature == 0 else seeds(key, batch.row_b)
        requests = _requests(batch, seed_b, max_new_tokens, context)
        drawn = _run(_draw_all(engine, requests, max_new_tokens))
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


def check_url(url: str, field: str) -> None:
    """Errors: ConfigError unless this is the URL of an engine, without a password or key, so that
    it may be written to a run's files."""
    if {*url} & {*"@?#"}:
        raise ConfigError(
            f"{field} must be a host and a path alone, without user, password and query, as it is"
            " written into the run's files; set OPENAI_API_KEY instead"
        )
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{field} must start with http:// or https://, got {url!r}")


def _check_arguments(engine: _Engine) -> None:
    check_sampling(engine.sampling, "open_engine: ")
    temperature = engine.sampling.temperature
    check_url(engine.url.removesuffix("/v1"), "open_engine: url")
    for name, good, wanted, got in (
        ("stop_ids", bool(engine.stop_ids), "name a token that ends a response", "none"),
        ("stop_ids", all(0 <= i < engine.vocabulary for i in engine.stop_ids),
         f"be in the vocabulary of {engine.vocabulary}", engine.stop_ids),
        ("at_once", engine.at_once >= 1, "be at least 1", engine.at_once),
        ("timeout_s", engine.timeout_s > 0, "be above 0", engine.timeout_s),
        ("retries", engine.retries >= 0, "be at least 0", engine.retries),
        ("temperature", temperature == 0 or temperature >= COLDEST,
         f"be 0 or at least {COLDEST} (engines raise it to that)", temperature),
    ):  # fmt: skip
        if not good:
            raise ConfigError(f"open_engine: {name} must {wanted}, got {got}")
    client_package()


def client_package() -> Any:
    """The module openai. Errors: ConfigError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise ConfigError(
            'an engine needs the openai package: pip install "kdjax[engine]"'
        ) from None
    return openai


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
        _check_room(length + max_new_tokens, context, what)
        seed = None if seed_b is None else int(seed_b[place])
        requests.append(_Request(row, prompt_bp[place, :length].tolist(), seed))
    return requests


def _check_room(tokens: int, context: int | None, what: str) -> None:
    if context is not None and tokens > context:
        raise ConfigError(
            f"{what}, {tokens} in all, pass the engine's context of {context}; start it with a"
            " longer one (vLLM --max-model-len, SGLang --context-length) or lower max_new_tokens"
        )


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """A coroutine's result; by a thread where an event loop runs already (in a notebook)."""
    try:
        asyncio.get_running_loop()
        busy = True
    except RuntimeError:
        busy = False
    if not busy:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


REFUSED: contextvars.ContextVar[list[str]] = contextvars.ContextVar("REFUSED")
"""What a request was refused with at first: an engine that answers 500 may be gone when the client
tries again, and then only says that it can't be reached."""


async def _keep_refusal(response) -> None:
    if response.is_error and not REFUSED.get():
        await response.aread()
        REFUSED.get().append(f"{response.status_code} - {shortened(response.text)}")


def _connect(engine: _Engine):
    openai = client_package()
    return openai.AsyncOpenAI(
        base_url=engine.url,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        timeout=openai.Timeout(engine.timeout_s, connect=min(CONNECT_S, engine.timeout_s)),
        max_retries=engine.retries,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_keep_refusal]}),
    )


async def _check_model(engine: _Engine) -> int | None:
    """The engine's context length, where it returns one. Errors: ConfigError where it does not
    serve the model, naming those that it does."""
    async with _connect(engine) as client:
        text = await _text(engine, "", client.models.with_raw_response.list())
    try:
        cards = {card["id"]: card.get("max_model_len") for card in json.loads(text)["data"]}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise EngineError(
            f"no engine at {engine.url}: /models answered {shortened(text)!r}"
        ) from None
    if engine.model not in cards:
        raise ConfigError(
            f"the engine at {engine.url} does not serve {engine.model!r}; it serves"
            f" {', '.join(map(repr, cards)) or 'nothing'}"
        )
    longest = cards[engine.model]
    return longest if type(longest) is int else None


async def _draw_all(engine: _Engine, requests: list[_Request], max_new_tokens: int) -> list[Drawn]:
    turn = asyncio.Semaphore(engine.at_once)
    async with _connect(engine) as client:

        async def one(request: _Request) -> Drawn:
            async with turn:
                return await _draw_row(engine, client, request, max_new_tokens)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _draw_row(engine: _Engine, client, request: _Request, max_new_tokens: int) -> Drawn:
    greedy = engine.sampling.temperature == 0
    cuts = PLAIN if greedy else engine.sampling
    seed = {} if request.seed is None else {"seed": request.seed}
    call = client.completions.with_raw_response.create(
        model=engine.model,
        prompt=request.prompt,
        max_tokens=max_new_tokens,
        temperature=engine.sampling.temperature,
        top_p=cuts.top_p,
        presence_penalty=0,
        frequency_penalty=0,
        logprobs=1,
        **seed,
        extra_body={
            "top_k": cuts.top_k or -1,  # SGLang knows no 0
            "min_p": cuts.min_p,
            "repetition_penalty": 1,
            "stop_token_ids": engine.stop_ids,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        },
    )
    text = await _text(engine, f", row {request.row}", call)
    try:
        return read_answer(
            text,
            prompt=request.prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=engine.stop_ids,
            vocabulary=engine.vocabulary,
        )
    except ValueError as error:
        raise EngineError(f"engine at {engine.url}, row {request.row}: {error}") from None


async def _text(engine: _Engine, row: str, call) -> str:
    """The body of an answer. Errors: EngineError once the client has given up."""
    openai, who = client_package(), f"engine at {engine.url}{row}"
    tries, refused = f"tried {engine.retries + 1} times", list[str]()
    REFUSED.set(refused)
    try:
        return (await call).text
    except openai.APITimeoutError:
        raise EngineError(
            f"{who}: no answer within {engine.timeout_s:g} s, {tries}{_first(refused)}; raise"
            " engine_timeout_seconds (timeout_s) or lower engine_at_once (at_once)"
        ) from None
    except openai.APIConnectionError as error:
        cause = shortened(str(error.__cause__ or error))
        raise EngineError(
            f"{who}: can't be reached ({cause}), {tries}{_first(refused)}; is it up?"
        ) from None
    except openai.APIStatusError as error:
        said = shortened(error.message)
        key = "; set OPENAI_API_KEY" if error.status_code in (401, 403) else ""
        raise EngineError(f"{who}: it refused: {said}{key}") from None


def _first(refused: list[str]) -> str:
    return f" (it first answered {refused[0]}: its log says more)" if refused else ""
