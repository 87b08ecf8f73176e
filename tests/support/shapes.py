"""Changes to the tiny config: a decoder of each family, with the options that its configs hold."""

from __future__ import annotations

from kdjax.models import RopeScaling

LLAMA3 = RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", 4.0, 16)
LONG = RopeScaling(
    "longrope", 4.0, 128, short_factor=(1.0, 1.5, 2.0, 3.0), long_factor=(1.0, 4.0, 9.0, 20.0)
)
SHAPES: dict[str, dict] = {
    "qwen3, tied, grouped queries": {},
    "qwen3, untied, full heads, theta 1e4": {
        "num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 1e4,
    },
    "qwen3, biases, linear rope, window": {
        "qkv_bias": True, "output_bias": True, "rope_scaling": RopeScaling("linear", 2.0, 64),
        "sliding_window": 6, "rms_norm_eps": 1e-3,
    },
    "qwen2, tied, yarn": {"model_type": "qwen2", "qkv_bias": True, "rope_scaling": YARN},
    "llama, untied, llama3 rope": {
        "model_type": "llama", "tie_word_embeddings": False, "rope_scaling": LLAMA3,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    },
    "llama, tied, biases, one kv head": {
        "model_type": "llama", "qkv_bias": True, "output_bias": True, "num_key_value_heads": 1,
    },
    "llama, biases of the MLP, dynamic rope": {
        "model_type": "llama", "mlp_bias": True, "rope_scaling": RopeScaling("dynamic", 2.0, 40960),
    },
    "mistral, window": {
        "model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 5,
    },
    "mistral, no window": {"model_type": "mistral", "tie_word_embeddings": False},
    "ministral, full layers among windows, longrope": {
        "model_type": "ministral", "tie_word_embeddings": False, "sliding_window": 5,
        "num_hidden_layers": 5, "rope_scaling": LONG,
        "layer_types": ("full_attention", *("sliding_attention",) * 3, "full_attention"),
    },
    "qwen3_moe, weights renormalised": {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "qwen3_moe, weights as they are": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "qwen2, windows of the last layers": {
        "model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 4,
        "layer_types": ("full_attention",) * 2 + ("sliding_attention",) * 2,
    },
    "smollm3, every fourth without rope, biases": {
        "model_type": "smollm3", "num_hidden_layers": 9, "no_rope_layers": (1, 1, 1, 0) * 2 + (1,),
        "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    },
    "smollm3, windows everywhere": {
        "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0),
        "sliding_window": 4,
    },
    "olmo3, three windows and a full layer, yarn": {
        "model_type": "olmo3", "num_hidden_layers": 6, "sliding_window": 5, "rope_scaling": YARN,
        "layer_types": (*("sliding_attention",) * 3, "full_attention", *("sliding_attention",) * 2),
        "local_rope_theta": 5e5, "rope_theta": 5e5, "tie_word_embeddings": False,
    },
    "gemma3, five windows and a full layer": {
        "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 5,
        "layer_types": (*("sliding_attention",) * 5, "full_attention", "sliding_attention"),
        "local_rope_theta": 1e4, "rope_scaling": RopeScaling("linear", 8.0, 64),
        "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "num_key_value_heads": 1,
    },
    "qwen3_5, three delta-nets and a gated full layer": {
        "model_type": "qwen3_5_text", "num_hidden_layers": 5, "partial_rotary_factor": 0.5,
        "layer_types": (*("linear_attention",) * 3, "full_attention", "linear_attention"),
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
        "linear_value_head_dim": 10, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip
OF_EACH_FAMILY = (
    "qwen3, biases, linear rope, window", "qwen2, tied, yarn", "llama, untied, llama3 rope",
    "mistral, window", "ministral, full layers among windows, longrope",
    "qwen3_moe, weights renormalised",
    "smollm3, every fourth without rope, biases", "olmo3, three windows and a full layer, yarn",
    "gemma3, five windows and a full layer", "qwen3_5, three delta-nets and a gated full layer",
)  # fmt: skip
