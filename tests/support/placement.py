"""Steps of small models of every family, on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from tiny import lively, tiny_config

from kdjax import models
from kdjax.losses.combinators import mix
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.models.parameters import init_params
from kdjax.step.score import HeadPlan
from kdjax.step.update import make_step

V = 96
FAMILIES: dict[str, dict] = {
    "qwen3": {},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "output_bias": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 5},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "norm_topk_prob": True,
    },
    "smollm3": {
        "model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": (1, 0),
        "qkv_bias": True,
    },
    "olmo3": {
        "model_type": "olmo3", "num_hidden_layers": 2, "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"), "tie_word_embeddings": False,
        "local_rope_theta": 1e4,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"), "local_rope_theta": 1e4,
        "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24,
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text", "num_hidden_layers": 2, "partial_rotary_factor": 0.5,
        "layer_types": ("linear_attention", "full_attention"), "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip
MIXED = mix(forward_kl, reverse_kl, weight=0.6)


def make(family: str, seed: int, **changes):
    config = tiny_config(V, **{"num_hidden_layers": 1, **FAMILIES[family], **changes})
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return config, lively(shapes, seed)


def descent():
    return optax.with_extra_args_support(optax.sgd(0.1))


def step_on(mesh, student, teacher, optimizer, chunk=8):
    (config, _), (other, _) = student, teacher
    return make_step(
        models.build(config, mesh=mesh, remat="full"),
        models.build(other, mesh=mesh),
        optimizer,
        token_loss=MIXED,
        plan=HeadPlan(chunk, mesh=mesh),
    )


def placed(mesh, config, params):
    shapes = models.abstract_params(config, jnp.float32, mesh)
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shapes))
