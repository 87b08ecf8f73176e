"""The embedded tasks by the name that users import: `kdjax.data.tasks`."""

from kdjax.data.tasks import SPLITS, TASKS, Make, problem, split_of

__all__ = ["SPLITS", "TASKS", "Make", "problem", "split_of"]
