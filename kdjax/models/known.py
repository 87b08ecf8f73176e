"""Shapes of released checkpoints, so that a run can be planned before a weight is downloaded."""

from __future__ import annotations

from typing import NamedTuple

from kdjax.models.shape import DecoderConfig


class Known(NamedTuple):
    """A checkpoint's shapes, the ids that end its responses, and its tokenizer's size."""

    config: DecoderConfig
    stop_ids: tuple[int, ...]
    tokens: int


def _qwen3(width: int, inner: int, layers: int, heads: int, *, tied: bool, chat: bool) -> Known:
    config = DecoderConfig(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960 if chat else 32_768,
    )
    return Known(config, (151_645, 151_643) if chat else (151_643,), 151_669)


KNOWN = {
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16, tied=True, chat=False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True, chat=True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, tied=True, chat=False),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True, chat=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True, chat=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, 32, tied=False, chat=True),
}
"""From the config.json, generation_config.json and tokenizer of each, as published."""
