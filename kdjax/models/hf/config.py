"""The config.json of a Hugging Face folder, read strictly into a `DecoderConfig`, and written.

What a family fixes stands in families.py; a key that would be computed differently here is refused
by name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from kdjax.errors import DataError
from kdjax.models.hf.families import FAMILIES, Family
from kdjax.models.hf.layer_fields import layers_of, positions_of, scaling_fields
from kdjax.models.layers.mlp import ACTIVATIONS
from kdjax.models.shape import FULL, LINEAR, SLIDING, DecoderConfig, layer_kinds

Fields = dict[str, Any]


def from_fields(fields: Fields, where: str) -> DecoderConfig:
    """A config from parsed JSON, of a larger model that of its text part; what would be computed
    differently here is refused."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object was expected")
    _check_kinds(fields, where)
    architecture = (fields.get("architectures") or ["none"])[0]
    model_type = _known().get(architecture)
    if model_type is None:
        raise DataError(
            f"{where}: architecture {architecture} is not supported; supported:"
            f" {', '.join(_known())}"
        )
    family = FAMILIES[model_type]
    given = text_fields(fields)
    said = fields.get("model_type")
    if said != model_type and said in FAMILIES:  # transformers goes by it
        raise DataError(
            f"{where}: model_type {said} is not that of {family.architecture}: {model_type}"
        )
    defaults = {k: v for k, v in family.defaults.items() if k not in NULLABLE or k not in given}
    fields = {**defaults, **{k: v for k, v in given.items() if v is not None}}
    fields["hidden_act"] = fields.get(family.activation_key, "silu")
    if fields.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise DataError(
            f"{where}: {fields['num_hidden_layers']} layers; at most {MAX_LAYERS} are read"
        )
    if bad := _refused(family, fields):
        listed = ", ".join(f"{name}={value!r}" for name, value in bad.items())
        raise DataError(f"{where}: not supported for {architecture}: {listed}")
    values = {
        "tie_word_embeddings": False,  # transformers' default, not this class's
        "num_key_value_heads": fields.get("num_attention_heads") if family.multi_head else None,
        "head_dim": _default_head_dim(fields),
        **fields,
        **_experts(family, fields),
        **_biases(family, fields),
        **family.fixed,
        **positions_of(family, fields, where),
        **layers_of(family, fields, where),
        "model_type": model_type,
    }
    return _checked(values, where)


NULLABLE = ("sliding_window", "num_key_value_heads", "max_position_embeddings")
"""Keys whose null means that there is none, or as many as heads: no default stands for it."""


def _known() -> dict[str, str]:
    """Architecture -> model_type."""
    own = {family.architecture: name for name, family in FAMILIES.items()}
    return own | {family.outer: name for name, family in FAMILIES.items() if family.outer}


MAX_LAYERS = 4096
"""Several times the deepest released model; each is listed."""


def text_fields(fields: Fields) -> Fields:
    """The config.json of a larger model's text part alone; of a text model, its own. What the whole
    says of embeddings and weights holds for the part, too, as in transformers.

    >>> part = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"head_dim": 4}}
    >>> text_fields(part)
    {'head_dim': 4, 'architectures': ['Gemma3ForCausalLM'], 'model_type': 'gemma3_text'}
    """
    architecture = (fields.get("architectures") or ["none"])[0]
    for name, family in FAMILIES.items():
        if architecture == family.outer:
            shared = ("tie_word_embeddings", "quantization_config", "auto_map")
            outer = {key: fields[key] for key in shared if key in fields}
            own = {"architectures": [family.architecture], "model_type": name}
            return (fields.get("text_config") or {}) | outer | own
    return fields


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "max_window_layers", "num_experts", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "original_max_position_embeddings",
    "sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "factor", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "partial_rotary_factor",
    "query_pre_attn_scalar",
)  # fmt: skip
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob",
    "attn_output_gate", "use_bidirectional_attention",
)  # fmt: skip
TEXTS = ("model_type", "rope_type", "type", "hidden_act", "hidden_activation")
PAIRS = ("short_factor", "long_factor")
OBJECTS = ("rope_scaling", "rope_parameters", "text_config", FULL, SLIDING)


def _check_kinds(fields: Fields, where: str, depth: int = 0) -> None:
    """Errors: DataError unless each key that is read, of objects within, too, is null, absent or of
    the right JSON type."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(SIZES, (_is_size, "a whole number in 0..2**31 - 1")),
        **dict.fromkeys(NUMBERS, (_is_number, "a finite number of at least 0")),
        **dict.fromkeys(SWITCHES, (lambda value: isinstance(value, bool), "true or false")),
        **dict.fromkeys(TEXTS, (lambda value: isinstance(value, str), "a text")),
        **dict.fromkeys(("architectures", "layer_types"), (_is_texts, "a list of texts")),
        **dict.fromkeys(PAIRS, (_is_numbers, "a list of numbers above 0")),
        "no_rope_layers": (_is_bits, "a list of 0 and 1"),
        **dict.fromkeys(OBJECTS, (lambda x: isinstance(x, dict) and depth < 3, "an object")),
    }
    for name, (good, wanted) in kinds.items():
        value = fields.get(name)
        if value is not None and not good(value):
            raise DataError(f"{where}: {name} must be {wanted}, got {value!r}")
        if isinstance(value, dict):
            _check_kinds(value, f"{where}, {name}", depth + 1)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(one) and one > 0 for one in value)


def _is_bits(value: Any) -> bool:
    return isinstance(value, list) and all(one in (0, 1) for one in value)


def to_fields(config: DecoderConfig) -> Fields:
    """The config.json of a config: the inverse of `from_fields`.

    >>> config = DecoderConfig(10, 4, 8, 1, 2, 1, 2, model_type="llama", qk_norm="none")
    >>> from_fields(to_fields(config), "here") == config
    True
    """
    family = FAMILIES[config.model_type]
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and name not in (*OWN_FIELDS, *ROPE_FIELDS)
    }
    if not config.num_experts:
        fields = {k: v for k, v in fields.items() if k not in EXPERT_FIELDS}
    kinds = layer_kinds(config)
    if not any(kind.mixer == LINEAR for kind in kinds):
        fields = {k: v for k, v in fields.items() if not k.startswith("linear_")}
    fields[family.activation_key] = fields.pop("hidden_act")
    fields |= {"attention_bias": True} if config.output_bias else {}
    by_type = family.window in ("by_type", "switched_by_type")
    # null where the family needs it: classes that read layer_types make a mask of windows for none
    if config.sliding_window is None and "sliding_window" in family.defaults and not by_type:
        fields["sliding_window"] = None
    if config.layer_types or family.pattern or by_type:
        fields["layer_types"] = [kind.mixer for kind in kinds]
    if family.window.startswith("switched"):
        windowed = [layer for layer, kind in enumerate(kinds) if kind.mixer == SLIDING]
        first = min(windowed, default=0)
        fields |= {"use_sliding_window": bool(windowed), "max_window_layers": first}
    if family.no_rope_every:
        fields["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    return {"architectures": [family.architecture], **fields, **_rope_fields(config, family)}


OWN_FIELDS = (
    "qk_norm", "qkv_bias", "output_bias", "norms", "unit_offset", "output_gate", "scale_embedding",
    "local_rope_theta", "no_rope_layers", "layer_types",
)  # fmt: skip
"""Fields that config.json says in other ways, or not at all."""
ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def _rope_fields(config: DecoderConfig, family: Family) -> Fields:
    stretched = scaling_fields(config.rope_scaling)
    if family.local_rope_theta is None:
        part = config.partial_rotary_factor
        return (
            {"rope_theta": config.rope_theta}
            | ({"rope_scaling": stretched} if stretched else {})
            | ({"partial_rotary_factor": part} if part != 1 else {})
        )
    rope = {"rope_type": "default", **stretched, "rope_theta": config.rope_theta}
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"rope_parameters": {FULL: rope, SLIDING: local}}


def _refused(family: Family, fields: Fields) -> Fields:
    """Keys whose value would be computed differently here, with that value."""
    computed = {"silu"} if family.silu else {*ACTIVATIONS}
    wrong = {
        family.activation_key: fields["hidden_act"] not in computed,
        "mlp_bias": bool(fields.get("mlp_bias")) and not family.mlp_bias,
        "quantization_config": bool(fields.get("quantization_config")),
        "auto_map": bool(fields.get("auto_map")),
        "decoder_sparse_step": fields.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(fields.get("mlp_only_layers")),
        "attn_logit_softcapping": fields.get("attn_logit_softcapping") is not None,
        "final_logit_softcapping": fields.get("final_logit_softcapping") is not None,
        "use_bidirectional_attention": bool(fields.get("use_bidirectional_attention")),
        "attn_output_gate": fields.get("attn_output_gate") is False,
    }
    return {name: fields.get(name) for name, is_wrong in wrong.items() if is_wrong}


def _biases(family: Family, fields: Fields) -> Fields:
    biased = family.attention_bias and bool(fields.get("attention_bias"))
    return {"qkv_bias": biased, "output_bias": biased, "mlp_bias": bool(fields.get("mlp_bias"))}


def _experts(family: Family, fields: Fields) -> Fields:
    if not family.experts:
        return {name: 0 for name in EXPERT_FIELDS[:3]} | {"norm_topk_prob": False}
    number = fields.get("num_experts", fields["num_local_experts"])
    return {
        "num_experts": number,
        "num_experts_per_tok": fields["num_experts_per_tok"],
        "moe_intermediate_size": fields["moe_intermediate_size"],
        "norm_topk_prob": fields.get("norm_topk_prob", False),
    }


def _default_head_dim(fields: Fields) -> int | None:
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _checked(values: Fields, where: str) -> DecoderConfig:
    known = {f.name: f for f in dataclasses.fields(DecoderConfig)}
    needed = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    linear = [name for name in known if name.startswith("linear_")]
    if LINEAR in values["layer_types"]:
        needed += linear
    else:
        values = values | dict.fromkeys(linear, 0)
    if values.get("query_pre_attn_scalar") is not None:
        needed += ["query_pre_attn_scalar"]
    missing = sorted(name for name in needed if not values.get(name))
    if missing:
        raise DataError(f"{where}: missing or 0: {', '.join(missing)}")
    config = DecoderConfig(**{name: values[name] for name in known if name in values})
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DataError(f"{where}: heads must be a multiple of key/value heads, and head_dim even")
    if config.linear_num_value_heads % (config.linear_num_key_heads or 1):
        raise DataError(
            f"{where}: linear_num_value_heads must be a multiple of linear_num_key_heads, got"
            f" {config.linear_num_value_heads} and {config.linear_num_key_heads}"
        )
    turning = int(config.head_dim * config.partial_rotary_factor)
    if turning % 2 or not 0 < turning <= config.head_dim:
        raise DataError(
            f"{where}: by partial_rotary_factor {turning} of {config.head_dim} entries of a head"
            " turn, which must be even, and some"
        )
    factors = config.rope_scaling.short_factor if config.rope_scaling else ()
    if factors and 2 * len(factors) != turning:
        raise DataError(
            f"{where}: short_factor of rope_scaling has {len(factors)} entries, and {turning // 2}"
            " pairs of a head turn"
        )
    if not 0 <= config.num_experts_per_tok <= config.num_experts:
        raise DataError(f"{where}: num_experts_per_tok must be at most num_experts")
    return config
