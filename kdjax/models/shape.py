"""The shape of a decoder: the numbers and options that its functions are made from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as `layer_types` names them; linear attention is the gated delta-net."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (models/layers/rope.py).

    dynamic and longrope are computed as they are within it; `context_tokens` is no longer.
    """

    rope_type: str  # linear, llama3, yarn, dynamic or longrope
    factor: float
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and options of a decoder, under Hugging Face's names where it has them.

    - layer_types: the kind of every layer; empty: all sliding where sliding_window is set, else all
      full. sliding_window is the window of sliding layers, local_rope_theta their own unscaled
      rotary positions (None: those of full layers). no_rope_layers: 0 at layers without rotary
      positions, 1 at others; empty: all have them.
    - norms: before the attention and the MLP (`before`), after them but before the sum (`after`),
      or both (`sandwich`); unit_offset: they multiply by 1 + weight.
    - qk_norm: of queries and keys, none, of each head, or of the whole width.
    - query_pre_attn_scalar: scores are divided by its root (None: head_dim).
    - output_gate: attention is multiplied by a sigmoid that q_proj computes, too.
    - scale_embedding: embeddings are multiplied by the root of hidden_size.
    - linear_*: heads, head dimensions and the convolution's width of linear attention.
    - num_experts: 0 is a dense MLP.
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
    partial_rotary_factor: float = 1.0
    local_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    hidden_act: str = "silu"
    norms: Literal["before", "after", "sandwich"] = "before"
    unit_offset: bool = False
    qk_norm: Literal["none", "head", "width"] = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    output_gate: bool = False
    query_pre_attn_scalar: float | None = None
    scale_embedding: bool = False
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False


class Rope(NamedTuple):
    """Rotary positions: of the first `width` entries of a head, base theta, stretched or not."""

    theta: float
    width: int
    scaling: RopeScaling | None = None


class LayerKind(NamedTuple):
    """What is static of a layer: its mixer of positions (one of FULL, SLIDING, LINEAR), how many
    positions it sees (None: all before it), and its rotary positions (None: it has none)."""

    mixer: str
    window: int | None = None
    rope: Rope | None = None


class Run(NamedTuple):
    """Layers first, first + 1, ...: a block of kinds, repeated. Position j of the block is stacked
    under the name of its first layer, str(first + j)."""

    first: int
    block: tuple[LayerKind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.block) * self.repeats


@functools.lru_cache(maxsize=256)
def layer_kinds(config: DecoderConfig) -> tuple[LayerKind, ...]:
    """The kind of every layer.

    >>> [kind.window for kind in layer_kinds(DecoderConfig(10, 4, 8, 2, 2, 1, 2, sliding_window=5))]
    [5, 5]
    """
    width = int(config.head_dim * config.partial_rotary_factor)
    rope = Rope(config.rope_theta, width, config.rope_scaling)
    local = rope if config.local_rope_theta is None else Rope(config.local_rope_theta, width)
    default = FULL if config.sliding_window is None else SLIDING
    count = config.num_hidden_layers
    kinds = {
        FULL: LayerKind(FULL, None, rope),
        SLIDING: LayerKind(SLIDING, config.sliding_window, local),
        LINEAR: LayerKind(LINEAR),
    }
    found = [kinds[name] for name in config.layer_types or (default,) * count]
    turned = config.no_rope_layers or (1,) * count
    return tuple(
        kind if has else kind._replace(rope=None) for kind, has in zip(found, turned, strict=True)
    )


LONGEST_BLOCK = 8


@functools.lru_cache(maxsize=256)
def runs(config: DecoderConfig) -> tuple[Run, ...]:
    """The layers as repeating blocks, so that the fewest layers are compiled, then in the fewest
    runs, then with the longest runs first.

    >>> kinds = (SLIDING, SLIDING, FULL) * 2 + (SLIDING,)
    >>> config = DecoderConfig(10, 4, 8, 7, 2, 1, 2, layer_types=kinds, sliding_window=5)
    >>> [(run.first, len(run.block), run.repeats) for run in runs(config)]
    [(0, 3, 2), (6, 1, 1)]
    """
    kinds = layer_kinds(config)
    best: dict[int, tuple[int, int, tuple[Run, ...]]] = {len(kinds): (0, 0, ())}
    for first in reversed(range(len(kinds))):
        choices = []
        for size in range(1, min(LONGEST_BLOCK, len(kinds) - first) + 1):
            block = kinds[first : first + size]
            end, repeats = first + size, 1
            while True:
                compiled, pieces, rest = best[end]
                choices.append((compiled + size, pieces + 1, (Run(first, block, repeats), *rest)))
                if kinds[end : end + size] != block:
                    break
                end, repeats = end + size, repeats + 1
        best[first] = min(choices, key=_length)
    return best[0][2]


def _length(choice: tuple[int, int, tuple[Run, ...]]) -> tuple:
    """(layers compiled, runs, less of the first run's layers)."""
    compiled, pieces, found = choice
    return compiled, pieces, -found[0].layers


WITHIN_CONTEXT = ("dynamic", "longrope")
"""Scalings that are computed within the trained context alone: longer rows are refused."""


def context_tokens(config: DecoderConfig) -> int:
    """The most tokens that a decoder was made for, its rotary frequencies stretched.

    >>> context_tokens(DecoderConfig(10, 4, 8, 1, 2, 1, 2, max_position_embeddings=2048))
    2048
    """
    scaling, declared = config.rope_scaling, config.max_position_embeddings
    if scaling is None:
        return declared
    trained = scaling.original_max_position_embeddings
    if scaling.rope_type in WITHIN_CONTEXT:
        return trained
    # Llama 3.1, Olmo 3 and Gemma 3 declare what is stretched
    declares_all = scaling.rope_type == "llama3" or config.local_rope_theta is not None
    return declared if declares_all else max(declared, int(scaling.factor * trained))
