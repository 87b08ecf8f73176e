"""config.json as transformers reads it: of released checkpoints, and as written of every shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from released import RELEASED
from shapes import SHAPES
from tiny import tiny_config

from kdjax.errors import DataError
from kdjax.models.hf.config import from_fields, to_fields
from kdjax.models.known import KNOWN
from kdjax.models.shape import (
    FULL,
    LINEAR,
    SLIDING,
    DecoderConfig,
    Rope,
    context_tokens,
    layer_kinds,
)


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


@pytest.mark.parametrize("name", sorted(KNOWN.keys() & RELEASED.keys()))
def test_shapes_that_are_known_without_a_folder(name):
    """Those that plans are made of are those of the checkpoint's own config.json."""
    assert KNOWN[name].config == from_fields(RELEASED[name], name)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_is_read_again(name, tmp_path):
    """to_fields and from_fields are inverse, and transformers reads the same in it."""
    config = tiny_config(40, **SHAPES[name])
    written = json.loads(json.dumps(to_fields(config)))
    assert from_fields(written, name) == config
    assert read(config) == read_by_transformers(theirs(written, tmp_path))


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text", "ministral"])
def test_a_student_of_full_layers_alone_runs_in_transformers(model_type, tmp_path):
    """Its class makes a mask of windows for no layer, too: the file names one."""
    import torch
    from transformers import AutoModelForCausalLM

    own = {
        "olmo3": {"local_rope_theta": 5e5},
        "gemma3_text": {
            "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "local_rope_theta": 1e4,
        },
    }  # fmt: skip
    changes = own.get(model_type, {})
    config = tiny_config(40, model_type=model_type, **changes)
    written = to_fields(config) | {"pad_token_id": 0}
    assert from_fields(written, "again") == config
    reference = AutoModelForCausalLM.from_config(theirs(written, tmp_path))
    assert reference(torch.zeros((1, 2), dtype=torch.int64)).logits.shape == (1, 2, 40)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}
BOTH = {kind: {"rope_type": "default", "rope_theta": 3e5} for kind in (FULL, SLIDING)}
TWICE_SAID = [
    ("HuggingFaceTB/SmolLM3-3B", {"rope_scaling": LINEAR_ROPE, "rope_parameters": BOTH[FULL]}),
    ("google/gemma-3-270m", {"rope_scaling": LINEAR_ROPE, "rope_parameters": BOTH}),
    ("allenai/Olmo-3-1025-7B", {"rope_scaling": YARN, "rope_parameters": BOTH}),
    ("allenai/Olmo-3-1025-7B", {"rope_theta": 1e6}),
    ("allenai/Olmo-3-1025-7B", {"rope_theta": 1e6, "rope_parameters": {FULL: YARN}}),
    ("HuggingFaceTB/SmolLM3-3B", {"original_max_position_embeddings": 8, "rope_scaling": YARN}),
    (
        "HuggingFaceTB/SmolLM3-3B",
        {"original_max_position_embeddings": 8, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    ),
    ("google/gemma-3-270m", {"original_max_position_embeddings": 8, "rope_scaling": YARN}),
]


@pytest.mark.parametrize(("name", "changes"), TWICE_SAID)
def test_what_is_said_in_two_places_is_read_as_transformers_reads_it(name, changes, tmp_path):
    """rope_scaling stands before rope_parameters, and a trained context beside them before that
    within, but for families with an object for each kind of layer."""
    fields = RELEASED[name] | changes
    found = from_fields(fields, name)
    reference = theirs(fields, tmp_path)
    reference.standardize_rope_params()  # as its classes do before they compute frequencies
    assert read(found) == read_by_transformers(reference)
    assert from_fields(to_fields(found), name) == found


def test_a_beta_of_zero_is_none():
    """As in transformers, where it is the default."""
    fields = RELEASED["HuggingFaceTB/SmolLM3-3B"]
    zero, none = (
        from_fields(fields | {"rope_scaling": YARN | beta}, "x")
        for beta in ({"beta_fast": 0, "beta_slow": 0}, {})
    )
    assert zero == none


GEMMA, GEMMA_OUTER = "google/gemma-3-270m", "google/gemma-3-4b-it"
QWEN, SMOL, OLMO = "Qwen/Qwen3.5-0.8B", "HuggingFaceTB/SmolLM3-3B", "allenai/Olmo-3-1025-7B"
WINDOWED = "Qwen2.5, windows from layer 10 on"
LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
REFUSED = [
    (GEMMA, {"attn_logit_softcapping": 50.0}, "Gemma3ForCausalLM: attn_logit_softcapping=50.0"),
    (GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (GEMMA, {"hidden_activation": "relu2"}, "hidden_activation='relu2'"),
    (GEMMA, {"sliding_window": None}, "layer_types holds 'sliding_attention', but there is no"),
    (GEMMA, {"layer_types": [FULL] * 17}, "layer_types has 17 entries, but there are 18 hidden"),
    (
        GEMMA, {"layer_types": [FULL] * 17 + ["chunked_attention"]},
        "holds 'chunked_attention'; layers of Gemma3ForCausalLM are full_attention or sliding_",
    ),
    (
        GEMMA, {"rope_parameters": {FULL: {"rope_type": "su"}, SLIDING: {}}},
        "not supported for Gemma3ForCausalLM: rope_scaling={'rope_type': 'su'}",
    ),
    (
        GEMMA, {"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "rope_scaling={'rope_type': 'linear', 'factor': 2.0}",
    ),
    (GEMMA, {"rope_scaling": LONG}, "short_factor of rope_scaling has 3 entries, and 128 pairs"),
    (GEMMA, {"rope_scaling": LONG | {"short_factor": ["1"]}}, "must be a list of numbers above 0"),
    (GEMMA_OUTER, {"text_config": [1]}, "text_config must be an object, got [1]"),
    (GEMMA_OUTER, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    (QWEN, {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}, "architecture Qwen3_5Moe"),
    (QWEN, {"attn_output_gate": False}, "Qwen3_5ForConditionalGeneration: attn_output_gate=False"),
    (QWEN, {"hidden_act": "gelu"}, "hidden_act='gelu'"),  # its convolutions have it, too
    (QWEN, {"linear_num_key_heads": 0}, "missing or 0: linear_num_key_heads"),
    (QWEN, {"linear_num_key_heads": 5}, "linear_num_value_heads must be a multiple of linear_num"),
    (QWEN, {"layer_types": [SLIDING] * 24}, "holds 'sliding_attention'; layers of Qwen3_5"),
    (QWEN, {"rope_parameters": {"partial_rotary_factor": 1.5}}, "a head turn, which must be even"),
    (SMOL, {"no_rope_layers": [1] * 35}, "no_rope_layers has 35 entries, but there are 36"),
    (SMOL, {"no_rope_layers": [1] * 35 + [2]}, "no_rope_layers must be a list of 0 and 1"),
    (OLMO, {"mlp_bias": True}, "not supported for Olmo3ForCausalLM: mlp_bias=True"),
    (OLMO, {"hidden_size": None}, "missing or 0: head_dim, hidden_size"),
    (
        WINDOWED, {"use_sliding_window": False, "layer_types": [SLIDING] * 24},
        "but there is no window: use_sliding_window is false",
    ),
    (WINDOWED, {"num_hidden_layers": 10**6}, "1000000 layers; at most 4096 are read"),
    # transformers reads these keys of no such family, or fails
    (GEMMA, {"rope_parameters": {"rope_theta": 1e5}}, "rope_parameters of Gemma3ForCausalLM must"),
    (OLMO, {"rope_parameters": {"rope_theta": 1e5}}, "must be an object for each kind of layer"),
    (GEMMA, {"rope_scaling": {FULL: {"rope_theta": 2.0}}}, "rope_scaling of Gemma3ForCausalLM"),
    (SMOL, {"rope_parameters": {FULL: {"rope_theta": 1e5}}}, "must be the same for all layers"),
    (
        GEMMA, {"rope_parameters": {FULL: {}, SLIDING: {"type": "linear", "factor": 2.0}}},
        "rope_scaling={'type': 'linear', 'factor': 2.0}",
    ),
    (SMOL, {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}}, "factor of at most 2**20"),
    (SMOL, {"rope_theta": 0}, "rope_theta must be above 1, got 0"),
    (GEMMA, {"rope_local_base_freq": 1.0}, "rope_theta must be above 1, got 1.0"),
    (
        SMOL, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}},
        "rope_scaling of type llama3 needs low_freq_factor below high_freq_factor",
    ),
    (GEMMA, {"query_pre_attn_scalar": 0}, "missing or 0: query_pre_attn_scalar"),
    (SMOL, {"model_type": ["smollm3"]}, "model_type must be a text, got ['smollm3']"),
    (SMOL, {"model_type": "llama"}, "model_type llama is not that of SmolLM3ForCausalLM: smollm3"),
    (GEMMA_OUTER, {"model_type": "qwen3"}, "is not that of Gemma3ForCausalLM: gemma3_text"),
    (WINDOWED, {"sliding_window": 0}, "sliding_window must be at least 1, or null: no window"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "says"), REFUSED, ids=[f"{n}, {next(iter(c))}" for n, c, _ in REFUSED]
)
def test_what_would_be_computed_otherwise_is_refused_by_name(name, changes, says):
    """In the config of a released checkpoint, or in that of its text part: one line."""
    fields = dict(RELEASED[name])
    part = fields.get("text_config", {})
    if part and not fields.keys() & changes.keys() and "quantization_config" not in changes:
        fields["text_config"] = part | changes
    else:
        fields |= changes
    with pytest.raises(DataError) as caught:
        from_fields(fields, "config.json")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("meta-llama/Llama-3.2-1B", 131_072), (OLMO, 65_536), (GEMMA_OUTER, 131_072),
        (SMOL, 65_536), (QWEN, 262_144),
    ],
)  # fmt: skip
def test_the_context_of_released_checkpoints(name, tokens):
    """The declared one, which holds the stretch of Llama 3.2, Olmo 3 and Gemma 3 already."""
    assert context_tokens(from_fields(RELEASED[name], name)) == tokens


def test_the_context_that_is_stretched():
    """YaRN's factor counts where a file declares the trained context; dynamic frequencies and
    longrope end with it."""
    fields = RELEASED["Qwen/Qwen3-0.6B"] | {"max_position_embeddings": 32_768}
    trained = {"original_max_position_embeddings": 16_384}
    for scaling, tokens in (
        ({"rope_type": "yarn", "factor": 4.0}, 131_072),
        ({"rope_type": "linear", "factor": 2.0}, 65_536),
        ({"rope_type": "dynamic", "factor": 2.0}, 32_768),
        (LONG | trained | {"short_factor": [1.0] * 64}, 16_384),
    ):
        config = from_fields(fields | {"rope_scaling": scaling}, "config.json")
        assert context_tokens(config) == tokens
        assert from_fields(to_fields(config), "again") == config
