"""Families as data: a row for each model_type.

A family whose layers are of known kinds is one more row of FAMILIES; names that its checkpoints
alone use are a table in models/hf/tensors.py, a new kind of layer is a file beside
models/layers/self_attention.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from kdjax.models.shape import FULL, LINEAR, SLIDING


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type fixes of its checkpoints' config.json.

    - architecture: the class that transformers loads it with.
    - fixed: fields of DecoderConfig that its layers have without a word in the file.
    - attention_bias: whether the key of this name puts a bias on all four projections.
    - window: which layers are sliding: all by the key sliding_window alone (always), those that
      layer_types names, or all (by_type), where use_sliding_window says so all (switched), those of
      layer_types (switched_by_type) or from layer max_window_layers on (switched_from), or none.
    - pattern: the kinds of layers that repeat where there are no layer_types; `pattern_key` gives
      another length: its last layer closes a block, all others are of the first's kind.
    - no_rope_every: each so-many-th layer has no rotary positions, unless no_rope_layers says else.
    - local_rope_theta: of sliding layers, which are not stretched, where the file does not say it;
      rope_theta is that of full ones. None: they turn as full ones do.
    - experts: whether its MLPs are mixtures of experts.
    - mlp_bias: whether the key of this name is read.
    - multi_head: an absent num_key_value_heads means as many as heads.
    - activation_key: the key of the MLP's activation; another of its names is not read.
    - silu: no other activation is computed (experts, and the convolutions of linear attention).
    - outer: the architecture of a larger model (with vision) whose text part it is.
    - left_out: beginnings of the names of tensors that its text part does not need.
    - defaults: of absent keys; a key that is null has none of them where null has a meaning.
    """

    architecture: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention_bias: bool = False
    window: Literal[
        "none", "always", "by_type", "switched", "switched_by_type", "switched_from"
    ] = "none"
    pattern: tuple[str, ...] = ()
    pattern_key: str = ""
    no_rope_every: int | None = None
    local_rope_theta: float | None = None
    experts: bool = False
    mlp_bias: bool = False
    multi_head: bool = False
    activation_key: str = "hidden_act"
    silu: bool = False
    outer: str | None = None
    left_out: tuple[str, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


CONTEXT = "max_position_embeddings"
SWITCHED = {"sliding_window": 4096, "max_window_layers": 28, CONTEXT: 32_768}

FAMILIES = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention_bias=True,
        window="switched_from",
        defaults={"head_dim": 128, **SWITCHED},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        attention_bias=True,
        window="switched",
        experts=True,
        silu=True,
        defaults={
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            **SWITCHED,
        },
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        fixed={"unit_offset": True, "output_gate": True},
        attention_bias=True,
        pattern=(LINEAR, LINEAR, LINEAR, FULL),
        pattern_key="full_attention_interval",
        silu=True,
        outer="Qwen3_5ForConditionalGeneration",
        left_out=("model.visual.", "mtp."),
        defaults={
            "head_dim": 256,
            CONTEXT: 32_768,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qk_norm": "none", "qkv_bias": True},
        window="switched_from",
        defaults=SWITCHED,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        fixed={"qk_norm": "none"},
        attention_bias=True,
        mlp_bias=True,
        multi_head=True,
        defaults={CONTEXT: 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        fixed={"qk_norm": "none"},
        window="always",
        defaults={"sliding_window": 4096, CONTEXT: 131_072},
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        fixed={"qk_norm": "none"},
        window="by_type",
        defaults={"sliding_window": 4096, CONTEXT: 131_072},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        fixed={"qk_norm": "none"},
        attention_bias=True,
        window="switched_by_type",
        no_rope_every=4,
        mlp_bias=True,
        multi_head=True,
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            CONTEXT: 32_768,
        },
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        fixed={"qk_norm": "width", "norms": "after"},
        attention_bias=True,
        window="by_type",
        pattern=(SLIDING, SLIDING, SLIDING, FULL),
        local_rope_theta=5e5,
        multi_head=True,
        defaults={
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            CONTEXT: 2048,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={"norms": "sandwich", "unit_offset": True, "scale_embedding": True},
        attention_bias=True,
        window="by_type",
        pattern=(SLIDING,) * 5 + (FULL,),
        pattern_key="sliding_window_pattern",
        local_rope_theta=1e4,
        activation_key="hidden_activation",
        outer="Gemma3ForConditionalGeneration",
        left_out=(
            "model.vision_tower.",
            "model.multi_modal_projector.",
            "vision_tower.",
            "multi_modal_projector.",
        ),
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            CONTEXT: 131_072,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
        },
    ),
}
"""Every family, by the model_type of its config.json."""

TEXT_PART = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Beginnings of names of a larger model's text part -> those of the text model alone."""
