"""Kernels stored as int8 with a scale for each output channel, by qwix, dequantised where used.

A kernel [..., in, out] becomes {"qvalue": int8 [..., in, out], "scale": float32 [..., 1, out]},
the fields of qwix's `QArray`, so that parameters stay a nested dict of arrays whose leading axes
(layers, experts) are sliced alike. Embedding and LM head are not quantised, as the head decides the
KL; nor are norms, biases and what is SENSITIVE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax.base import Params
from kdjax.errors import ConfigError
from kdjax.sharding import gathered

Hold = Callable[[tuple[str, ...], jax.Array], Any]
"""(the path of a parameter, the parameter) -> how it is stored: an array, or a quantised kernel."""


SENSITIVE = {"router", "in_proj_a", "in_proj_b"}
"""Small kernels that decide much: which experts, and how fast a state fades."""


def int8(names: tuple[str, ...], weight: jax.Array) -> Any:
    """A layer's kernel in int8, any other parameter as it is (a `Hold`).

    scale = max over `in` of |kernel| / 127.5, qvalue = round(kernel / scale) within -128..127: no
    entry moves by more than half its scale (and rounding in float32). Errors: ConfigError where
    qwix is not installed.

    >>> kernel = int8(("layers", "q_proj", "kernel"), jnp.array([[1.0], [-0.5]]))
    >>> [int(x) for x in kernel["qvalue"][:, 0]]
    [127, -64]
    """
    if names[0] != "layers" or names[-1] != "kernel" or {*names} & SENSITIVE:
        return weight
    made = _qwix().quantize(
        weight.astype(jnp.float32),  # or else quotients are rounded twice, and scales to 8 bits
        jnp.int8,
        channelwise_axes=[axis for axis in range(weight.ndim) if axis != weight.ndim - 2],
    )
    return {"qvalue": made.qvalue, "scale": made.scale}


def held_by(hold: Hold, params: Params) -> Params:
    """Parameters, each stored as `hold` says."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: hold(tuple(p.key for p in path), w), params
    )


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree of parameters is a quantised kernel."""
    return isinstance(node, dict) and node.keys() == {"qvalue", "scale"}


def parameter_total(params: Params) -> int:
    """The number of a model's parameters; scales are not counted."""
    nodes = jax.tree.leaves(params, is_leaf=is_quantized)
    return sum((node["qvalue"] if is_quantized(node) else node).size for node in nodes)


def with_barrier(params: Params, x: jax.Array) -> tuple[Params, jax.Array]:
    """A layer's parameters and its input behind a barrier: no quantised kernel is dequantised
    before x is computed.

    Without it XLA on GPUs dequantises every layer once, before the loop over tokens, and holds the
    unquantised model after all (compiled for an H100: temporaries of 45.4 MiB, not 14.6, for 26.7
    of weights).
    """
    if not any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        return params, x
    return jax.lax.optimization_barrier((params, x))


def used(mesh: Mesh | None, weight: Any, dtype: DTypeLike, axes: Sequence[str | None]) -> jax.Array:
    """A parameter as a layer reads it, gathered along its width (`sharding.gathered`); a quantised
    kernel is gathered as int8, then qvalue * scale, rounded to `dtype` once."""
    if not is_quantized(weight):
        return gathered(mesh, weight, dtype, axes)
    made = _qwix().QArray(
        gathered(mesh, weight["qvalue"], jnp.int8, axes),
        gathered(mesh, weight["scale"], jnp.float32, scale_axes(axes)),
    )
    return _qwix().dequantize(made).astype(dtype)


def scale_axes(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The logical axes of a kernel's scale: those of its output channels."""
    return (*axes[:-2], None, axes[-1])


def _qwix() -> ModuleType:
    try:
        import qwix  # optional, and slow to load
    except ImportError as error:
        raise ConfigError(
            'teacher_weights int8 needs qwix, which is not installed: pip install "kdjax[int8]"'
        ) from error
    return qwix
