"""The config.json of released checkpoints, as published, without keys that no decoder computes."""

from __future__ import annotations

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6, "rope_local_base_freq": 10_000.0, "rope_theta": 1_000_000.0,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "query_pre_attn_scalar": 256, "num_attention_heads": 4, "num_key_value_heads": 1,
    "sliding_window": 512, "vocab_size": 262_144, "max_position_embeddings": 32_768,
    "rope_scaling": None, "use_cache": True, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip


def _qwen3_5(width: int, inner: int, layers: int, heads: tuple[int, int], values: int) -> dict:
    """A Qwen3.5 checkpoint: vision and text."""
    text = {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "dtype": "bfloat16", "eos_token_id": 248_044, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": width, "intermediate_size": inner,
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * (layers // 4),
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": values, "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 262_144, "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "num_attention_heads": heads[0], "num_hidden_layers": layers,
        "num_key_value_heads": heads[1], "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "vocab_size": 248_320, "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25, "rope_theta": 10_000_000, "rope_type": "default",
        },
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "image_token_id": 248_056, "tie_word_embeddings": True, "text_config": text,
        "vision_config": {"model_type": "qwen3_5", "depth": 12, "hidden_size": 768},
    }  # fmt: skip


def _without(fields: dict, *names: str) -> dict:
    return {name: value for name, value in fields.items() if name not in names}


QWEN3_5_08B = _qwen3_5(1024, 3584, 24, (8, 2), 16)
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40_960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151_936,
    },
    "Qwen/Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32_768,
        "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "sliding_window": 32_768, "tie_word_embeddings": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151_936,
    },
    "Qwen2.5, windows from layer 10 on": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
        "intermediate_size": 4864, "max_window_layers": 10, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1_000_000.0,
        "sliding_window": 4096, "use_sliding_window": True, "vocab_size": 151_936,
    },
    "meta-llama/Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131_072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        }, "rope_theta": 500_000.0, "tie_word_embeddings": True, "vocab_size": 128_256,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14_336, "max_position_embeddings": 32_768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32_000,
    },
    "mistralai/Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14_336, "max_position_embeddings": 32_768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32_768,
    },
    "mistralai/Ministral-8B": {
        "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12_288,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9, "max_position_embeddings": 32_768,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000_000.0, "sliding_window": 32_768,
        "tie_word_embeddings": False, "vocab_size": 131_072,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11_008,
        "layer_types": [FULL] * 36, "max_position_embeddings": 65_536, "max_window_layers": 28,
        "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5_000_000.0,
        "sliding_window": None, "use_sliding_window": False, "vocab_size": 128_256,
    },
    "SmolLM3, windows without rope": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 2048,
        "intermediate_size": 11_008, "num_attention_heads": 16, "num_hidden_layers": 10,
        "num_key_value_heads": None, "sliding_window": 2048, "use_sliding_window": True,
        "vocab_size": 128_256, "no_rope_layer_interval": 3,
    },
    "allenai/Olmo-3-1025-7B": {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11_008,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8, "max_position_embeddings": 65_536,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6, "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        }, "rope_theta": 500_000, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 100_278,
    },
    "google/gemma-3-270m": {
        **GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 3, "num_hidden_layers": 18,
        "use_bidirectional_attention": False,
    },
    "google/gemma-3-1b-it": {
        **GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "sliding_window_pattern": 6, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    },
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "eos_token_id": [1, 106], "image_token_index": 262_144, "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "Qwen/Qwen3.5-0.8B": QWEN3_5_08B,
    "Qwen/Qwen3.5-4B": _qwen3_5(2560, 9216, 32, (16, 4), 32),
    "Qwen3.5 by its interval": QWEN3_5_08B | {
        "text_config": _without(QWEN3_5_08B["text_config"], "layer_types", "rope_parameters")
        | {"full_attention_interval": 3, "rope_theta": 10_000_000, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip
"""By name; those without an organisation are forms of a family that released ones could have."""
