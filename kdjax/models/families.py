"""Tables of the families: checkpoint names <-> paths in the parameters, and their shapes."""

from __future__ import annotations

from typing import NamedTuple

from kdjax.models.config import DecoderConfig

Path = tuple[str, ...]

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
