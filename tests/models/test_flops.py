"""FLOPs against a count by hand of every matrix product of one tiny decoder."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from release import by_default
from shapes import SHAPES
from tiny import tiny_config

from kdjax import models
from kdjax.models import flops
from kdjax.models.shape import FULL, LINEAR, SLIDING, DecoderConfig, LayerKind, layer_kinds

TINY = DecoderConfig(
    vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=2,
)  # fmt: skip
WIDE = DecoderConfig(
    vocab_size=10, hidden_size=6, intermediate_size=12, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=4,
)  # fmt: skip


def test_forward_by_hand():
    """Twice the products of each layer's matrices, the norms' weights, and half of the square."""
    queries, keys, values, output = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    gated_mlp = 4 * 8 + 4 * 8 + 8 * 4
    norms = 4 + 4 + 2 + 2
    weights = 2 * (queries + keys + values + output + gated_mlp + norms) + 4
    tokens, length = 30, 6
    scores_and_values = 2 * 2 * (length / 2) * (2 * 2) * 2
    assert flops.forward(TINY, tokens, length) == tokens * (2 * weights + scores_and_values)


def test_forward_is_linear_in_tokens_and_in_length():
    """Twice the tokens cost twice; attention alone grows with the length."""
    one = flops.forward(TINY, 10, 8)
    assert flops.forward(TINY, 20, 8) == 2 * one
    assert flops.forward(TINY, 10, 16) - one == one - flops.forward(TINY, 10, 0)
    assert flops.forward(TINY, 10, 16) > one


def test_head_and_response():
    """The head is read for new tokens alone; prompt and response pass the layers once."""
    assert flops.head(TINY, 5) == 5 * 2 * 10 * 4
    assert flops.response(TINY, 7, 5, 6) == flops.forward(TINY, 12, 6) + flops.head(TINY, 5)


def test_the_student_s_backward_counts_twice():
    """Each product of the forward pass has two in the backward pass."""
    forward, backward = flops.student(TINY, 7, 5, 6)
    assert forward == flops.response(TINY, 7, 5, 6)
    assert backward == 2 * forward


def test_of_experts_the_chosen_count():
    """A mixture of 8 experts with 2 a token costs what a dense MLP of their width does, and the
    router's 2 d 8."""
    moe = tiny_config(
        40, model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
    )
    dense = tiny_config(40, intermediate_size=32)
    router = 2 * moe.num_hidden_layers * moe.hidden_size * 8
    assert flops.forward(moe, 3.0, 5.0) == flops.forward(dense, 3.0, 5.0) + 3 * router


@pytest.mark.parametrize(("window", "length"), [(4, 30), (30, 30), (40, 30), (1, 30)])
def test_a_window_counts_what_its_positions_see(window, length):
    """At most the window: the count of seen pairs is the formula's, which leaves out half of a
    position's own pair."""
    pairs = sum(min(at + 1, window) for at in range(length))
    own = 0.5 * length if window > length else 0.5 * window
    counted = 4 * 2 * 2 * (pairs - own) / length
    found = flops.mixing(TINY, LayerKind(SLIDING, window), length)
    assert found == pytest.approx(counted)
    assert found <= 4 * 2 * 2 * window
    assert flops.mixing(TINY, LayerKind(FULL), length) >= found


CHUNK, WIDTH = 64, 64
UNROLLED = {  # XLA counts a loop once
    "qwen3, biases, linear rope, window": {}, "qwen2, tied, yarn": {}, "mistral, window": {},
    "smollm3, every fourth without rope, biases": {
        "num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0),
    },
    "olmo3, three windows and a full layer, yarn": {},
    "gemma3, five windows and a full layer": {
        "num_hidden_layers": 6, "layer_types": (*("sliding_attention",) * 4, "full_attention",
        "sliding_attention"),
    },
    "qwen3_5, three delta-nets and a gated full layer": {
        "linear_key_head_dim": WIDTH, "linear_value_head_dim": WIDTH,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", by_default(UNROLLED, *list(UNROLLED)[-2:]))
def test_xla_counts_as_many(family):
    """XLA's own count of a compiled forward pass of a row of 64 is at most 3 % above the formula's,
    once that has what it leaves out: scores that the mask hides, and the terms of chunks."""
    wide = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
    config = tiny_config(40, **{**SHAPES[family], **UNROLLED[family], **wide})
    params = models.abstract_params(config, jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    program = jax.jit(models.build(config).hidden).lower(params, tokens).compile()
    wanted = flops.forward(config, CHUNK, CHUNK)
    for kind in layer_kinds(config):
        if kind.mixer == LINEAR:
            value_head = CHUNK * 6 * WIDTH + 4 * CHUNK**2 * math.log2(CHUNK)
            chunks = config.linear_num_value_heads * value_head
            wanted += CHUNK * (chunks + config.linear_num_key_heads * 4 * CHUNK * WIDTH)
        else:
            square = 4 * CHUNK * config.num_attention_heads * config.head_dim
            wanted += CHUNK * (square - flops.mixing(config, kind, CHUNK))
    assert wanted < program.cost_analysis()["flops"] < 1.03 * wanted


def test_linear_attention_by_hand():
    """Six products of a state, as often as there are value heads, at any length."""
    config = tiny_config(40, **SHAPES["qwen3_5, three delta-nets and a gated full layer"])
    assert flops.mixing(config, LayerKind(LINEAR), 7) == 6 * 4 * 6 * 10
    longer = flops.forward(config, 1.0, 20.0) - flops.forward(config, 1.0, 10.0)
    assert longer == pytest.approx(2 * 10 * 4 * 8)  # of its one full layer
