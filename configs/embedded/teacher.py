"""The embedded teacher, 0.33 M parameters: plain SFT on worked solutions.

Plain SFT is the dataset prefix with one-hot targets: no teacher, negative log-likelihood.

python configs/embedded/rebuild.py        (about 20 minutes on two CPU cores)
"""

from kdjax import Config, negative_log_likelihood
from kdjax.config import Data, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/embedded/teacher",
        student="runs/embedded/start/teacher",
        teacher=None,
        prefix="dataset",
        objective=negative_log_likelihood,
        steps=3000,
        batch_size=64,
        data=Data(problems=100_000),
        optimizer=Optimizer(learning_rate=3e-3, final_fraction=0.02),
        save_every_steps=500,
    )
