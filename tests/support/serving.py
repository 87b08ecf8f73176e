"""A real HTTP server on loopback that speaks /v1/completions, in the words of either engine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import models
from kdjax.base import Batch, Sampling
from kdjax.numerics import project
from kdjax.rollouts.sampler import generate

CONTEXT = 64
WIDTH = 8  # every prompt is padded to it, so that one compile serves all


class Reply(NamedTuple):
    """What a request is answered with; body None hangs up without a word."""

    body: Any
    status: int = 200
    delay_s: float = 0.0


class Server(NamedTuple):
    """url, the bodies and headers of the completions asked for, and how many were in flight."""

    url: str
    asked: list[dict]
    headers: list[dict]
    in_flight: list[int]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, some of many at once are turned away


@contextlib.contextmanager
def serving(
    answer: Callable[[dict], Reply | dict],
    models: Any = None,
    name: str = "tiny",
    others: dict[str, Callable[[dict], Reply | dict]] | None = None,
) -> Iterator[Server]:
    """A server that answers a completion's body with `answer(body)`, and those of other paths."""
    answers = {"/v1/completions": answer, **(others or {})}
    cards = {"object": "list", "data": [{"id": name, "max_model_len": CONTEXT}]}
    asked: list[dict] = []
    headers: list[dict] = []
    in_flight, now, lock = [], [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            assert self.path == "/v1/models"
            self.send(Reply(cards if models is None else models))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                asked.append(body)
                headers.append({name.lower(): value for name, value in self.headers.items()})
                now[0] += 1
                in_flight.append(now[0])
            reply = answers[self.path](body)
            reply = reply if isinstance(reply, Reply) else Reply(reply)
            time.sleep(reply.delay_s)
            with lock:  # before the answer, which lets the next request in
                now[0] -= 1
            self.send(reply)

        def send(self, reply: Reply):
            if reply.body is None:
                self.close_connection = True
                return
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it gave up
                self.send_response(reply.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text.encode())))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(text.encode())

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}", asked, headers, in_flight)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Text(NamedTuple):
    """A response as an engine's core has it, before it is put into words."""

    tokens: list[int]
    logp: list[float]
    stop: int | None


def engine_core(model, params, limit: int):
    """core(body, mode) -> Text: the model itself behind the wire, seeded by the body's seed.

    Log-probabilities are raw, or (mode "processed") of the tempered distribution; a greedy row's
    are raw in both modes, as in vLLM and SGLang. params may be a function that has the present
    ones.
    """

    def core(body: dict, mode: str = "raw") -> Text:
        prompt = np.zeros((1, max(WIDTH, len(body["prompt"]))), np.int32)
        prompt[0, : len(body["prompt"])] = body["prompt"]
        none, length = np.zeros((1, 1), np.int32), np.array([len(body["prompt"])], np.int32)
        batch = Batch(prompt, length, none, none[0], none[0] > 0, none[0])
        temperature = body["temperature"]
        now = params() if callable(params) else params
        out = generate(
            model, now, batch, jax.random.key(body.get("seed", 0)), max_new_tokens=limit,
            stop_ids=tuple(body["stop_token_ids"]), sampling=Sampling(temperature),
        )  # fmt: skip
        count = min(int(out.length_b[0]), body["max_tokens"])
        logp = out.sampler_logp_bt if mode == "processed" and temperature else out.logp_bt
        tokens = np.asarray(out.tokens_bt[0, :count]).tolist()
        stop = tokens[-1] if tokens[-1] in body["stop_token_ids"] else None
        return Text(tokens, np.asarray(logp[0, :count], np.float64).tolist(), stop)

    return core


def score_core(model, params, vocabulary: int):
    """core(ids) -> float32 [ids, V]: the model's log-probabilities after each of these ids; params
    as of `engine_core`."""

    @jax.jit
    def whole(params, ids):
        return project(model.hidden(params, ids)[0], model.head(params))[:, :vocabulary]

    def core(ids: list[int]) -> np.ndarray:
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(whole(params() if callable(params) else params, row), np.float64)[
            : len(ids)
        ]
        logits -= logits.max(-1, keepdims=True)
        return np.float32(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))

    return core


def vllm_scores(core, body: dict) -> dict:
    """vLLM: at each token of the prompt the k best and the token itself, null at the first."""
    prompt, k = body["prompt"], body["prompt_logprobs"]
    if k > 20:
        said = f"Requested prompt logprobs of {k}, which is greater than max allowed: 20"
        return Reply({"error": {"message": said, "code": 400}}, 400)
    said: list[dict | None] = [None]
    for logp, token in zip(core(prompt), prompt[1:], strict=False):
        named = [*np.argsort(-logp, kind="stable")[:k].tolist(), token]
        ranks = {i: int((logp > logp[i]).sum()) + 1 for i in named}
        said.append({
            str(i): {"logprob": float(logp[i]), "rank": rank, "decoded_token": "x"}
            for i, rank in ranks.items()
        })  # fmt: skip
    answer = _completion(Text([1], [-1.0], None), ["x"], finish_reason="length")
    answer["choices"][0] |= {"prompt_logprobs": said, "logprobs": None}
    return answer


class Reloading:
    """An engine whose weights are those of the folder that it read last, in vLLM's words or
    SGLang's. `load` is what it does with a folder, and may be replaced by what goes wrong."""

    def __init__(self, folder, vocabulary: int, limit: int):
        self.model, self.params = models.load(folder)
        self.paths: list[str] = []
        self.folders: list[str] = []
        self.paused = False
        self.draw = engine_core(self.model, lambda: self.params, limit)
        self.score = score_core(self.model, lambda: self.params, vocabulary)

    def load(self, folder: str) -> Reply | dict:
        """The whole folder is read."""
        _, self.params = models.load(folder)
        return {"results": [None]}

    def answer(self, body: dict) -> Reply | dict:
        assert not self.paused
        return vllm_scores(self.score, body) if "prompt_logprobs" in body else self.drawn(body)

    def drawn(self, body: dict) -> dict:
        return vllm(self.draw(body), body)

    def _reload(self, folder: str) -> Reply | dict:
        self.folders.append(folder)
        return self.load(folder)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        def at(path, act):
            def answer(body):
                self.paths.append(path)
                return act(body)

            return path, answer

        def pause(paused):
            def act(body):
                self.paused = paused
                return {}

            return act

        def of_vllm(body):
            assert self.paused
            assert body["method"] == "reload_weights"
            return self._reload(body["kwargs"]["weights_path"])

        others = dict([
            at("/pause?mode=wait", pause(True)), at("/collective_rpc", of_vllm),
            at("/reset_prefix_cache", lambda body: {}), at("/resume", pause(False)),
            at("/update_weights_from_disk", lambda body: self._reload(body["model_path"])),
            ("/generate", lambda body: sglang_scores(self.score, body)),
        ])  # fmt: skip
        with serving(self.answer, others=others) as server:
            yield server


def sglang_scores(core, body: dict) -> dict:
    """SGLang's /generate: from logprob_start_len on, null at the first."""
    ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
    own: list = [[None, ids[start], None]]
    top: list = [None]
    for logp, token in zip(core(ids)[start:], ids[start + 1 :], strict=False):
        own.append([float(logp[token]), token, None])
        best = np.argsort(-logp, kind="stable")[:k]
        top.append([[float(logp[i]), int(i), None] for i in best])
    about = {"input_token_logprobs": own, "input_top_logprobs": top, "prompt_tokens": len(ids)}
    return {"text": "x", "meta_info": about}


def vllm(text: Text, body: dict, eos: int | None = None) -> dict:
    """vLLM: the stop is in token_ids; stop_reason is its id, null for the model's own EOS."""
    assert body["return_token_ids"] is True
    return _completion(
        text,
        [f"token_id:{token}" for token in text.tokens],
        finish_reason="length" if text.stop is None else "stop",
        stop_reason=None if text.stop == eos else text.stop,
        token_ids=text.tokens,
        prompt_token_ids=body["prompt"],
    )


def old_vllm(text: Text, body: dict) -> dict:
    """vLLM before it knew return_token_ids: ids stand in the log-probabilities' names only."""
    assert body["return_tokens_as_token_ids"] is True
    answer = vllm(text, body)
    del answer["choices"][0]["token_ids"], answer["choices"][0]["prompt_token_ids"]
    return answer


def sglang(text: Text, body: dict) -> dict:
    """SGLang: matched_stop is the id; the limit is its reason even where a stop is the last."""
    assert body["return_token_ids"] is True
    assert body["top_k"] == -1 or body["top_k"] >= 1
    full = len(text.tokens) == body["max_tokens"]
    return _completion(
        text,
        ["x"] * len(text.tokens),
        finish_reason="length" if full or text.stop is None else "stop",
        matched_stop=None if full else text.stop,
        token_ids=text.tokens,
        prompt_token_ids=None,
    )


def trimmed(text: Text, body: dict) -> dict:
    """SGLang, if it left the stop out of the ids and only said which it was."""
    answer = sglang(text, body)
    if answer["choices"][0]["matched_stop"] is not None:
        answer["choices"][0]["token_ids"] = text.tokens[:-1]
    return answer


def _completion(text: Text, names: list[str], **fields) -> dict:
    logprobs = {
        "tokens": names,
        "token_logprobs": text.logp,
        "text_offset": [0] * len(names),
        "top_logprobs": [{name: logp} for name, logp in zip(names, text.logp, strict=True)],
    }
    choice = {"index": 0, "text": "not to be tokenised again", "logprobs": logprobs, **fields}
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 0, "model": "tiny",
        "choices": [choice],
    }  # fmt: skip
