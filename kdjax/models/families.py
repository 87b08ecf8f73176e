"""Families as data: one row each, and the table of names that its checkpoints hold.

A family whose layers are of a known kind is one more row of FAMILIES; tensors that none of the
tables below names are one more table, chosen in `layer_table`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from kdjax.models.shape import DecoderConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type fixes of its checkpoints' config.json.

    architecture: the class that transformers loads it with.
    qk_norm, qkv_bias: what its layers have without a word in the file.
    attention_bias: whether the key of this name puts a bias on all four projections.
    window: sliding windows of all layers by their key alone (always), where use_sliding_window says
        so (switched), and then from layer max_window_layers on (switched_from), or of none.
    experts: whether its MLPs are mixtures of experts.
    multi_head: an absent num_key_value_heads means as many as heads.
    defaults: of absent keys.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    window: Literal["none", "always", "switched", "switched_from"] = "none"
    experts: bool = False
    multi_head: bool = False
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


SWITCHED = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        attention_bias=True,
        window="switched_from",
        defaults={"head_dim": 128, **SWITCHED},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        attention_bias=True,
        window="switched",
        experts=True,
        defaults={
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            **SWITCHED,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="switched_from", defaults=SWITCHED),
    "llama": Family("LlamaForCausalLM", attention_bias=True, multi_head=True),
    "mistral": Family("MistralForCausalLM", window="always", defaults={"sliding_window": 4096}),
}
"""Every family, by the model_type of its config.json."""

DENSE: dict[str, Path] = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "self_attn.q_proj.weight": ("q_proj", "kernel"),
    "self_attn.k_proj.weight": ("k_proj", "kernel"),
    "self_attn.v_proj.weight": ("v_proj", "kernel"),
    "self_attn.o_proj.weight": ("o_proj", "kernel"),
    "mlp.gate_proj.weight": ("gate_proj", "kernel"),
    "mlp.up_proj.weight": ("up_proj", "kernel"),
    "mlp.down_proj.weight": ("down_proj", "kernel"),
}
QK_NORM: dict[str, Path] = {
    "self_attn.q_norm.weight": ("q_norm", "scale"),
    "self_attn.k_norm.weight": ("k_norm", "scale"),
}
QKV_BIAS: dict[str, Path] = {
    f"self_attn.{name}.bias": (name, "bias") for name in ("q_proj", "k_proj", "v_proj")
}
OUTPUT_BIAS: dict[str, Path] = {"self_attn.o_proj.bias": ("o_proj", "bias")}
EXPERTS: dict[str, Path] = {
    "mlp.gate.weight": ("experts", "router", "kernel"),
    "mlp.experts.{}.gate_proj.weight": ("experts", "gate_proj", "kernel"),
    "mlp.experts.{}.up_proj.weight": ("experts", "up_proj", "kernel"),
    "mlp.experts.{}.down_proj.weight": ("experts", "down_proj", "kernel"),
}


class Place(NamedTuple):
    """A checkpoint tensor's place in the parameters: params[path][at] (a layer, then an expert).

    shape is that in the file, where kernels are [out, in] and so are transposed.
    """

    path: Path
    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def turned(self) -> bool:
        return self.path[-1] == "kernel"


def layer_table(config: DecoderConfig) -> dict[str, Path]:
    """Checkpoint name within a layer -> path within a layer's parameters; {} stands for an expert.

    >>> layer_table(DecoderConfig(10, 4, 8, 1, 2, 1, 2))["self_attn.q_norm.weight"]
    ('q_norm', 'scale')
    """
    table = dict(DENSE)
    if config.num_experts:
        table = {name: path for name, path in DENSE.items() if not name.startswith("mlp.")}
        table |= EXPERTS
    for has, names in (
        (config.qk_norm, QK_NORM),
        (config.qkv_bias, QKV_BIAS),
        (config.output_bias, OUTPUT_BIAS),
    ):
        table |= names if has else {}
    return table


def tensors(config: DecoderConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this config holds, by its name, layer by layer."""
    d = config.hidden_size
    table = (config.vocab_size, d)
    places = {"model.embed_tokens.weight": Place(("embed",), (), table)}
    for layer in range(config.num_hidden_layers):
        for name, path in layer_table(config).items():
            experts = range(config.num_experts) if "{}" in name else [None]
            for expert in experts:
                index = (layer,) if expert is None else (layer, expert)
                place = Place(("layers", *path), index, _shape(config, path))
                places[f"model.layers.{layer}.{name.format(expert)}"] = place
    places["model.norm.weight"] = Place(("norm",), (), (d,))
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Place(("head",), (), table)
    return places


def _shape(config: DecoderConfig, path: Path) -> tuple[int, ...]:
    """The shape in the file, [out, in] for a kernel."""
    d, m = config.hidden_size, config.intermediate_size
    if path[0] == "experts":
        m = config.moe_intermediate_size
    q, k = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    kernels = {
        "q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q),
        "gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m),
        "router": (config.num_experts, d),
    }  # fmt: skip
    if path[-1] == "kernel":
        return kernels[path[-2]]
    if path[-1] == "bias":
        return kernels[path[-2]][:1]
    return (config.head_dim,) if path[0] in ("q_norm", "k_norm") else (d,)
