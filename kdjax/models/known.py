"""Shapes of released checkpoints, so that a run can be planned before a weight is downloaded."""

from __future__ import annotations

from typing import NamedTuple

from kdjax.models.hf.config import from_fields
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


def _qwen3_5(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, value_heads: int, *, chat: bool
) -> Known:
    """The text part of a checkpoint that reads images, too."""
    fields = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "vocab_size": 248_320,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": value_heads,
        "rope_theta": 1e7,
        "tie_word_embeddings": True,
        "max_position_embeddings": 262_144,
    }
    stops = (248_046, 248_044) if chat else (248_044,)
    return Known(from_fields(fields, "known"), stops, 248_077)


def _gemma3(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, *, large: bool, chat: bool
) -> Known:
    """Of the large ones, which read images, too, the text part."""
    fields = {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262_208 if large else 262_144,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": 1024 if large else 512,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0} if large else None,
        "max_position_embeddings": 131_072 if large else 32_768,
    }
    return Known(from_fields(fields, "known"), (1, 106) if chat else (1,), 262_144)


KNOWN = {
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16, tied=True, chat=False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True, chat=True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, tied=True, chat=False),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True, chat=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True, chat=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, 32, tied=False, chat=True),
    "Qwen/Qwen3.5-0.8B-Base": _qwen3_5(1024, 3584, 24, 8, 2, 16, chat=False),
    "Qwen/Qwen3.5-0.8B": _qwen3_5(1024, 3584, 24, 8, 2, 16, chat=True),
    "Qwen/Qwen3.5-4B": _qwen3_5(2560, 9216, 32, 16, 4, 32, chat=True),
    "google/gemma-3-1b-pt": _gemma3(1152, 6912, 26, 4, 1, large=False, chat=False),
    "google/gemma-3-1b-it": _gemma3(1152, 6912, 26, 4, 1, large=False, chat=True),
    "google/gemma-3-4b-it": _gemma3(2560, 10_240, 34, 8, 4, large=True, chat=True),
}
"""From the config.json, generation_config.json and tokenizer of each, as published; of Qwen3.5 and
Gemma 3 as other projects' sources transcribe them."""
