"""FLOPs against a count by hand of every matrix product of one tiny decoder."""

from __future__ import annotations

from tiny import tiny_config

from kdjax.models import flops
from kdjax.models.shape import DecoderConfig

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
