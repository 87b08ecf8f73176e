"""The base student of the study, 0.11 M parameters: `kdjax:student`, trained on worked `recheck`.

Its rate does not decay, so that much is left to learn (docs/embedded.md says why).

python configs/embedded/rebuild_study.py
"""

from kdjax import Config, negative_log_likelihood
from kdjax.config import Curriculum, Data, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/embedded/study-student",
        student="kdjax:student",
        teacher=None,
        prefix="dataset",
        objective=negative_log_likelihood,
        steps=250,
        batch_size=32,
        data=Data(task="recheck", terms=(4, 5, 6, 7), problems=100_000, max_prompt_tokens=32),
        curriculum=Curriculum(lengths=(128,)),
        optimizer=Optimizer(learning_rate=3e-3, final_fraction=1.0),
        seed=1,
        save_every_steps=100,
    )
