"""The shapes and options of a decoder, read strictly from a Hugging Face config.json.

FAMILIES has what a family fixes; a key whose value would be computed differently here is refused
by name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.runtime.files import json_object, member

Fields = dict[str, Any]


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


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type: its class, the options it implies, the defaults of absent keys."""

    architecture: str
    implies: Fields
    defaults: Fields = dataclasses.field(default_factory=dict)


PLAIN = {"qk_norm": False}

FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, {"head_dim": 128}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {"qk_norm": True}),
    "qwen2": Family("Qwen2ForCausalLM", {"qk_norm": False, "qkv_bias": True}),
    "llama": Family("LlamaForCausalLM", PLAIN),
    "mistral": Family("MistralForCausalLM", PLAIN, {"sliding_window": 4096}),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder. Errors: DataError naming what is missing or not supported."""
    if member(folder, "config.json") is None:
        raise DataError(f"{folder}: no config.json; give a Hugging Face model folder")
    return from_fields(json_object(folder, "config.json"), str(folder / "config.json"))


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
    bad = [f"{name}={value!r}" for name, value in _refused(model_type, fields, rope).items()]
    if bad:
        raise DataError(f"{where}: not supported for {architecture}: {', '.join(bad)}")
    values = {
        "rope_theta": rope.get("rope_theta", 1e4),  # transformers' defaults, not this class's
        "tie_word_embeddings": False,
        "num_key_value_heads": fields.get("num_attention_heads") if model_type == "llama" else None,
        **{name: value for name, value in fields.items() if value is not None},
        **_experts(model_type, fields),
        **family.implies,
        **_attention_options(model_type, fields),
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
    if config.model_type.startswith("qwen"):
        fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    fields.setdefault("hidden_act", "silu")
    return {"architectures": [family.architecture], **fields}


IMPLIED_FIELDS = ("qk_norm", "qkv_bias", "output_bias")
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def _refused(model_type: str, fields: Fields, rope: Fields) -> Fields:
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
    if model_type in ("qwen2", "qwen3", "qwen3_moe") and fields.get("use_sliding_window"):
        from_layer = 0 if model_type == "qwen3_moe" else fields.get("max_window_layers", 28)
        if isinstance(layers, int) and 0 < from_layer < layers:
            bad["max_window_layers"] = from_layer
    if len(kinds) > 1 or kinds - {"full_attention", "sliding_attention"}:
        bad["layer_types"] = sorted(kinds)
    return bad


def _attention_options(model_type: str, fields: Fields) -> Fields:
    """Biases and the sliding window, which the families spell in different ways."""
    options: Fields = {"sliding_window": None}
    if model_type in ("qwen3", "qwen3_moe", "llama") and fields.get("attention_bias"):
        options |= {"qkv_bias": True, "output_bias": True}
    if model_type == "mistral":
        options["sliding_window"] = fields.get("sliding_window")
    elif model_type != "llama" and fields.get("use_sliding_window"):
        first = 0 if model_type == "qwen3_moe" else fields.get("max_window_layers", 28)
        if first < (fields.get("num_hidden_layers") or 0):
            options["sliding_window"] = fields.get("sliding_window", 4096)
    return options


def _experts(model_type: str, fields: Fields) -> Fields:
    if model_type != "qwen3_moe":
        return {name: 0 for name in EXPERT_FIELDS[:3]} | {"norm_topk_prob": False}
    number = fields.get("num_experts", fields.get("num_local_experts", 128))
    defaults = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False}
    return {"num_experts": number} | {k: fields.get(k, v) for k, v in defaults.items()}


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
