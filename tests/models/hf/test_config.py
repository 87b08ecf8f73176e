"""config.json as transformers reads it: of released checkpoints, and as written of every shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from released import RELEASED
from shapes import SHAPES
from tiny import tiny_config

from kdjax.models.hf.config import from_fields, to_fields
from kdjax.models.shape import FULL, LINEAR, SLIDING, DecoderConfig, Rope, layer_kinds


def theirs(fields: dict[str, Any], folder) -> Any:
    """The config object of a text model that transformers makes of a config.json."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(fields))
    return AutoConfig.from_pretrained(folder).get_text_config()


def read(config: DecoderConfig) -> dict[str, Any]:
    """What a decoder computes, under names of our own."""
    kinds = layer_kinds(config)
    return {
        "kinds": [kind.mixer for kind in kinds],
        "windows": [kind.window for kind in kinds],
        "rope": [kind.rope and turning(kind.rope) for kind in kinds],
        "heads": (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        "scale": config.query_pre_attn_scalar or config.head_dim,
        "sizes": (config.vocab_size, config.hidden_size, config.intermediate_size),
        "epsilon": config.rms_norm_eps,
        "activation": config.hidden_act,
        "tied": config.tie_word_embeddings,
        "context": config.max_position_embeddings,
        "biases": (config.qkv_bias, config.output_bias, config.mlp_bias),
        "linear": [getattr(config, name) for name in LINEAR_SIZES] if LINEAR in str(kinds) else [],
        "experts": (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size),
    }


LINEAR_SIZES = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip


def turning(rope: Rope) -> tuple:
    """(theta, entries of a head that turn, the kind of scaling, its factor and context)."""
    scaling = rope.scaling
    if scaling is None:
        return rope.theta, rope.width, "default"
    context = None if scaling.rope_type == "linear" else scaling.original_max_position_embeddings
    return rope.theta, rope.width, scaling.rope_type, scaling.factor, context


def read_by_transformers(config: Any) -> dict[str, Any]:
    """The same of transformers' own object."""
    layers, head = range(config.num_hidden_layers), _head_dim(config)
    window = getattr(config, "sliding_window", None)
    uniform = FULL if window is None or config.model_type == "qwen3_moe" else SLIDING
    kinds = getattr(config, "layer_types", None) or [uniform] * len(layers)
    turned = getattr(config, "no_rope_layers", None) or [1] * len(layers)
    qkv = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    output = config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    linear = [getattr(config, name) for name in LINEAR_SIZES] if LINEAR in kinds else []
    return {
        "kinds": kinds,
        "windows": [window if kind == SLIDING else None for kind in kinds],
        "rope": [
            _turning(config, kinds[n], head) if turned[n] and kinds[n] != LINEAR else None
            for n in layers
        ],
        "heads": (config.num_attention_heads, config.num_key_value_heads, head),
        "scale": getattr(config, "query_pre_attn_scalar", head),
        "sizes": (config.vocab_size, config.hidden_size, config.intermediate_size),
        "epsilon": config.rms_norm_eps,
        "activation": getattr(config, "hidden_activation", None) or config.hidden_act,
        "tied": config.tie_word_embeddings,
        "context": config.max_position_embeddings,
        "biases": (qkv, output, getattr(config, "mlp_bias", False)),
        "linear": linear,
        "experts": tuple(
            getattr(config, name, 0)
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        ),
    }


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _turning(config: Any, kind: str, head: int) -> tuple:
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    width = int(head * rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] == "default":
        return rope["rope_theta"], width, "default"
    # transformers reads it of no linear scaling, and of a dynamic one max_position_embeddings
    trained = {"linear": None, "dynamic": config.max_position_embeddings}
    context = trained.get(rope["rope_type"], rope.get("original_max_position_embeddings"))
    return rope["rope_theta"], width, rope["rope_type"], rope["factor"], context


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_are_read_as_transformers_reads_them(name, tmp_path):
    """Every layer's kind, window and rotary positions, head sizes, norms, activation, biases."""
    found = from_fields(RELEASED[name], name)
    assert read(found) == read_by_transformers(theirs(RELEASED[name], tmp_path))


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_is_read_again(name, tmp_path):
    """to_fields and from_fields are inverse, and transformers reads the same in it."""
    config = tiny_config(40, **SHAPES[name])
    written = json.loads(json.dumps(to_fields(config)))
    assert from_fields(written, name) == config
    assert read(config) == read_by_transformers(theirs(written, tmp_path))
