"""Save and restore: a training state, and what the trainer says about it.

A checkpoint is a folder STEP, which one rename commits: `params`; `training`, the step and the
optimizer state with the gate; `about`, JSON with its sha256. Orbax, which only this room imports,
notices files that are gone or cut short, and no flipped bit: `about` holds a fingerprint of every
array, in the same commit.

The teacher is not saved: its name and the identity of its weights are.
"""

from kdjax.checkpoint.read import (
    About,
    DamagedError,
    measured,
    read_about,
    read_params,
    read_state,
    saved_steps,
)
from kdjax.checkpoint.write import Checkpoints, open_checkpoints

__all__ = [
    "About",
    "Checkpoints",
    "DamagedError",
    "measured",
    "open_checkpoints",
    "read_about",
    "read_params",
    "read_state",
    "saved_steps",
]
