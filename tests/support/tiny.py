"""Tiny models, random rollouts and prompts that the tests share."""

from __future__ import annotations

import functools
import importlib.util

import jax
import numpy as np

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
NO_MATH_VERIFY = "LEFT OUT: symbolic answers (math-verify is not installed: extra math)"


def tiny_config(vocab_size: int, **changes):
    from kdjax.models import DecoderConfig
    from kdjax.models.hf.families import FAMILIES

    shape = dict(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    fixed = FAMILIES[changes.get("model_type", "qwen3")].fixed
    return DecoderConfig(**{**shape, **fixed, **changes})


def lively(params, seed: int = 0, unit_offset: bool = False):
    """The same shapes with random weights so large that every layer and norm matters.

    Logits then spread over a few units; fresh weights of deviation 0.02 hide faults. Factors of
    norms are near 1, those that are 1 + weight (unit_offset), too: near 2 they multiply scores by
    4, and both float32, here and in torch, are 3e-4 from float64 in the logits of Gemma 3.

    Delta-nets divide by the lengths of queries, keys and what is read of the state, which are small
    at some tokens. Their projections are calmer: as large as others, both float32 are 2e-4 from
    float64. Their states fade by 0.5 to 20 % a token, so that they hold more than a few.
    """
    rng = np.random.default_rng(seed)

    def redraw(path, weight):
        names, shape = [p.key for p in path], weight.shape
        normal = rng.normal(size=shape)
        if names[-1] in ("scale", "norm"):
            gated = names[-2:] == ["norm", "scale"]  # a delta-net's own
            return jax.numpy.float32(float(gated or not unit_offset) + 0.3 * normal)
        if names[-1] == "log_rate":
            return jax.numpy.float32(-3 + normal)
        deviation = 1.5 * shape[-2] ** -0.5 if names[-1] == "kernel" else 0.7
        calm = 0.5 if names[-2:-1] in (["in_proj_qkv"], ["out_proj"]) else 1
        return jax.numpy.float32(calm * deviation * normal)

    return jax.tree_util.tree_map_with_path(redraw, params)


def random_prompts(vocabulary: int, lengths: list[int], rows: list[int]):
    """A Batch of random prompts of these lengths, right-padded, without worked responses."""
    from kdjax.base import Batch

    rng, count = np.random.default_rng(0), len(lengths)
    prompt = np.zeros((count, max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        prompt[row, :length] = rng.integers(0, vocabulary, length)
    none = np.zeros(count, np.int32)
    return Batch(
        prompt, np.array(lengths, np.int32), none[:, None], none, none > 0, np.array(rows, np.int32)
    )


def extended(model, params, tokens_bt, slots: int, start_b=None):
    """Hidden states [B, T, D] of tokens that are written one after the other, from slot 0 on."""
    from kdjax.models import unstacked

    tokens = jax.numpy.asarray(tokens_bt)
    start = jax.numpy.zeros(len(tokens), "int32") if start_b is None else jax.numpy.asarray(start_b)

    def write(cache, slot):
        state, cache = model.extend(unstacked(params), tokens[:, slot], cache, slot, start)
        return cache, state

    empty, slots_used = model.init_cache(len(tokens), slots), jax.numpy.arange(tokens.shape[1])
    return jax.lax.scan(write, empty, slots_used)[1].swapaxes(0, 1)


def random_rollout(
    seed: int,
    vocab_size: int,
    prompt_lengths,
    response_lengths,
    *,
    prompt_width: int | None = None,
    response_width: int | None = None,
):
    """A Rollout laid out row by row by NumPy alone; no real token is the padding id 0."""
    from kdjax.base import Rollout

    rng = np.random.default_rng(seed)
    response_width = response_width or max(response_lengths)
    width = (prompt_width or max(prompt_lengths)) + response_width
    tokens = np.zeros((len(prompt_lengths), width), np.int32)
    logp = np.zeros((len(prompt_lengths), response_width), np.float32)
    for row, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        tokens[row, : prompt + response] = rng.integers(1, vocab_size, prompt + response)
        logp[row, :response] = -rng.random(response)
    return Rollout(
        tokens_bs=tokens,
        prompt_length_b=np.array(prompt_lengths, np.int32),
        response_length_b=np.array(response_lengths, np.int32),
        sampler_logp_bt=logp,
        truncated_b=np.zeros(len(prompt_lengths), bool),
    )


def one_layer(vocab_size: int, seed: int):
    """(Model, lively parameters) of a decoder of one layer: attention at half the compile time."""
    from kdjax.models.decoder import build
    from kdjax.models.parameters import init_params

    config = tiny_config(vocab_size, num_hidden_layers=1)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return build(config), lively(shapes, seed)


@functools.cache  # one Model, so that programs compiled for it are reused
def bigram():
    """A Model whose next token depends on the last one alone: easy to work out by hand."""
    from kdjax.base import Model
    from kdjax.numerics import LMHead

    return Model(
        config=None,
        hidden=lambda params, tokens_bs: params["embed"][tokens_bs],
        head=lambda params: LMHead(params["head"]),
        init_cache=None,
        prefill=None,
        extend=None,
    )


def bigram_params(seed: int, vocab_size: int, width: int = 4):
    """Random parameters of a bigram model, logits spread over a few units."""
    rng = np.random.default_rng(seed)
    return {
        name: jax.numpy.float32(rng.normal(size=(vocab_size, width))) for name in ("embed", "head")
    }
