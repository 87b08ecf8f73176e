"""A reference model: what it thinks of the tokens that are trained on, for objectives that ask."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from kdjax import models
from kdjax.base import ConfigError, Rollout
from kdjax.config import Config
from kdjax.models import DecoderConfig
from kdjax.programs import Programs, jitted_logp, logp_settings
from kdjax.tokenizer import Tokenizer, load_pair


def read_reference(config: Config) -> DecoderConfig | None:
    """The reference's shape, from its folder."""
    return None if config.reference is None else models.read_config(models.find(config.reference))


def open_reference(
    config: Config, programs: Programs, tokenizer: Tokenizer
) -> Callable[[Rollout], Rollout]:
    """refer(rollout) -> the rollout with the reference's log-probability of each response token,
    under the stop policy of the run; the rollout itself where the config has no reference.

    Errors: ConfigError for a reference with fewer tokens than are in use.
    """
    model, mesh = programs.reference, programs.mesh
    if config.reference is None or model is None:
        return lambda rollout: rollout
    own, _ = load_pair(models.find(config.student), models.find(config.reference))
    if own.size < tokenizer.size:
        raise ConfigError(
            f"reference {config.reference} has {own.size} of the {tokenizer.size} tokens that"
            " student and teacher share; choose one of their family"
        )
    folder = models.find(config.reference)
    _, params = models.load(folder, mesh, params_dtype=jnp.dtype(config.dtype))
    settings = logp_settings(config, programs, tokenizer.size)

    def refer(rollout: Rollout) -> Rollout:
        return rollout._replace(reference_logp_bt=jitted_logp(model, params, rollout, **settings))

    return refer
