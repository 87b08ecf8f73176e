"""An embedded student that can read a worked solution: `kdjax:student`, trained on chains three of
four of which have their solution before them.

    kdjax train embedded/reader
    kdjax export runs/embedded/reader reader
"""

from kdjax import Config, negative_log_likelihood
from kdjax.config import Data, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/embedded/reader",
        teacher=None,
        prefix="dataset",
        objective=negative_log_likelihood,
        steps=800,
        batch_size=32,
        data=Data(task="shown", problems=40_000, max_prompt_tokens=112),
        optimizer=Optimizer(learning_rate=3e-3, final_fraction=0.8),
        save_every_steps=200,
    )
