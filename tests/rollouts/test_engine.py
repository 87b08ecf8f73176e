"""The engine's Sampler against a real server: our own model behind vLLM's and SGLang's words, and
servers that misbehave in every way."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
from serving import CONTEXT, Reply, engine_core, old_vllm, serving, sglang, trimmed, vllm
from tiny import lively, random_prompts

from kdjax.base import Batch, Samples, Sampling
from kdjax.errors import ConfigError, EngineError, KdjaxError
from kdjax.rollouts.engine import open_engine, row_seeds
from kdjax.rollouts.engine_answer import read_answer
from kdjax.rollouts.prefix import assemble_samples, cut, from_student
from kdjax.rollouts.sampler import generate

LENGTHS = [3, 8, 5, 1, 8, 4, 7, 2]
ROWS = [40, 7, 19, 3, 101, 64, 5, 88]
LIMIT = 20
STOP_IDS = tuple(range(90, 125))  # so many that most rows stop on the way
GREEDY = Sampling(temperature=0.0)
DIALECTS = {"vllm": vllm, "old vllm": old_vllm, "sglang": sglang, "trimmed": trimmed}


@pytest.fixture(scope="module")
def decoder(student):
    model, params = student
    return model, lively(params)


@pytest.fixture(scope="module")
def core(decoder):
    return engine_core(*decoder, LIMIT)


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    return random_prompts(tokenizer.size, LENGTHS, ROWS)


@pytest.fixture(scope="module")
def own_greedy(decoder, batch) -> Samples:
    model, params = decoder
    return generate(
        model, params, batch, jax.random.key(0), max_new_tokens=LIMIT, stop_ids=STOP_IDS,
        sampling=Sampling(0.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def good(core, batch):
    """A right answer to the first row, as text: what misbehaving servers spoil."""
    row = {"prompt": batch.prompt_bp[1].tolist(), "max_tokens": LIMIT, "temperature": 1.0}
    for seed in range(20):  # until one stops on the way, and not at once
        body = {**row, "stop_token_ids": STOP_IDS, "return_token_ids": True, "seed": seed}
        text = core(body)
        if text.stop is not None and 3 <= len(text.tokens) < LIMIT:
            break
    return json.dumps(vllm(text, body))


@pytest.fixture
def opened(tokenizer):
    """opened(server, ...) -> Sampler on it; one try, no patience."""

    def call(server, **changes):
        url = server if isinstance(server, str) else server.url
        arguments = dict(stop_ids=STOP_IDS, vocabulary=tokenizer.size, retries=0, timeout_s=20)
        return open_engine(url, **{"model": "tiny", **arguments, **changes})

    return call


def take(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


def draw(sampler, batch: Batch, seed: int = 0, limit: int = LIMIT) -> Samples:
    return sampler(None, batch, jax.random.key(seed), limit)


def said(caught) -> str:
    """The message, which is one line."""
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dialect", DIALECTS)
def test_greedy_equals_the_own_sampler(opened, core, batch, own_greedy, dialect):
    """Tokens, lengths, stop ids and log-probabilities are kdjax's own, in every dialect."""
    with serving(lambda body: DIALECTS[dialect](core(body), body)) as server:
        samples = draw(opened(server, sampling=GREEDY, at_once=3), batch)
    assert 0 < samples.truncated_b.sum() < 8
    for name in ("tokens_bt", "length_b", "stop_b", "truncated_b"):
        ours, own = getattr(samples, name), getattr(own_greedy, name)
        assert ours.dtype == own.dtype
        np.testing.assert_array_equal(ours, own, name)
    np.testing.assert_allclose(samples.logp_bt, own_greedy.logp_bt, atol=1e-5)
    np.testing.assert_array_equal(samples.sampler_logp_bt, own_greedy.sampler_logp_bt)
    assert samples.entropy_bt is None


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_stop_just_at_the_limit_is_no_truncation(opened, core, batch, own_greedy, dialect):
    """Even where the engine names the limit as the reason."""
    limit = int(np.sort(own_greedy.length_b[~own_greedy.truncated_b])[1])
    with serving(lambda body: DIALECTS[dialect](core(body), body)) as server:
        samples = draw(opened(server, sampling=GREEDY), batch, limit=limit)
    wanted = cut(own_greedy, limit)
    assert ((wanted.length_b == limit) & (wanted.stop_b >= 0)).any()
    np.testing.assert_array_equal(samples.tokens_bt, wanted.tokens_bt)
    np.testing.assert_array_equal(samples.length_b, wanted.length_b)
    np.testing.assert_array_equal(samples.stop_b, wanted.stop_b)


def test_eos_that_the_engine_does_not_name(opened, core, batch, own_greedy):
    """vLLM says no stop_reason for its model's own EOS; the token tells."""
    eos = int(own_greedy.stop_b.max())
    with serving(lambda body: vllm(core(body), body, eos=eos)) as server:
        samples = draw(opened(server, sampling=GREEDY), batch)
    np.testing.assert_array_equal(samples.stop_b, own_greedy.stop_b)


@pytest.fixture(scope="module")
def plain_server(core):
    with serving(lambda body: vllm(core(body), body)) as server:
        yield server


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda batch: take(batch, [4]), [4]),
        (lambda batch: take(batch, [6, 4, 1, 0]), [6, 4, 1, 0]),
        (
            lambda batch: batch._replace(
                prompt_bp=np.pad(batch.prompt_bp, [(0, 0), (0, 5)], constant_values=9)
            ),
            range(8),
        ),
    ],
    ids=["alone", "another order", "more padding"],
)
def test_a_row_does_not_know_its_batch(opened, plain_server, batch, change, rows):
    """A row's tokens depend on key, row number and prompt alone; plain logp is both."""
    sampler = opened(plain_server)
    samples, others = draw(sampler, batch), draw(sampler, change(batch))
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(others.tokens_bt[place], samples.tokens_bt[row])
        np.testing.assert_array_equal(others.logp_bt[place], samples.logp_bt[row])
    np.testing.assert_array_equal(samples.logp_bt, samples.sampler_logp_bt)
    assert samples.logp_bt.min() < -1


def test_keys_and_row_numbers_choose_the_sample(opened, plain_server, batch):
    """The same key draws the same; other keys, or row numbers of one prompt, draw otherwise."""
    sampler = opened(plain_server)
    tokens = draw(sampler, batch).tokens_bt
    np.testing.assert_array_equal(draw(sampler, batch).tokens_bt, tokens)
    assert (draw(sampler, batch, seed=1).tokens_bt != tokens).any(axis=1).sum() >= 7
    same_prompt = take(batch, [1] * 8)._replace(row_b=batch.row_b)
    assert len({tuple(row) for row in draw(sampler, same_prompt).tokens_bt.tolist()}) >= 4


def test_seeds_fit_every_engine(batch):
    """31 bits, no two rows alike, the same on a device."""
    seeds = row_seeds(jax.random.key(7), np.arange(2000))
    assert len(set(seeds.tolist())) == 2000
    assert 0 <= seeds.min() < 2**27 < 2**30 < seeds.max() < 2**31
    np.testing.assert_array_equal(seeds, row_seeds(jax.random.key(7), jax.numpy.arange(2000)))


def test_what_is_asked(opened, core, batch):
    """Every setting is said, so that none of the engine's defaults can act; prompts unpadded."""
    sampling = Sampling(0.7, top_p=0.9, top_k=5, min_p=0.01)
    with serving(lambda body: vllm(core(body), body)) as server:
        draw(opened(server, sampling=sampling, log_probs="drawn"), take(batch, [0]))
        draw(opened(server, seeds=None), take(batch, [0]))
        cold = Sampling(0, top_p=0.5, top_k=3, min_p=0.2)
        draw(opened(server.url + "/v1/", sampling=cold), take(batch, [0]))
    full, unseeded, greedy = server.asked
    assert full == {
        "model": "tiny", "prompt": batch.prompt_bp[0, :3].tolist(), "max_tokens": LIMIT,
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "presence_penalty": 0,
        "frequency_penalty": 0, "repetition_penalty": 1, "logprobs": 1,
        "stop_token_ids": list(STOP_IDS), "return_token_ids": True,
        "return_tokens_as_token_ids": True, "seed": int(row_seeds(jax.random.key(0), [40])[0]),
    }  # fmt: skip
    assert "seed" not in unseeded
    assert "seed" not in greedy
    for body in (unseeded, greedy):
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1, -1, 0)


WARM, CUT = Sampling(0.7), Sampling(0.7, top_p=0.9)


@pytest.mark.parametrize("mode", ["tempered", "drawn"])
def test_log_probabilities_of_the_drawn(opened, core, batch, mode):
    """At another temperature they are sampler_logp; logp, which nobody said, is None."""
    one = take(batch, [1])
    with serving(lambda body: vllm(core(body, "processed"), body)) as server:
        samples = draw(opened(server, sampling=WARM, log_probs=mode), one)
        tempered = core(server.asked[0], "processed")
        raw = core(server.asked[0])
    length = samples.length_b[0]
    np.testing.assert_allclose(samples.sampler_logp_bt[0, :length], tempered.logp, atol=1e-6)
    assert abs(np.array(raw.logp) - tempered.logp).max() > 0.01
    assert samples.logp_bt is None


@pytest.mark.parametrize(
    ("sampling", "log_probs", "known"),
    [
        *[(GREEDY, kind, True) for kind in ("raw", "tempered", "drawn")],
        *[(Sampling(), kind, True) for kind in ("raw", "tempered", "drawn")],
        (WARM, "raw", False),
        (WARM, "tempered", True),
        (WARM, "drawn", True),
        (CUT, "raw", False),
        (CUT, "tempered", False),
        (CUT, "drawn", True),
        (Sampling(top_k=5), "tempered", False),
        (Sampling(min_p=0.1), "tempered", False),
    ],
)
def test_a_distribution_that_nobody_describes_is_refused(
    opened, plain_server, sampling, log_probs, known
):
    """sampler_logp is never a guess."""
    if known:
        opened(plain_server, sampling=sampling, log_probs=log_probs)
        return
    with pytest.raises(ConfigError, match="processed_logprobs") as caught:
        opened(plain_server, sampling=sampling, log_probs=log_probs)
    assert f"the engine's {log_probs} log-probabilities" in said(caught)


def test_parameters_are_refused(opened, plain_server, batch):
    with pytest.raises(ConfigError, match="published to it apart") as caught:
        opened(plain_server)({"a": np.zeros(1)}, batch, jax.random.key(0), LIMIT)
    assert "docs/engines.md" in said(caught)


def test_rollouts_from_an_engine(opened, plain_server, batch):
    """A frozen student behind an engine is a prefix source like any other."""
    sampler = opened(plain_server)
    rollout = from_student(sampler)(batch, None, jax.random.key(3), LIMIT)
    samples = draw(sampler, batch, seed=3)
    wanted = assemble_samples(batch, samples)._replace(own_logp_bt=samples.logp_bt)
    jax.tree.map(np.testing.assert_array_equal, rollout, wanted)


def changed(good: str, **fields) -> str:
    """The right answer with other fields of its choice; None deletes one."""
    answer = json.loads(good)
    choice = answer["choices"][0]
    for name, value in fields.items():
        place = choice["logprobs"] if name in ("token_logprobs", "tokens") else choice
        if value is None:
            del place[name]
        else:
            place[name] = value(place[name]) if callable(value) else value
    return json.dumps(answer)


FAULTS = {
    "no JSON": (lambda good: "<html>502</html>", "answered no JSON: '<html>502</html>'"),
    "cut JSON": (lambda good: good[: len(good) // 2], "answered no JSON"),
    "JSON without end": (lambda good: "[" * 100_000, "answered no JSON: '[["),
    "a list": (lambda good: "[1]", "answered no completion: '[1]'"),
    "an error as a success": (lambda good: '{"error": "busy"}', "answered no completion"),
    "no choice": (lambda good: '{"choices": []}', "0 choices for one prompt"),
    "two choices": (
        lambda good: json.dumps({"choices": json.loads(good)["choices"] * 2}),
        "2 choices for one prompt",
    ),
    "a choice of nothing": (lambda good: '{"choices": [null]}', "1 choices for one prompt"),
    "text alone": (
        lambda good: changed(good, token_ids=None, tokens=lambda names: ["x"] * len(names)),
        "no token ids",
    ),
    "no ids, no log-probabilities": (
        lambda good: changed(good, token_ids=None, logprobs=None),
        "no token ids",
    ),
    "an id past the vocabulary": (
        lambda good: changed(good, token_ids=lambda ids: [99999, *ids[1:]]),
        "token id 99999 is outside the vocabulary",
    ),
    "a negative id": (
        lambda good: changed(good, token_ids=lambda ids: [-1, *ids[1:]]),
        "token id -1 is outside",
    ),
    "an id of a fraction": (
        lambda good: changed(good, token_ids=lambda ids: [1.5, *ids[1:]]),
        "token id 1.5 is outside",
    ),
    "no token": (lambda good: changed(good, token_ids=[], stop_reason=None), "no token at all"),
    "too many": (
        lambda good: changed(good, token_ids=[1] * (LIMIT + 1), stop_reason=None),
        f"{LIMIT + 1} tokens where {LIMIT} were asked for",
    ),
    "past a stop": (
        lambda good: changed(good, token_ids=lambda ids: [STOP_IDS[0], *ids]),
        "went on after a stop token",
    ),
    "aborted": (lambda good: changed(good, finish_reason="abort"), "finish_reason 'abort'"),
    "no reason": (lambda good: changed(good, finish_reason=None), "finish_reason None"),
    "a limit of its own": (
        lambda good: changed(
            good, token_ids=lambda ids: ids[:-1], finish_reason="length", stop_reason=None
        ),
        f"of {LIMIT} tokens by a limit of its own",
    ),
    "a stop of its own": (
        lambda good: changed(good, token_ids=lambda ids: [*ids[:-1], 3], stop_reason=3),
        "stopped after token 3, which is none of the stop ids",
    ),
    "another prompt": (lambda good: changed(good, prompt_token_ids=[1, 2]), "another prompt"),
    "no log-probabilities": (
        lambda good: changed(good, token_logprobs=None),
        "none log-probabilities",
    ),
    "one missing": (
        lambda good: changed(good, token_logprobs=lambda logp: logp[1:]),
        "log-probabilities for",
    ),
    "no stop's": (
        lambda good: changed(
            good, token_ids=lambda ids: ids[:-1], token_logprobs=lambda logp: logp[:-1]
        ),
        "stop token included",
    ),
    "null": (
        lambda good: changed(good, token_logprobs=lambda logp: [None, *logp[1:]]),
        "None is no log-probability",
    ),
    "NaN": (
        lambda good: changed(good, token_logprobs=lambda logp: [float("nan"), *logp[1:]]),
        "nan is no log-probability",
    ),
    "positive": (
        lambda good: changed(good, token_logprobs=lambda logp: [0.5, *logp[1:]]),
        "0.5 is no log-probability",
    ),
    "minus infinity": (
        lambda good: changed(good, token_logprobs=lambda logp: [-9999.0, *logp[1:]]),
        "-9999.0 is no log-probability",
    ),
    "in words": (
        lambda good: changed(good, token_logprobs=lambda logp: ["-1", *logp[1:]]),
        "'-1' is no log-probability",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_do_not_add_up(opened, batch, good, fault):
    """One line that names the engine, the row and what is wrong with its answer."""
    spoil, says = FAULTS[fault]
    with serving(lambda body: Reply(spoil(good))) as server:
        sampler = opened(server)
        with pytest.raises(EngineError) as caught:
            draw(sampler, take(batch, [1]))
    message = said(caught)
    assert says in message
    assert message.startswith(f"engine at {server.url}, row 7: ")
    assert caught.value.exit_code == 69


def test_the_answer_that_faults_are_made_of_is_good(opened, batch, good):
    with serving(lambda body: Reply(good)) as server:
        samples = draw(opened(server), take(batch, [1]))
    tokens = json.loads(good)["choices"][0]["token_ids"]
    assert samples.tokens_bt[0, : len(tokens)].tolist() == tokens


def test_rounding_above_zero_is_zero(good):
    asked = dict(prompt=[], max_new_tokens=LIMIT, stop_ids=STOP_IDS, vocabulary=10**6)
    text = changed(good, token_logprobs=lambda logp: [3e-5, *logp[1:]], prompt_token_ids=None)
    assert read_answer(text, **asked).logp[0] == 0.0


def test_retries_really_happen(opened, core, batch):
    """A server that fails twice, in three ways, then serves: the row is the same."""
    for failure in (Reply({"error": {"message": "busy"}}, 503), Reply({"error": "slow"}, 429)):
        calls = iter([failure, failure])
        with serving(lambda body, c=calls: next(c, None) or vllm(core(body), body)) as server:
            samples = draw(opened(server, retries=2), take(batch, [1]))
        assert len(server.asked) == 3
        assert server.asked[0] == server.asked[2]
        assert samples.length_b[0] > 0


def test_a_dropped_connection_is_retried(opened, core, batch, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    calls = iter([Reply(None), Reply(None)])
    with serving(lambda body: next(calls, None) or vllm(core(body), body)) as server:
        draw(opened(server, retries=2), take(batch, [1]))
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "tries", "says"),
    [
        (503, 3, "Error code: 503 - no memory"),
        (500, 3, "Error code: 500 - no memory"),
        (400, 1, "Error code: 400 - no memory"),
        (404, 1, "Error code: 404 - no memory"),
        (401, 1, "set OPENAI_API_KEY"),
    ],
)
def test_refusals(opened, batch, status, tries, says):
    """After retries, where they can help: the engine's own words."""
    reply = Reply({"error": {"message": "no\nmemory", "code": status}}, status)
    with serving(lambda body: reply) as server:
        sampler = opened(server, retries=2)
        with pytest.raises(EngineError) as caught:
            draw(sampler, take(batch, [1]))
    assert says in said(caught)
    assert "row 7: it refused" in str(caught.value)
    assert len(server.asked) == tries


def test_an_engine_that_is_down(opened, core, batch):
    """Refused connections, at opening and later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match="can't be reached") as caught:
        opened(url)
    assert "is it up?" in said(caught)
    with serving(lambda body: vllm(core(body), body)) as server:
        sampler = opened(server)
    with pytest.raises(EngineError, match="row 7: can't be reached"):
        draw(sampler, take(batch, [1]))


def test_what_an_engine_refused_with_is_not_lost(opened, batch, monkeypatch):
    """It answers 500 once, and is gone when it is asked again: the line holds its own words."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    replies = iter([Reply({"error": {"message": "head_dim=24 is not served"}}, 500)])
    with serving(lambda body: next(replies, Reply(None))) as server:
        sampler = opened(server, retries=2)
        with pytest.raises(EngineError) as caught:
            draw(sampler, take(batch, [1]))
    assert len(server.asked) == 3
    assert "can't be reached" in said(caught)
    assert "it first answered 500 - " in said(caught)
    assert "head_dim=24 is not served" in said(caught)


def test_an_engine_that_hangs(opened, batch):
    with serving(lambda body: Reply({}, delay_s=1.0)) as server:
        sampler = opened(server, timeout_s=0.1)
        with pytest.raises(EngineError, match=r"no answer within 0\.1 s, tried 1 times") as caught:
            draw(sampler, take(batch, [1]))
    said(caught)


def test_the_first_failure_ends_the_batch(opened, batch):
    """Nobody waits for rows in flight, and rows that wait for a turn are not asked."""

    def answer(body):
        bad = body["prompt"] == batch.prompt_bp[1].tolist()
        return Reply({"error": "no"}, 400) if bad else Reply({}, delay_s=5.0)

    with serving(answer) as server:
        sampler = opened(server, at_once=3)
        started = time.monotonic()
        with pytest.raises(EngineError, match="row 7: it refused"):
            draw(sampler, batch)
        assert time.monotonic() - started < 3
    assert len(server.asked) <= 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_bounded_in_flight(opened, core, batch, at_once):
    gate = threading.Barrier(at_once, timeout=20)

    def answer(body):
        if len(server.asked) <= at_once:
            gate.wait()  # as many as may really are in flight together
        return vllm(core(body), body)

    with serving(answer) as server:
        draw(opened(server, sampling=GREEDY, at_once=at_once), batch)
    assert max(server.in_flight) == at_once
    assert len(server.asked) == 8


def test_models_that_are_not_served(opened):
    with serving(dict, name="other") as server, pytest.raises(ConfigError) as caught:
        opened(server)
    assert "does not serve 'tiny'; it serves 'other'" in said(caught)


@pytest.mark.parametrize(
    "models", ["<html>", "[" * 100_000, [], {"data": [3]}, {"data": None}, {"data": [{}]}]
)
def test_what_is_no_engine(opened, models):
    with serving(dict, models=models) as server, pytest.raises(EngineError) as caught:
        opened(server)
    assert "no engine at" in said(caught)


def test_prompts_over_the_context(opened, plain_server, batch):
    """Refused before anything is asked, or at the opening; one token less is not."""
    sampler, before = opened(plain_server, longest=CONTEXT), len(plain_server.asked)
    with pytest.raises(ConfigError, match=r"the longest row: .* 65 in all, pass .* context of 64"):
        opened(plain_server, longest=CONTEXT + 1)
    with pytest.raises(ConfigError, match="row 7: 8 tokens of prompt and 57 new ones") as caught:
        draw(sampler, batch, limit=CONTEXT - 8 + 1)
    assert "--max-model-len" in said(caught)
    assert len(plain_server.asked) == before
    with serving(lambda body: Reply({"error": {"message": "too long"}}, 400), {"data": [
        {"id": "tiny"}]}) as silent, pytest.raises(EngineError, match="too long"):  # fmt: skip
        draw(opened(silent), batch, limit=10**6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"url": "localhost:8000"}, "url must start with http"),
        ({"stop_ids": ()}, "stop_ids must name a token"),
        ({"stop_ids": (10**6,)}, "stop_ids must be in the vocabulary"),
        ({"at_once": 0}, "at_once must be at least 1"),
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"sampling": Sampling(-1)}, "temperature must be at least 0"),
        ({"sampling": Sampling(0.001)}, "temperature must be 0 or at least 0.01"),
        ({"log_probs": "processed"}, "log_probs must be raw, tempered or drawn"),
    ],
)
def test_bad_arguments(opened, changes, says):
    changes = dict(changes)
    with pytest.raises(ConfigError) as caught:
        opened(changes.pop("url", "http://127.0.0.1:9"), **changes)
    assert says in said(caught)


def test_bad_batches(opened, plain_server, batch):
    sampler = opened(plain_server)
    with pytest.raises(ConfigError, match="row 40: its prompt is empty"):
        draw(sampler, batch._replace(prompt_length_b=np.zeros(8, np.int32)))
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        draw(sampler, batch, limit=0)


def test_without_the_client_package(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError) as caught:
        opened("http://127.0.0.1:9")
    assert 'pip install "kdjax[engine]"' in said(caught)


def test_the_key_of_the_environment(opened, core, batch, monkeypatch):
    """OPENAI_API_KEY is the bearer; none is needed."""
    with serving(lambda body: vllm(core(body), body)) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        draw(opened(server), take(batch, [1]))
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        draw(opened(server), take(batch, [1]))
    assert [h["authorization"] for h in server.headers] == ["Bearer none", "Bearer secret"]


def test_inside_a_running_loop(opened, plain_server, batch):
    """In a notebook a loop runs already."""

    async def cell():
        return draw(opened(plain_server), take(batch, [1]))

    np.testing.assert_array_equal(
        asyncio.run(cell()).tokens_bt, draw(opened(plain_server), take(batch, [1])).tokens_bt
    )


def test_exit_code_is_documented():
    from kdjax.__main__ import HELP

    assert issubclass(EngineError, KdjaxError)
    assert f"{EngineError.exit_code} an inference engine failed" in HELP
