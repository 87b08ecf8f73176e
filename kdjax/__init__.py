"""kdjax: distillation of language models in JAX, where a method is two choices.

Which prefixes the student is trained on (`from_teacher`, `from_student`, `from_dataset`) and how
two next-token distributions are compared (`forward_kl`, `reverse_kl`, or any composition) are
independent: "Decoupling KL and Trajectories", arXiv 2605.16826.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import models, tasks
    from kdjax.base import Batch, Model, Rollout, Sampling, Scores, TrainState, WeightedSum
    from kdjax.config import Config, Study, Turn
    from kdjax.data.batches import encode_batch, file_source, named_source, task_source
    from kdjax.data.tokenizer import Wording, load_tokenizer
    from kdjax.grading.rewards import accuracy
    from kdjax.losses.combinators import *
    from kdjax.losses.composition import *
    from kdjax.losses.divergences import *
    from kdjax.losses.grpo import *
    from kdjax.losses.kl import *
    from kdjax.losses.objectives import *
    from kdjax.losses.reductions import *
    from kdjax.losses.selection import *
    from kdjax.rollouts.prefix import from_dataset, from_student, from_teacher
    from kdjax.rollouts.sampler import generate, open_sampler
    from kdjax.step.gate import entropy_gate, rollout_length
    from kdjax.step.optimizer import make_optimizer
    from kdjax.step.score import HeadPlan
    from kdjax.step.stops import Stops
    from kdjax.step.update import init_state, make_step

# Of the losses those of their tables come beside these. No name may also be the name of a module:
# importing the module would hide it; and none that of Python's (`rewards.math`).
_HOME = {
    "base": ("Batch", "Model", "Rollout", "Sampling", "Scores", "TrainState", "WeightedSum"),
    "config": ("Config", "Study", "Turn"),
    "data.batches": ("encode_batch", "file_source", "named_source", "task_source"),
    "step.gate": ("entropy_gate", "rollout_length"),
    "step.optimizer": ("make_optimizer",),
    "grading.rewards": ("accuracy",),
    "rollouts.prefix": ("from_dataset", "from_student", "from_teacher"),
    "rollouts.sampler": ("generate", "open_sampler"),
    "step.update": ("init_state", "make_step"),
    "step.score": ("HeadPlan",),
    "step.stops": ("Stops",),
    "data.tokenizer": ("Wording", "load_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_ROOM_OF = {"models": "kdjax.models", "tasks": "kdjax.tasks"}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import kdjax` and `kdjax --help` are quick."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"kdjax.{_MODULE_OF[name]}"), name)
    if name in _ROOM_OF:
        return importlib.import_module(_ROOM_OF[name])
    if name == "__version__":
        try:
            return importlib.metadata.version("kdjax")
        except importlib.metadata.PackageNotFoundError:  # it is run from its folder
            return "not installed"
    if name == "__all__":
        return [*_MODULE_OF, *_ROOM_OF, *_losses()]
    # not for a name that Python asks every module for, or for a module that is about to be imported
    asked = name.isidentifier() and not name.startswith("_")
    asked = asked and importlib.util.find_spec(f"kdjax.{name}") is None
    if asked and name in (losses := _losses()):
        return losses[name]
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}")


def _losses() -> dict[str, Any]:
    losses = importlib.import_module("kdjax.losses")
    return losses.named(*losses.TABLES)
