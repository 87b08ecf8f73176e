"""What of a student is trained, its own parameters or an adapter beside them, frozen; and how."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import optax

from kdjax.base import Key, Params
from kdjax.config import Config
from kdjax.config_json import as_dict
from kdjax.gate import POLICIES, entropy_gate
from kdjax.models import DecoderConfig
from kdjax.models.linear import LoRA
from kdjax.models.lora import init_adapter, join, make_lora, merge
from kdjax.optimizer import make_optimizer
from kdjax.timetable import measured_before, methods, turn_at, updates_of


class Student(NamedTuple):
    """The trained parameters at the start, and what stays beside them (None: nothing does)."""

    trained: Params
    frozen: Params | None = None
    lora: LoRA | None = None

    def whole(self, trained: Params) -> Params:
        """What the model without adapters reads, when these are the trained parameters."""
        return trained if self.lora is None else sampling_params(self.lora, self.frozen, trained)


def open_student(lora: LoRA | None, decoder: DecoderConfig, params: Params, key: Key) -> Student:
    """A model's parameters, divided: all of them trained, or an adapter beside them, frozen."""
    if lora is None:
        return Student(params)
    return Student(init_adapter(decoder, lora, key), params, lora)


def lora_of(config: Config, decoder: DecoderConfig) -> LoRA | None:
    """The adapters that a config asks for. Errors: ConfigError for one that this decoder can't
    have."""
    if not config.lora.rank:
        return None
    return make_lora(decoder, config.lora.rank, config.lora.alpha, config.lora.targets)


def optimizer_of(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config asks for, the gate's history as long as its run needs."""
    curriculum = config.curriculum
    gate = entropy_gate(
        curriculum.lengths,
        curriculum.entropy_threshold_nats,
        entropy_threshold_share=curriculum.entropy_threshold_share,
        policy=POLICIES[curriculum.policy],
        measurements=max(1, len(measured_before(config))),  # Orbax keeps no empty array
    )
    of_each = [updates_of(method) for method in methods(config)]
    updates = sum(of_each[turn_at(config, step)] for step in range(config.steps))
    return make_optimizer(steps=updates, gate=gate, **as_dict(config.optimizer))


@functools.partial(jax.jit, static_argnums=0)
def sampling_params(lora: LoRA, frozen: Params, trained: Params) -> Params:
    """The adapter merged into its base (models/lora.py), in the base's dtype."""
    merged = merge(join(frozen, trained), lora)
    return jax.tree.map(lambda w, like: w.astype(like.dtype), merged, frozen)
