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
from kdjax.models.families import FAMILIES, Family
from kdjax.models.shape import DecoderConfig, RopeScaling

Fields = dict[str, Any]


ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def from_fields(fields: Fields, where: str) -> DecoderConfig:
    """A config from parsed JSON; what would be computed differently here is refused."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON object was expected")
    _check_kinds(fields, where)
    architecture = (fields.get("architectures") or ["none"])[0]
    known = {family.architecture: name for name, family in FAMILIES.items()}
    if architecture not in known:
        raise DataError(
            f"{where}: architecture {architecture} is not supported; supported: {', '.join(known)}"
        )
    model_type = known[architecture]
    family = FAMILIES[model_type]
    fields = {**family.defaults, **fields}
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    bad = [f"{name}={value!r}" for name, value in _refused(family, fields, rope).items()]
    if bad:
        raise DataError(f"{where}: not supported for {architecture}: {', '.join(bad)}")
    values = {
        "rope_theta": rope.get("rope_theta", 1e4),  # transformers' defaults, not this class's
        "tie_word_embeddings": False,
        "num_key_value_heads": fields.get("num_attention_heads") if family.multi_head else None,
        **{name: value for name, value in fields.items() if value is not None},
        **_experts(family, fields),
        **_attention_options(family, fields),
        "model_type": model_type,
        "rope_scaling": _rope_scaling(rope, fields, where),
    }
    values.setdefault("head_dim", _default_head_dim(fields))
    return _checked(values, where)


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "max_window_layers", "num_experts", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "original_max_position_embeddings",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "partial_rotary_factor",
)  # fmt: skip
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "use_sliding_window", "norm_topk_prob", "qk_norm",
    "qkv_bias", "output_bias",
)  # fmt: skip
TEXTS = ("rope_type", "type", "hidden_act")


def _check_kinds(fields: Fields, where: str) -> None:
    """Errors: DataError unless each key that is read, of rope_scaling too, is null, absent or of
    the right JSON type."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(SIZES, (_is_size, "a whole number in 0..2**31 - 1")),
        **dict.fromkeys(NUMBERS, (_is_number, "a finite number of at least 0")),
        **dict.fromkeys(SWITCHES, (lambda value: isinstance(value, bool), "true or false")),
        **dict.fromkeys(TEXTS, (lambda value: isinstance(value, str), "a text")),
        **dict.fromkeys(("architectures", "layer_types"), (_is_texts, "a list of texts")),
        **dict.fromkeys(("rope_scaling", "rope_parameters"), (_is_object, "an object")),
    }
    for name, (good, wanted) in kinds.items():
        value = fields.get(name)
        if value is not None and not good(value):
            raise DataError(f"{where}: {name} must be {wanted}, got {value!r}")
        if isinstance(value, dict):
            _check_kinds(value, f"{where}, {name}")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not {"rope_scaling", "rope_parameters"} & {*value}


def to_fields(config: DecoderConfig) -> Fields:
    """The config.json of a config: the inverse of `from_fields`.

    >>> config = DecoderConfig(10, 4, 8, 1, 2, 1, 2, model_type="llama", qk_norm=False)
    >>> from_fields(to_fields(config), "here") == config
    True
    """
    family = FAMILIES[config.model_type]
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in IMPLIED_FIELDS}
    scaling = config.rope_scaling
    if scaling is not None:
        kept = dataclasses.asdict(scaling).items()
        fields["rope_scaling"] = {k: v for k, v in kept if v is not None}
    if not config.num_experts:
        fields = {k: v for k, v in fields.items() if k not in EXPERT_FIELDS}
    if config.output_bias:
        fields["attention_bias"] = True
    if family.window.startswith("switched"):
        fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    fields.setdefault("hidden_act", "silu")
    return {"architectures": [family.architecture], **fields}


IMPLIED_FIELDS = ("qk_norm", "qkv_bias", "output_bias")
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def _refused(family: Family, fields: Fields, rope: Fields) -> Fields:
    """Keys whose value would be computed differently here, with that value."""
    wrong = {
        "hidden_act": fields.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(fields.get("mlp_bias")),
        "quantization_config": bool(fields.get("quantization_config")),
        "auto_map": bool(fields.get("auto_map")),
        "decoder_sparse_step": fields.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(fields.get("mlp_only_layers")),
    }
    bad = {name: fields.get(name) for name, is_wrong in wrong.items() if is_wrong}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        bad["rope_scaling"] = rope
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        bad["rope_scaling"] = rope
    layers = fields.get("num_hidden_layers")
    kinds = set(fields.get("layer_types") or [])
    first = _first_window_layer(family, fields)
    if fields.get("use_sliding_window") and isinstance(layers, int) and 0 < first < layers:
        bad["max_window_layers"] = first
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        bad["layer_types"] = sorted(kinds)
    return bad


def _first_window_layer(family: Family, fields: Fields) -> int:
    """The first layer with a window, where use_sliding_window says that there are some."""
    if family.window != "switched_from":
        return 0
    first = fields.get("max_window_layers")
    return family.defaults["max_window_layers"] if first is None else first


def _attention_options(family: Family, fields: Fields) -> Fields:
    """Norms, biases and the sliding window, which the families spell in different ways."""
    biased = family.attention_bias and bool(fields.get("attention_bias"))
    windowed = family.window == "always" or (
        family.window.startswith("switched")
        and bool(fields.get("use_sliding_window"))
        and _first_window_layer(family, fields) < (fields.get("num_hidden_layers") or 0)
    )
    return {
        "qk_norm": family.qk_norm,
        "qkv_bias": family.qkv_bias or biased,
        "output_bias": biased,
        "sliding_window": fields.get("sliding_window") if windowed else None,
    }


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


def _rope_scaling(rope: Fields, fields: Fields, where: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if not rope.get("factor"):
        raise DataError(f"{where}: rope_scaling of type {rope_type} needs a factor, got {rope}")
    names = {f.name for f in dataclasses.fields(RopeScaling)}
    values = {k: v for k, v in rope.items() if k in names and v is not None}
    context = values.get(TRAINED_CONTEXT, fields.get("max_position_embeddings"))
    if not context and rope_type != "linear":
        raise DataError(
            f"{where}: rope_scaling of type {rope_type} needs {TRAINED_CONTEXT}, or"
            " max_position_embeddings beside it"
        )
    values |= {TRAINED_CONTEXT: context} if context else {}
    return RopeScaling(**{**values, "rope_type": rope_type})


TRAINED_CONTEXT = "original_max_position_embeddings"


def _default_head_dim(fields: Fields) -> int | None:
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _checked(values: Fields, where: str) -> DecoderConfig:
    known = {f.name: f for f in dataclasses.fields(DecoderConfig)}
    needed = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    missing = sorted(name for name in needed if not values.get(name))
    if missing:
        raise DataError(f"{where}: missing or 0: {', '.join(missing)}")
    config = DecoderConfig(**{name: values[name] for name in known if name in values})
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DataError(f"{where}: heads must be a multiple of key/value heads, and head_dim even")
    if not 0 <= config.num_experts_per_tok <= config.num_experts:
        raise DataError(f"{where}: num_experts_per_tok must be at most num_experts")
    return config
