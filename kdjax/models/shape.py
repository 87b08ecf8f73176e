"""The shape of a decoder: the numbers and options that its functions are made from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (models/rope.py)."""

    rope_type: str  # linear, llama3 or yarn
    factor: float
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and options of a decoder, under Hugging Face's names.

    qk_norm, qkv_bias and output_bias are what transformers' classes imply by family or
    attention_bias; sliding_window holds for every layer; num_experts 0 is a dense MLP.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960
    model_type: str = "qwen3"
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False


def context_tokens(config: DecoderConfig) -> int:
    """The most tokens that a decoder was made for, its rotary frequencies stretched.

    >>> context_tokens(DecoderConfig(10, 4, 8, 1, 2, 1, 2, max_position_embeddings=2048))
    2048
    """
    scaling = config.rope_scaling
    stretched = scaling.factor * scaling.original_max_position_embeddings if scaling else 0
    return max(config.max_position_embeddings, int(stretched))


def parameter_count(config: DecoderConfig, active: bool = False) -> int:
    """Parameters of the decoder's layers and norms, without embedding and head.

    `active` counts only the experts that a token passes through.

    >>> parameter_count(DecoderConfig(10, 4, 8, 1, 2, 1, 2))
    160
    """
    d, h = config.hidden_size, config.head_dim
    q, k = config.num_attention_heads * h, config.num_key_value_heads * h
    attention = d * (2 * q + 2 * k) + 2 * h * config.qk_norm
    attention += (q + 2 * k) * config.qkv_bias + d * config.output_bias
    mlp = 3 * d * config.intermediate_size
    if config.num_experts:
        experts = config.num_experts_per_tok if active else config.num_experts
        mlp = d * config.num_experts + 3 * d * config.moe_intermediate_size * experts
    return config.num_hidden_layers * (attention + mlp + 2 * d) + d
