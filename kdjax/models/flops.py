"""Model FLOPs of real tokens, by formula: a multiply and an add are two; padding is not counted."""

from __future__ import annotations

from kdjax.models.shape import DecoderConfig, parameter_count


def forward(config: DecoderConfig, tokens: float, mean_length: float) -> float:
    """FLOPs to read `tokens` tokens in sequences of `mean_length`, without the head.

    2 n a token for the n parameters of the layers that it passes through (of experts, the chosen),
    and 2 length heads head_dim layers for attention (scores and values, half of the square seen).
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
    """FLOPs of responses to prompts, read or drawn: the layers of all tokens, the head of the new.

    Drawn, the prompts are prefilled and the new tokens decoded, each with a cache; the products are
    the same.
    """
    return forward(config, prompt_tokens + new_tokens, mean_length) + head(config, new_tokens)


def student(
    config: DecoderConfig,
    prompt_tokens: float,
    new_tokens: float,
    mean_length: float,
    adapter_parameters: int = 0,
) -> tuple[float, float]:
    """(FLOPs forward, FLOPs backward) of a training step; backward counts twice as much.

    An adapter of so many parameters costs 2 a token forward and 4 backward, and the student's own
    then have no gradient: 2 n a token and the head's own gradient are left out.
    """
    own = response(config, prompt_tokens, new_tokens, mean_length)
    if not adapter_parameters:
        return own, 2 * own
    tokens = prompt_tokens + new_tokens
    adapter = 2 * tokens * adapter_parameters
    without = 2 * tokens * parameter_count(config, active=True) + head(config, new_tokens)
    return own + adapter, 2 * own + 2 * adapter - without
