"""Attention kernels that jax ships: cuDNN on NVIDIA GPUs, splash attention on TPUs.

They are opaque to XLA, so on a mesh each device runs them on its own rows and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.errors import ConfigError
from kdjax.sharding import BATCH, HEADS, KV_HEADS, map_sharded, pieces

GPU = ("gpu", "cuda")
"""jax's names of the platform of NVIDIA GPUs."""

LANES = 128
"""Splash attention works on blocks of a multiple of so many positions."""

SPLASH_BLOCKS = (512, 384, 256, 128)
"""Positions of a block: the first that divides the length. Larger ones exceed a core's memory."""

CUDNN_WIDEST = 128
"""The largest head dimension of cuDNN's kernel on every GPU (Hopper and later also have 256)."""


class Rows(NamedTuple):
    """The properties of rows that decide whether a kernel accepts them."""

    platform: str
    length: int
    head_dim: int
    dtype: jnp.dtype
    segmented: bool


class Kernel(NamedTuple):
    """attend(q, k, v, segment_ids, window, scale, platform) -> [B, T, H, D], as in `attention`;
    refusal(rows) -> why it does not accept such rows, None where it does."""

    attend: Callable[..., jax.Array]
    refusal: Callable[[Rows], str | None]


def _cudnn(q, k, v, segment_ids, window, scale, platform) -> jax.Array:
    """cuDNN's flash attention, linear memory; arguments as in `attention`. Errors: ConfigError
    where cuDNN is not installed."""
    del segment_ids, platform
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:  # jax asks for cuDNN's version while it traces
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"attention: impl 'cudnn' needs cuDNN on this machine, also to compile for another"
            f" ({why}); install \"kdjax[cuda]\" or take impl 'chunked'"
        ) from error


def _cudnn_refusal(rows: Rows) -> str | None:
    if rows.platform not in GPU:
        return f"runs on NVIDIA GPUs, not on {rows.platform}"
    if rows.segmented:
        return "takes no segment ids"
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not in {rows.dtype}"
    if rows.head_dim % 8 or rows.head_dim > CUDNN_WIDEST:
        return f"takes heads of a multiple of 8 up to {CUDNN_WIDEST}, not of {rows.head_dim}"
    return None


def _splash(q, k, v, segment_ids, window, scale, platform) -> jax.Array:
    """Splash attention, linear memory; arguments as in `attention`. Fully masked blocks are
    skipped. Interpreted (slowly) on a CPU.

    A group's queries attend to their one key head (`mqa`) under two vmaps. dq has a kernel of its
    own: the fused one keeps T / 512 copies of dq, 0.26 GiB instead of 0.09 at T = 4096.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, t, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block = next(size for size in SPLASH_BLOCKS if t % size == 0)
    mask = (
        masks.CausalMask((t, t))
        if window is None
        else masks.LocalMask((t, t), (window - 1, 0), offset=0)
    )
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (heads // kv_heads)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=platform == "cpu",
    )
    scaled = (q * scale).reshape(b, t, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # a row's segments are those of its heads
    of_rows = jax.vmap(of_heads)
    out = of_rows(scaled, k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _splash_refusal(rows: Rows) -> str | None:
    if rows.platform not in ("tpu", "cpu"):
        return f"runs on TPUs (and interpreted on a CPU), not on {rows.platform}"
    if rows.length % LANES:
        return f"takes lengths of a multiple of {LANES}, not {rows.length}"
    if rows.dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, not in {rows.dtype}"
    return None


KERNELS = {"cudnn": Kernel(_cudnn, _cudnn_refusal), "splash": Kernel(_splash, _splash_refusal)}

PREFERRED = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
"""Platform -> its own kernel."""


def sharded_kernel(
    name: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    platform: str,
    mesh: Mesh | None,
) -> jax.Array:
    """A kernel on every device's own rows and heads -> [B, T, H, D].

    Where query heads can be sharded over the tensor axis but key heads can't, key heads are
    repeated until they can, so that each device has those that its queries read.

    Args:
        name: one of KERNELS.
        q, k, v, segment_ids, window, scale, platform, mesh: as in `attention`.

    Errors: ConfigError with the reason why the kernel can't.
    """
    rows = Rows(platform, q.shape[1], q.shape[3], q.dtype, segment_ids is not None)
    refusal = KERNELS[name].refusal(rows)
    if refusal:
        raise ConfigError(f"attention: impl {name!r} {refusal}; take impl 'chunked' or 'auto'")
    parts = pieces(mesh, HEADS)
    if q.shape[2] % parts == 0 and k.shape[2] % parts:
        copies = math.lcm(k.shape[2], parts) // k.shape[2]
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))

    def attend(q, k, v, segment_ids=None):
        return KERNELS[name].attend(q, k, v, segment_ids, window, scale, platform)

    queries, keys = (BATCH, None, HEADS, None), (BATCH, None, KV_HEADS, None)
    segments = () if segment_ids is None else (segment_ids,)
    in_axes = (queries, keys, keys, *((BATCH, None) for _ in segments))
    return map_sharded(mesh, attend, in_axes, queries, q, k, v, *segments, check_vma=False)
