"""The config of an experiment: its fields, names, checks and text."""

from kdjax.config.engines import Rollouts, Served
from kdjax.config.schema import (
    RL,
    WHERE_IT_RUNS,
    Checkpointing,
    Config,
    Curriculum,
    Data,
    Evaluation,
    Faults,
    Layout,
    Lora,
    Optimizer,
    Study,
    Turn,
)
from kdjax.config.teachers import teacher_models

__all__ = [
    "RL", "WHERE_IT_RUNS", "Checkpointing", "Config", "Curriculum", "Data", "Evaluation", "Faults",
    "Layout", "Lora", "Optimizer", "Rollouts", "Served", "Study", "Turn", "teacher_models",
]  # fmt: skip
