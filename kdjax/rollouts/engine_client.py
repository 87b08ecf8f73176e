"""Asking an engine over HTTP: many requests at once, each tried again, with a deadline.

An answer is text that its reader does not trust: what is wrong is one line with the row.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from kdjax.errors import ConfigError, EngineError
from kdjax.rollouts.engine_answer import shortened

CONNECT_S = 10.0
"""The most seconds that an engine may take to accept a connection."""

RAW = {"X-Stainless-Raw-Response": "true"}
"""What makes the client return an answer as it is: text, not parsed."""

T = TypeVar("T")


class Engine(NamedTuple):
    """Where an engine is and how it is asked.

    url: http(s)://host:port, without /v1; an API key is read from OPENAI_API_KEY. model: its name
    there. at_once: requests in flight. timeout_s: of one request. retries: of one request, with the
    client's own back-off.
    """

    url: str
    model: str
    at_once: int = 32
    timeout_s: float = 600.0
    retries: int = 4


class Request(NamedTuple):
    """The body of a request, and whose it is in messages, such as ", row 3"."""

    body: dict[str, Any]
    whose: str = ""


def open_client(url: str, model: str, caller: str, **settings: Any) -> Engine:
    """The engine at a URL with or without /v1. caller: named in errors; settings: of `Engine`.

    Errors: ConfigError for settings that can't be, or where the openai package is missing.
    """
    engine = Engine(url.rstrip("/").removesuffix("/v1"), model, **settings)
    check_url(engine.url, f"{caller}: url")
    for name, good, wanted in (
        ("at_once", engine.at_once >= 1, "at least 1"),
        ("timeout_s", engine.timeout_s > 0, "above 0"),
        ("retries", engine.retries >= 0, "at least 0"),
    ):
        if not good:
            raise ConfigError(f"{caller}: {name} must be {wanted}, got {getattr(engine, name)}")
    client_package()
    return engine


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


def client_package() -> Any:
    """The module openai. Errors: ConfigError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise ConfigError(
            'an engine needs the openai package: pip install "kdjax[engine]"'
        ) from None
    return openai


def context_of(engine: Engine) -> int | None:
    """The engine's context length, where it says one. Errors: EngineError; ConfigError where it
    does not serve the model, naming those that it does."""
    text = _run(_ask_one(engine, "GET", "/v1/models", Request({})))
    try:
        cards = {card["id"]: card.get("max_model_len") for card in json.loads(text)["data"]}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise EngineError(
            f"no engine at {engine.url}: /v1/models answered {shortened(text)!r}"
        ) from None
    if engine.model not in cards:
        raise ConfigError(
            f"the engine at {engine.url} does not serve {engine.model!r}; it serves"
            f" {', '.join(map(repr, cards)) or 'nothing'}"
        )
    longest = cards[engine.model]
    return longest if type(longest) is int else None


def check_room(tokens: int, context: int | None, what: str) -> None:
    """Errors: ConfigError where so many tokens pass the engine's context."""
    if context is not None and tokens > context:
        raise ConfigError(
            f"{what}, {tokens} in all, pass the engine's context of {context}; start it with a"
            " longer one (vLLM --max-model-len, SGLang --context-length) or lower max_new_tokens"
        )


def ask_all(
    engine: Engine, path: str, requests: Sequence[Request], read: Callable[[int, str], T]
) -> list[T]:
    """read(number, body of the answer) of each request to a path, at most `at_once` in flight.

    The first to fail ends them all, and those in flight are cancelled. Errors: EngineError once
    retries end, and for a ValueError of `read`.
    """
    return _run(_ask_all(engine, path, requests, read))


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


def _connect(engine: Engine):
    openai = client_package()
    return openai.AsyncOpenAI(
        base_url=engine.url,
        api_key=os.environ.get("OPENAI_API_KEY") or "none",
        timeout=openai.Timeout(engine.timeout_s, connect=min(CONNECT_S, engine.timeout_s)),
        max_retries=engine.retries,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_keep_refusal]}),
    )


async def _ask_one(engine: Engine, verb: str, path: str, request: Request) -> str:
    async with _connect(engine) as client:
        return await _text(engine, client, verb, path, request)


async def _ask_all(engine, path, requests, read) -> list:
    turn = asyncio.Semaphore(engine.at_once)
    async with _connect(engine) as client:

        async def one(number: int, request: Request):
            async with turn:
                text = await _text(engine, client, "POST", path, request)
            try:
                return read(number, text)
            except ValueError as error:
                raise EngineError(f"engine at {engine.url}{request.whose}: {error}") from None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(n, each)) for n, each in enumerate(requests)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _text(engine: Engine, client, verb: str, path: str, request: Request) -> str:
    """The body of an answer. Errors: EngineError once the client has given up."""
    openai, who = client_package(), f"engine at {engine.url}{request.whose}"
    tries, refused = f"tried {engine.retries + 1} times", list[str]()
    REFUSED.set(refused)
    as_it_is: dict[str, Any] = {"cast_to": object, "options": {"headers": RAW}}
    try:
        if verb == "GET":
            return (await client.get(path, **as_it_is)).text
        return (await client.post(path, body=request.body, **as_it_is)).text
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
