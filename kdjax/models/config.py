"""The numbers that shape a decoder, read strictly from a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from kdjax.base import DataError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes of a Qwen3 decoder, under Hugging Face's names."""

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


SUPPORTED = ("Qwen3ForCausalLM",)


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder. Errors: DataError naming what is missing or not supported."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder}: no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
    return from_fields(fields, str(path))


def from_fields(fields: dict[str, Any], where: str) -> DecoderConfig:
    """A config from parsed JSON; what would be computed differently here is refused."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object was expected")
    architecture = (fields.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        raise DataError(
            f"{where}: architecture {architecture} is not supported;"
            f" supported: {', '.join(SUPPORTED)}"
        )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    refused = {
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(fields.get("attention_bias")),
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "quantization_config": bool(fields.get("quantization_config")),
    }
    bad = [f"{name}={fields.get(name, rope)!r}" for name, wrong in refused.items() if wrong]
    if bad:
        raise DataError(f"{where}: not supported for {architecture}: {', '.join(bad)}")
    fields = {
        "rope_theta": rope.get("rope_theta", 1e4),  # transformers' defaults, not this class's
        "tie_word_embeddings": False,
        "head_dim": _default_head_dim(fields),
        **fields,
    }
    names = {f.name for f in dataclasses.fields(DecoderConfig)}
    needed = {f.name for f in dataclasses.fields(DecoderConfig) if f.default is dataclasses.MISSING}
    missing = sorted(name for name in needed if not isinstance(fields.get(name), int))
    if missing:
        raise DataError(f"{where}: missing or not a whole number: {', '.join(missing)}")
    config = DecoderConfig(**{name: fields[name] for name in names if name in fields})
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DataError(f"{where}: heads must be a multiple of key/value heads, and head_dim even")
    return config


def _default_head_dim(fields: dict[str, Any]) -> int | None:
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def parameter_count(config: DecoderConfig) -> int:
    """Parameters of the decoder's layers and norms, without embedding and head.

    >>> parameter_count(DecoderConfig(10, 4, 8, 1, 2, 1, 2))
    160
    """
    d, q, k = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = d * config.head_dim * (2 * q + 2 * k) + 2 * config.head_dim
    return config.num_hidden_layers * (attention + 3 * d * config.intermediate_size + 2 * d) + d
