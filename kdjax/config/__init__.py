"""The config of an experiment: its fields, names, checks and text."""

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
    Rollouts,
    Study,
    Turn,
)
from kdjax.config.teachers import teacher_models

__all__ = [
    "RL", "WHERE_IT_RUNS", "Checkpointing", "Config", "Curriculum", "Data", "Evaluation", "Faults",
    "Layout", "Lora", "Optimizer", "Rollouts", "Study", "Turn", "teacher_models",
]  # fmt: skip
