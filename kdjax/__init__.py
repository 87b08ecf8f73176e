"""kdjax: distillation of language models in JAX, where a method is two choices.

Which prefixes the student is trained on (`from_teacher`, `from_student`, `from_dataset`) and how
two next-token distributions are compared (`forward_kl`, `reverse_kl`, or any composition) are
independent: "Decoupling KL and Trajectories", arXiv 2605.16826.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import models
    from kdjax.base import Batch, Model, Rollout, Sampling, Scores, TrainState, WeightedSum
    from kdjax.config import Config, Study, Turn
    from kdjax.data import tasks
    from kdjax.data.batches import encode_batch, file_source, named_source, task_source
    from kdjax.data.tokenizer import Wording, load_tokenizer
    from kdjax.grading.rewards import accuracy
    from kdjax.losses.combinators import add, at_temperature, clip, mix, scale
    from kdjax.losses.composition import linear, switch
    from kdjax.losses.divergences import (
        adaptive_kl,
        alpha_divergence,
        at_top_k,
        jensen_shannon,
        skew_forward_kl,
        skew_reverse_kl,
        token_wise_kl,
        total_variation,
    )
    from kdjax.losses.grpo import (
        centered,
        clipped_surrogate,
        group_advantage,
        importance,
        leave_one_out,
        negative_entropy,
        standardized,
    )
    from kdjax.losses.kl import forward_kl, reverse_kl
    from kdjax.losses.objectives import (
        bounded,
        divergence,
        extrapolated,
        forward_divergence,
        log_compressed,
        log_ratio,
        negative_log_likelihood,
        policy_gradient,
        power_difference,
        reference_log_ratio,
        reverse_divergence,
        where_teacher_unsure,
    )
    from kdjax.losses.reductions import (
        finished_only,
        first_tokens,
        most_uncertain,
        paced,
        sequence_mean,
        token_mean,
    )
    from kdjax.rollouts.prefix import from_dataset, from_student, from_teacher
    from kdjax.rollouts.sampler import generate, open_sampler
    from kdjax.step.gate import entropy_gate, rollout_length
    from kdjax.step.optimizer import make_optimizer
    from kdjax.step.score import HeadPlan
    from kdjax.step.stops import Stops
    from kdjax.step.update import init_state, make_step

# No name here may also be the name of a module: importing the module would hide it.
_HOME = {
    "losses.objectives": (
        "bounded", "extrapolated", "log_compressed", "log_ratio", "policy_gradient",
        "power_difference", "reference_log_ratio", "divergence", "forward_divergence",
        "negative_log_likelihood", "reverse_divergence", "where_teacher_unsure",
    ),
    "base": ("Batch", "Model", "Rollout", "Sampling", "Scores", "TrainState", "WeightedSum"),
    "losses.composition": ("linear", "switch"),
    "config": ("Config", "Study", "Turn"),
    "data.batches": ("encode_batch", "file_source", "named_source", "task_source"),
    "losses.divergences": (
        "adaptive_kl", "alpha_divergence", "at_top_k", "jensen_shannon", "skew_forward_kl",
        "skew_reverse_kl", "token_wise_kl", "total_variation",
    ),
    "step.gate": ("entropy_gate", "rollout_length"),
    "losses.grpo": (
        "centered", "clipped_surrogate", "group_advantage", "importance", "leave_one_out",
        "negative_entropy", "standardized",
    ),
    "losses.kl": ("forward_kl", "reverse_kl"),
    "losses.combinators": ("add", "at_temperature", "clip", "mix", "scale"),
    "step.optimizer": ("make_optimizer",),
    "losses.reductions": (
        "finished_only", "first_tokens", "most_uncertain", "paced", "sequence_mean", "token_mean",
    ),
    "grading.rewards": ("accuracy",),
    "rollouts.prefix": ("from_dataset", "from_student", "from_teacher"),
    "rollouts.sampler": ("generate", "open_sampler",),
    "step.update": ("init_state", "make_step"),
    "step.score": ("HeadPlan",),
    "step.stops": ("Stops",),
    "data.tokenizer": ("Wording", "load_tokenizer"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF, "models", "tasks"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import kdjax` and `kdjax --help` are quick."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"kdjax.{_MODULE_OF[name]}"), name)
    if name == "models":
        return importlib.import_module("kdjax.models")
    if name == "tasks":
        return importlib.import_module("kdjax.data.tasks")
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
