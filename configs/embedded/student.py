"""The embedded base student, 0.11 M parameters: the teacher's recipe, stopped early.

It is taken before its learning rate has decayed, so that much is left to learn.

python configs/embedded/rebuild.py
"""

from kdjax import Config, negative_log_likelihood
from kdjax.config import Data, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/embedded/student",
        student="runs/embedded/start/student",
        teacher=None,
        prefix="dataset",
        objective=negative_log_likelihood,
        steps=800,
        batch_size=64,
        data=Data(problems=100_000),
        optimizer=Optimizer(learning_rate=4e-3, final_fraction=1.0),
        seed=1,
        save_every_steps=100,
    )
