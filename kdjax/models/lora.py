"""Low-rank adapters (arXiv 2106.09685) as trees of parameters: made, joined to their base, merged.

W is frozen, A [in, r] and B [r, out] are trained: y = x W + alpha / r x A B. Parameters are nested
dicts, and an adapter is the same dict with only its own leaves in it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Key, Params
from kdjax.errors import ConfigError
from kdjax.models.hf.tensors import Place, tensors
from kdjax.models.layers.linear import PROJECTIONS, LoRA
from kdjax.models.parameters import init_params
from kdjax.models.shape import DecoderConfig
from kdjax.runtime.files import new_folder

ADAPTER_LEAVES = ("lora_a", "lora_b")


def make_lora(
    config: DecoderConfig, rank: int, alpha: float, targets: tuple[str, ...]
) -> LoRA | None:
    """The adapters of a decoder, None at rank 0; no targets: all projections outside the experts.

    Errors: ConfigError naming a target that is no projection, or one inside experts.

    >>> make_lora(DecoderConfig(10, 4, 8, 1, 2, 1, 2), 2, 4.0, ("q_proj",)).targets
    ('q_proj',)
    """
    if not rank:
        return None
    present = tuple(dict.fromkeys(place.path[-2] for place in _adapted(config).values()))
    for name in targets:
        if name in PROJECTIONS and name not in present:
            raise ConfigError(
                f"lora.targets: {name} is not in this model, or inside its experts, which can't be"
                f" adapted; choose among {list(present)}"
            )
    return LoRA(rank, alpha, targets or present)


def init_adapter(config: DecoderConfig, lora: LoRA, key: Key) -> Params:
    """The adapter's leaves alone, float32, layers stacked on axis 0: A random, B zero, so A B = 0.

    Compiled, so that the decoder's other parameters are never made.
    """
    return jax.jit(lambda key: adapter_of(init_params(config, key, lora)))(key)


def adapter_of(params: Params) -> Params:
    """The adapter's leaves alone; join(base, adapter_of(params)) is params again.

    >>> adapter_of({"q_proj": {"kernel": 1, "lora_a": 2}, "norm": 3})
    {'q_proj': {'lora_a': 2}}
    """
    return _split(params)[1]


def join(base: Params, adapter: Params) -> Params:
    """The union of two nested dicts without a common leaf: join({}, p) and join(p, {}) are p.

    Errors: ConfigError naming a leaf that both hold.

    >>> join({"q_proj": {"kernel": 1}, "norm": 3}, {"q_proj": {"lora_a": 2}})
    {'q_proj': {'kernel': 1, 'lora_a': 2}, 'norm': 3}
    """
    if not isinstance(base, dict) or not base:
        return adapter
    joined = dict(base)
    for name, leaf in adapter.items():
        both = name in base
        if both and not (isinstance(leaf, dict) and isinstance(base[name], dict)):
            raise ConfigError(f"parameter {name} is frozen and trained; it must be one of the two")
        joined[name] = join(base[name], leaf) if both else leaf
    return joined


def merge(params: Params, lora: LoRA) -> Params:
    """Parameters for a decoder without adapters: kernels W + alpha / r A B in float32, all else as
    it is. Its hidden states are those of the decoder with adapters.

    >>> ones = {"kernel": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
    >>> float(merge({"q_proj": ones}, LoRA(1, 4.0))["q_proj"]["kernel"][0, 0])
    5.0
    """
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        return {name: merge(leaf, lora) for name, leaf in params.items()}
    base, adapter = _split(params)
    a, b = (adapter[name].astype(jnp.float32) for name in ADAPTER_LEAVES)
    product = jnp.einsum("...ir,...ro->...io", a, b, precision=jax.lax.Precision.HIGHEST)
    kernel = base["kernel"].astype(jnp.float32) + lora.alpha / lora.rank * product
    return {**base, "kernel": kernel}


def write_adapter(
    folder: Path, adapter: Params, config: DecoderConfig, lora: LoRA, base: Path
) -> None:
    """Write a folder that peft loads onto the model of another.

    Args:
        folder: where to.
        adapter: the adapter's leaves, layers stacked on axis 0.
        config: the base's shapes.
        lora: rank, alpha and targets.
        base: the model folder that peft is to load it onto.

    Errors: StorageError.
    """
    from safetensors.numpy import save

    named = dict(_peft_tensors(adapter, config))
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as partial:
        (partial / "adapter_model.safetensors").write_bytes(save(named, {"format": "pt"}))
        (partial / "adapter_config.json").write_text(
            json.dumps(about, indent=2) + "\n", encoding="utf-8"
        )


def _peft_tensors(adapter: Params, config: DecoderConfig):
    """(peft's name, weight in torch's layout: A [r, in], B [out, r]) of each layer and target."""
    for name, place in _adapted(config).items():
        pair = adapter
        for key in place.path[:-1]:
            pair = pair.get(key, {})
        for leaf, spelled in zip(ADAPTER_LEAVES, ("lora_A", "lora_B"), strict=True):
            if leaf in pair:
                weight = np.asarray(pair[leaf][place.at], np.float32)
                full = f"base_model.model.{name.removesuffix('.weight')}.{spelled}.weight"
                yield full, np.ascontiguousarray(weight.T)


def _adapted(config: DecoderConfig) -> dict[str, Place]:
    """The kernels outside the experts, by their checkpoint name."""
    return {
        name: place
        for name, place in tensors(config).items()
        if place.path[-1] == "kernel" and "experts" not in place.path
    }


def _split(params: Params) -> tuple[Params, Params]:
    """(the base, the adapter): `join` undone. Dicts that hold nothing are left out."""
    base: Params = {}
    adapter: Params = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            halves = _split(leaf)
        else:
            halves = ({}, leaf) if name in ADAPTER_LEAVES else (leaf, {})
        for kept, half in zip((base, adapter), halves, strict=True):
            if not (isinstance(half, dict) and not half):
                kept[name] = half
    return base, adapter


class Student(NamedTuple):
    """The initial trained parameters, and the frozen ones of a student with an adapter."""

    trained: Params
    frozen: Params | None = None
    lora: LoRA | None = None

    def whole(self, trained: Params) -> Params:
        """The parameters of the model without adapters, when these are the trained ones."""
        return trained if self.lora is None else sampling_params(self.lora, self.frozen, trained)


def open_student(lora: LoRA | None, decoder: DecoderConfig, params: Params, key: Key) -> Student:
    """A model's parameters, split: all of them trained, or all frozen and a new adapter trained."""
    if lora is None:
        return Student(params)
    return Student(init_adapter(decoder, lora, key), params, lora)


@functools.partial(jax.jit, static_argnums=0)
def sampling_params(lora: LoRA, frozen: Params, trained: Params) -> Params:
    """The adapter merged into its base (models/lora.py), in the base's dtype."""
    merged = merge(join(frozen, trained), lora)
    return jax.tree.map(lambda w, like: w.astype(like.dtype), merged, frozen)
