"""Model FLOPs by formula: a multiply and an add count as two, padding is not counted."""

from __future__ import annotations

from kdjax.models.parameters import parameter_count
from kdjax.models.shape import LINEAR, DecoderConfig, LayerKind, layer_kinds


def forward(config: DecoderConfig, tokens: float, mean_length: float) -> float:
    """FLOPs of a forward pass over `tokens` tokens in sequences of `mean_length`, without the head.

    2 n a token for the n parameters of the layers (of experts, the chosen ones), and what each
    layer's positions read of each other (`mixing`).
    """
    mixed = sum(mixing(config, kind, mean_length) for kind in layer_kinds(config))
    return tokens * (2 * parameter_count(config, active=True) + mixed)


def mixing(config: DecoderConfig, kind: LayerKind, length: float) -> float:
    """FLOPs a token of what a layer's positions read of each other in rows of `length`, without its
    projections.

    Attention: 4 heads head_dim for each position that is seen, its score and its value; in the mean
    over a row those are length / 2, and of a shorter window w at most it: w - w^2 / (2 length).

    Linear attention: 6 heads Dk Dv at any length, as a state is read for a key, corrected, and read
    for a query. Chunks of C positions (models/layers/delta_rule.py) take more, which is not
    counted, like what is computed again for a backward pass: C (2 Dk + 4 Dv) + 4 C^2 log2 C a value
    head, 4 C Dk a key head.

    >>> from kdjax.models.shape import FULL
    >>> mixing(DecoderConfig(10, 4, 8, 1, 2, 1, 2), LayerKind(FULL, window=3), 9.0)
    40.0
    """
    if kind.mixer == LINEAR:
        state = config.linear_key_head_dim * config.linear_value_head_dim
        return 6.0 * config.linear_num_value_heads * state
    window = length if kind.window is None else min(kind.window, length)
    seen = window - window**2 / (2 * length) if length else 0.0
    return 4 * config.num_attention_heads * config.head_dim * seen


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
