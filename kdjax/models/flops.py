"""Model FLOPs by formula: a multiply and an add count as two, padding is not counted."""

from __future__ import annotations

from kdjax.models.parameters import parameter_count
from kdjax.models.shape import DecoderConfig


def forward(config: DecoderConfig, tokens: float, mean_length: float) -> float:
    """FLOPs of a forward pass over `tokens` tokens in sequences of `mean_length`, without the head.

    2 n a token for the n parameters of the layers (of experts, the chosen ones), and
    2 length heads head_dim layers for attention (scores and values over half of the square).
    """
    attention = (
        2 * mean_length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    )
    return tokens * (2 * parameter_count(config, active=True) + attention)


def head(config: DecoderConfig, tokens: float) -> float:
    """FLOPs of the LM head on `tokens` tokens."""
    return 2.0 * tokens * config.vocab_size * config.hidden_size


def response(
    config: DecoderConfig, prompt_tokens: float, new_tokens: float, mean_length: float
) -> float:
    """FLOPs of responses to prompts: the layers on all tokens, the head on the new ones. The same
    whether they are read, or drawn with a cache (prefill and decoding)."""
    return forward(config, prompt_tokens + new_tokens, mean_length) + head(config, new_tokens)


def student(
    config: DecoderConfig,
    prompt_tokens: float,
    new_tokens: float,
    mean_length: float,
    adapter_parameters: int = 0,
) -> tuple[float, float]:
    """(FLOPs forward, FLOPs backward) of an update; backward counts twice as much.

    An adapter costs 2 a parameter and token forward and 4 backward; the student's own parameters
    then have no gradient, so 2 n a token and the head's gradient are left out.

    Args:
        config: the student's shapes.
        prompt_tokens, new_tokens: of all rows together.
        mean_length: tokens of a row.
        adapter_parameters: 0 without an adapter.
    """
    own = response(config, prompt_tokens, new_tokens, mean_length)
    if not adapter_parameters:
        return own, 2 * own
    tokens = prompt_tokens + new_tokens
    adapter = 2 * tokens * adapter_parameters
    without = 2 * tokens * parameter_count(config, active=True) + head(config, new_tokens)
    return own + adapter, 2 * own + 2 * adapter - without
