"""Model FLOPs of real tokens, by formula: a multiply and an add are two; padding is not counted."""

from __future__ import annotations

from kdjax.models.config import DecoderConfig, parameter_count


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


def sampling(
    config: DecoderConfig, prompt_tokens: float, new_tokens: float, mean_length: float
) -> float:
    """FLOPs to prefill the prompts and decode `new_tokens` tokens."""
    return forward(config, prompt_tokens + new_tokens, mean_length) + head(config, new_tokens)


def training(
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    prompt_tokens: float,
    new_tokens: float,
    mean_length: float,
    adapter_parameters: int | None = None,
) -> float:
    """FLOPs of scoring and gradient: the student counts three times (forward, backward), the
    teacher once.

    With an adapter of so many parameters the student's own have no gradient, and its own count 6 a
    token.
    """
    tokens = prompt_tokens + new_tokens
    total = 3 * (forward(student, tokens, mean_length) + head(student, new_tokens))
    if adapter_parameters is not None:
        total += tokens * (6 * adapter_parameters - 2 * parameter_count(student, active=True))
        total -= head(student, new_tokens)
    return (
        total
        if teacher is None
        else total + forward(teacher, tokens, mean_length) + head(teacher, new_tokens)
    )
