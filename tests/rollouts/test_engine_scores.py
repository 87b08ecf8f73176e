"""A teacher behind a real server, in vLLM's and SGLang's words, is our own teacher's top k; what
does not add up is one line."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from serving import CONTEXT, Reply, score_core, serving, sglang_scores, vllm_scores
from tiny import lively

from kdjax.base import Rollout, TeacherRows
from kdjax.errors import ConfigError, EngineError
from kdjax.losses.topk import TAIL_FLOOR
from kdjax.rollouts.engine_scores import open_scorer
from kdjax.step.score import HeadPlan, response_top_k

K, WIDTH = 5, 12
DIALECTS = {"vllm": vllm_scores, "sglang": sglang_scores}


@pytest.fixture(scope="module")
def decoder(teacher):
    model, params = teacher
    return model, lively(params)


@pytest.fixture(scope="module")
def core(decoder, tokenizer):
    return score_core(*decoder, tokenizer.size)


@pytest.fixture(scope="module")
def rollout(tokenizer, core) -> Rollout:
    """Six rows of every kind: one without a response, one that fills its width with tokens of
    which half are the teacher's second best."""
    rng = np.random.default_rng(3)
    prompts, counts = np.array([3, 8, 1, 4, 5, 2]), np.array([5, WIDTH, 1, 0, 7, 2])
    tokens = rng.integers(1, tokenizer.size, (6, 8 + WIDTH))
    tokens[np.arange(8 + WIDTH)[None] >= (prompts + counts)[:, None]] = 0
    for at in range(8, 8 + WIDTH, 2):
        tokens[1, at] = np.argsort(-core(tokens[1, :at].tolist())[-1])[1]
    return Rollout(
        tokens.astype(np.int32), prompts.astype(np.int32), counts.astype(np.int32),
        np.zeros((6, WIDTH), np.float32), counts == WIDTH,
    )  # fmt: skip


@pytest.fixture
def opened(tokenizer):
    def call(server, **changes):
        url = server if isinstance(server, str) else server.url
        known = dict(k=K, vocabulary=tokenizer.size, retries=0, timeout_s=20)
        return open_scorer(url, "tiny", **{**known, **changes})

    return call


def served(core, speaks: str):
    def answer(body):
        return DIALECTS[speaks](core, body)

    return serving(answer, others={"/generate": answer})


def mask_of(rollout: Rollout) -> np.ndarray:
    return np.arange(WIDTH)[None] < rollout.response_length_b[:, None]


def said(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("speaks", DIALECTS)
def test_scores_are_the_own_teachers(opened, core, decoder, tokenizer, rollout, speaks):
    """Ids, log-probabilities, the sampled token's and the tail's of our own pass, zeros beyond a
    response, whatever the order of the answers."""
    with served(core, speaks) as server:
        found = opened(server, speaks=speaks, at_once=3)(rollout)
        assert max(server.in_flight) <= 3
        assert len(server.asked) == 5  # a row without a response costs nothing
    plan = HeadPlan(vocabulary=tokenizer.size)
    own = response_top_k(*decoder, rollout, k=K, plan=plan)
    mask = mask_of(rollout)
    np.testing.assert_array_equal(found.ids, own.ids)
    for name in ("logp", "sampled_logp"):
        np.testing.assert_allclose(getattr(found, name), getattr(own, name), atol=1e-5)
    np.testing.assert_allclose(found.tail_logp[mask], own.tail_logp[mask], atol=1e-3)
    inside = (found.ids == _targets(rollout)[..., None])[mask].any(-1)
    assert 0 < inside.sum() < len(inside)  # the sampled token is among the k, and is not
    for each in jax.tree.leaves(found):
        assert each.dtype in (np.int32, np.float32)
        assert not each[~mask].any()


def test_a_teacher_with_rows_of_its_own(opened, core, rollout):
    """Another prompt before the same response: the engine reads that one; a response that is not
    there token by token is refused."""
    lengths, counts = rollout.prompt_length_b, rollout.response_length_b
    whole = np.zeros((6, 3 + 8 + WIDTH), np.int32)
    whole[:, :3] = [[7, 8, 9]]
    whole[:, 3:] = rollout.tokens_bs
    slots = 2 + lengths[:, None] + np.arange(WIDTH)[None]
    slots = np.where(mask_of(rollout), slots, -1)
    private = rollout._replace(teacher_rows=TeacherRows(whole, slots.astype(np.int32)))
    longer = Rollout(whole, lengths + 3, counts, *rollout[3:5])
    with served(core, "vllm") as server:
        score = opened(server)
        found, wanted, plain = score(private), score(longer), score(rollout)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert np.abs(found.logp - plain.logp).max() > 1e-3
        slots[0, 1] = -1
        with pytest.raises(ConfigError, match="one after the other"):
            score(rollout._replace(teacher_rows=TeacherRows(whole, slots)))


def _targets(rollout: Rollout) -> np.ndarray:
    at = rollout.prompt_length_b[:, None] + np.arange(WIDTH)[None]
    return np.take_along_axis(rollout.tokens_bs, at, axis=1)


def test_what_is_asked(opened, core, rollout):
    """Ids alone, one token, greedily: no seed, and none of the engine's own settings matter."""
    for speaks in DIALECTS:
        with served(core, speaks) as server:
            opened(server, speaks=speaks)(jax.tree.map(lambda x: x[:1], rollout))
        ids = rollout.tokens_bs[0, :8].tolist()
        wanted = {
            "vllm": {
                "model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0,
                "prompt_logprobs": K,
            },
            "sglang": {
                "input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": K,
            },
        }[speaks]  # fmt: skip
        assert server.asked == [wanted]


ONE = Rollout(
    np.int32([[1, 2, 3]]), np.int32([1]), np.int32([2]), np.zeros((1, 2), np.float32), np.bool_([0])
)


def answering(*places: dict[int, float]):
    """An answer of vLLM with these log-probabilities of ids at the tokens 2 and 3."""
    named = [{str(i): {"logprob": value} for i, value in place.items()} for place in places]
    return {"choices": [{"prompt_logprobs": [None, *named]}]}


def test_the_tail_by_hand(opened):
    """1 - sum(p) in float64, where float32 would round it, at least the floor; all of the
    vocabulary leaves none."""
    sure = {2: -1e-9, 4: -30.0}
    unsure = {4: math.log(0.5), 5: math.log(0.3), 3: math.log(0.1)}  # 3 is not of the best two
    with serving(lambda body: answering(sure, unsure)) as server:
        found = opened(server, k=2)(ONE)
    assert found.ids.tolist() == [[[2, 4], [4, 5]]]
    np.testing.assert_allclose(found.sampled_logp, [[-1e-9, math.log(0.1)]], rtol=1e-6)
    np.testing.assert_allclose(found.tail_logp, [[math.log(TAIL_FLOOR), math.log(0.2)]], rtol=1e-6)
    near = {2: math.log(1 - 3e-6), 4: math.log(1e-6)}
    with serving(lambda body: answering(near, near | {3: -20.0})) as server:
        found = opened(server, k=2)(ONE)
    np.testing.assert_allclose(np.exp(np.float64(found.tail_logp)), 2e-6, rtol=1e-4)
    every = {2: math.log(0.75), 3: math.log(0.25)}
    with serving(lambda body: answering(every, every)) as server:
        found = opened(server, k=2, vocabulary=4)(ONE)
        assert np.isfinite(found.tail_logp).all()
    shifted = ONE._replace(tokens_bs=np.int32([[1, 0, 1]]))
    every = {0: math.log(0.75), 1: math.log(0.25)}
    with serving(lambda body: answering(every, every)) as server:
        assert np.isneginf(opened(server, k=2, vocabulary=2)(shifted).tail_logp).all()


GOOD = {2: -0.5, 3: -1.5, 4: -2.0}
CASES = {
    "no JSON": ("<html>", "it answered no JSON: '<html>'"),
    "no completion": ({"x": 1}, "it answered no completion"),
    "unknown words": ({"choices": [{}]}, "it gave prompt_logprobs of none tokens for 3"),
    "another prompt": (answering(GOOD), "it gave prompt_logprobs of 2 tokens for 3"),
    "not itself": (answering({4: -0.5, 5: -1.0, 6: -2.0}, GOOD), "no log-probability of token 2"),
    "null": ({"choices": [{"prompt_logprobs": [None, None, None]}]}, "probability of token 2"),
    "too few": (answering({2: -0.5}, GOOD), "it named 1 tokens where 2 were asked for"),
    "too many": (answering(GOOD | {5: -3.0}, GOOD), "it named 3 tokens where 2 were asked for"),
    "another vocabulary": (answering({2: -0.5, 4000: -1.0}, GOOD), "token id 4000 is among"),
    "NaN": (answering({2: float("nan"), 3: -1.0}, GOOD), "nan is no log-probability"),
    "a word": (answering({2: "-0.5", 3: "-1.0"}, GOOD), "' is no log-probability"),
    "minus infinity": (answering({4: -0.5, 3: -1.0, 2: -9999.0}, GOOD), "-9999.0 is no log-prob"),
    "logits": (answering({2: -0.1, 3: -0.2}, GOOD), "more than all probability"),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_that_do_not_add_up(opened, case):
    """Each is one line, naming the row."""
    body, says = CASES[case]
    with serving(lambda _: body) as server, pytest.raises(EngineError) as caught:
        opened(server, k=2)(ONE)
    assert said(caught).startswith(f"engine at {server.url}, scoring row 0: ")
    assert says in said(caught)


def place(value=-0.5, token=2):
    return [value, token, None]


SGLANG_CASES = {
    "no JSON": ("<html>", "no JSON"),
    "none": ({"meta_info": {}}, "it gave no input_top_logprobs of 2 tokens"),
    "other tokens": (
        {"meta_info": {
            "input_token_logprobs": [place(None), place(), place()],
            "input_top_logprobs": [None, [place(), place(-2.0, 3)], [place(), place(-2.0, 3)]],
        }},
        "it read token 2 where 3 was sent",
    ),
    "too few": (
        {"meta_info": {"input_token_logprobs": [place()], "input_top_logprobs": [None]}},
        "it said 0 and 0 tokens for 2",
    ),
    "null": (
        {"meta_info": {
            "input_token_logprobs": [place(None), place(), place(-1.0, 3)],
            "input_top_logprobs": [None, None, [place(), place(-2.0, 3)]],
        }},
        "it gave no input_top_logprobs of 2 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SGLANG_CASES)
def test_answers_of_sglang_that_do_not_add_up(opened, case):
    body, says = SGLANG_CASES[case]
    speaking = serving(dict, others={"/generate": lambda _: body})
    with speaking as server, pytest.raises(EngineError) as caught:
        opened(server, k=2, speaks="sglang")(ONE)
    assert says in said(caught)


def test_it_is_tried_again(opened):
    """A 503 is asked again; a 400 says the engine's own reason at once; a silent one its limit."""
    tries = []

    def flaky(body):
        tries.append(body)
        return answering(GOOD, GOOD) if len(tries) == 2 else Reply({}, 503)

    with serving(flaky) as server:
        assert np.shape(opened(server, k=2, retries=1)(ONE).ids) == (1, 2, 2)
    refusal = Reply({"error": {"message": "greater than max allowed: 20"}}, 400)
    with serving(lambda body: refusal) as server, pytest.raises(EngineError) as caught:
        opened(server, k=2, retries=3)(ONE)
    assert "greater than max allowed: 20" in said(caught)
    assert len(server.asked) == 1
    slow = Reply(answering(GOOD, GOOD), delay_s=2)
    with serving(lambda body: slow) as server, pytest.raises(EngineError) as caught:
        opened(server, k=2, timeout_s=0.2)(ONE)
    assert "no answer within 0.2 s, tried 1 times" in said(caught)


def test_wrong_arguments(opened, rollout, tokenizer):
    """Before a row is scored, with the remedy."""
    with serving(json.loads) as server:
        for changes, says in (
            (dict(k=0), f"k must be in 1..{tokenizer.size}"),
            (dict(at_once=0), "open_scorer: at_once must be at least 1, got 0"),
            (dict(longest=CONTEXT + 1), f"pass the engine's context of {CONTEXT}"),
        ):
            with pytest.raises(ConfigError) as caught:
                opened(server, **changes)
            assert says in said(caught)
        empty = rollout._replace(prompt_length_b=np.zeros(6, np.int32))
        with pytest.raises(ConfigError, match="a prompt is empty"):
            opened(server)(empty)
    assert not server.asked
