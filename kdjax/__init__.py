"""kdjax: distillation of language models in JAX, where a method is two choices.

Which prefixes the student is trained on (`from_teacher`, `from_student`, `from_dataset`) and how
two next-token distributions are compared (`forward_kl`, `reverse_kl`, or any composition) are
independent: "Decoupling KL and Trajectories", arXiv 2605.16826.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import models, tasks
    from kdjax.advantage import (
        bounded,
        extrapolated,
        log_compressed,
        log_ratio,
        policy_gradient,
        power_difference,
        reference_log_ratio,
    )
    from kdjax.base import Batch, Model, Rollout, Sampling, Scores, TrainState, WeightedSum
    from kdjax.composition import linear, switch
    from kdjax.config import Config, Study, Turn
    from kdjax.data import encode_batch, file_source, named_source, task_source
    from kdjax.divergences import (
        adaptive_kl,
        alpha_divergence,
        at_top_k,
        jensen_shannon,
        skew_forward_kl,
        skew_reverse_kl,
        token_wise_kl,
        total_variation,
    )
    from kdjax.gate import entropy_gate, rollout_length
    from kdjax.grpo import (
        centered,
        clipped_surrogate,
        group_advantage,
        importance,
        leave_one_out,
        negative_entropy,
        standardized,
    )
    from kdjax.kl import forward_kl, reverse_kl
    from kdjax.objective import (
        add,
        at_temperature,
        clip,
        divergence,
        forward_divergence,
        mix,
        negative_log_likelihood,
        reverse_divergence,
        scale,
        where_teacher_unsure,
    )
    from kdjax.optimizer import make_optimizer
    from kdjax.reduction import (
        finished_only,
        first_tokens,
        most_uncertain,
        paced,
        sequence_mean,
        token_mean,
    )
    from kdjax.rewards import accuracy
    from kdjax.rollout import from_dataset, from_student, from_teacher
    from kdjax.sampler import generate, open_sampler
    from kdjax.step import init_state, make_step
    from kdjax.stops import Stops
    from kdjax.tokenizer import Wording, load_tokenizer

# No name here may also be the name of a module: importing the module would hide it.
_HOME = {
    "advantage": (
        "bounded", "extrapolated", "log_compressed", "log_ratio", "policy_gradient",
        "power_difference", "reference_log_ratio",
    ),
    "base": ("Batch", "Model", "Rollout", "Sampling", "Scores", "TrainState", "WeightedSum"),
    "composition": ("linear", "switch"),
    "config": ("Config", "Study", "Turn"),
    "data": ("encode_batch", "file_source", "named_source", "task_source"),
    "divergences": (
        "adaptive_kl", "alpha_divergence", "at_top_k", "jensen_shannon", "skew_forward_kl",
        "skew_reverse_kl", "token_wise_kl", "total_variation",
    ),
    "gate": ("entropy_gate", "rollout_length"),
    "grpo": (
        "centered", "clipped_surrogate", "group_advantage", "importance", "leave_one_out",
        "negative_entropy", "standardized",
    ),
    "kl": ("forward_kl", "reverse_kl"),
    "objective": (
        "add", "at_temperature", "clip", "divergence", "forward_divergence", "mix",
        "negative_log_likelihood", "reverse_divergence", "scale", "where_teacher_unsure",
    ),
    "optimizer": ("make_optimizer",),
    "reduction": (
        "finished_only", "first_tokens", "most_uncertain", "paced", "sequence_mean", "token_mean",
    ),
    "rewards": ("accuracy",),
    "rollout": ("from_dataset", "from_student", "from_teacher"),
    "sampler": ("generate", "open_sampler",),
    "step": ("init_state", "make_step"),
    "stops": ("Stops",),
    "tokenizer": ("Wording", "load_tokenizer"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF, "models", "tasks"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import kdjax` and `kdjax --help` are quick."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"kdjax.{_MODULE_OF[name]}"), name)
    if name in ("models", "tasks"):
        return importlib.import_module(f"kdjax.{name}")
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
