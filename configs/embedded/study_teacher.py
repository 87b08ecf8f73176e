"""The teacher of the study, 0.33 M parameters: `kdjax:teacher`, trained on worked `recheck`.

python configs/embedded/rebuild_study.py
"""

from kdjax import Config, negative_log_likelihood
from kdjax.config import Curriculum, Data, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/embedded/study-teacher",
        student="kdjax:teacher",
        teacher=None,
        prefix="dataset",
        objective=negative_log_likelihood,
        steps=200,
        batch_size=32,
        data=Data(task="recheck", terms=(4, 5, 6, 7), problems=100_000, max_prompt_tokens=32),
        curriculum=Curriculum(lengths=(128,)),
        optimizer=Optimizer(learning_rate=1e-3, final_fraction=0.02),
        save_every_steps=100,
    )
