"""The paper's preset on random weights of the true shapes: load, train a step, export, reload.

    python configs/paper/rehearse.py                     # Qwen3-0.6B-Base, taught by Qwen3-0.6B
    python configs/paper/rehearse.py FOLDER STUDENT TEACHER

It shows that a machine holds the run, before a checkpoint is downloaded: everything is as in
qwen3_4b_to_06b.py but for the weights, the tokenizer and problems (the embedded ones) and the sizes
of the batch. The reload compares logits with transformers where torch is installed.
docs/real_models.md has what was seen.
"""

import dataclasses
import resource
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.config import Curriculum, Data, Evaluation
from kdjax.export import export
from kdjax.models.known import KNOWN
from kdjax.numerics import project
from kdjax.training.loop import train


def main(folder: str = "runs/rehearsal", *names: str) -> None:
    student, teacher = names or ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B")
    place = Path(folder)
    for number, (role, name) in enumerate({"student": student, "teacher": teacher}.items()):
        if not (place / role).exists():
            with timed(f"random weights of the shapes of {name}"):
                models.create(
                    place / role, KNOWN[name].config, models.find("kdjax:student"), number
                )
    preset = runpy.run_path(str(Path(__file__).with_name("qwen3_4b_to_06b.py")))["get_config"]()
    config = dataclasses.replace(
        preset,
        run=str(place / "run"),
        student=str(place / "student"),
        teacher=str(place / "teacher"),
        steps=1,
        batch_size=2 * jax.local_device_count(),
        log_every_steps=1,
        data=Data(max_prompt_tokens=28, problems=64),
        curriculum=Curriculum(lengths=(16,)),
        evaluation=Evaluation(problems=2, samples=1, k=(1,), max_new_tokens=16, batch_size=2),
        cache=str(place / "cache"),
    )
    with timed("one step, its checkpoint and an evaluation"):
        train(config)
    with timed("export"):
        export(config.run, place / "exported", jnp.bfloat16)
    with timed("reload and compare with transformers"):
        compare(place / "exported")


class timed:
    """Say what was done, how long it took, and the peak of memory so far."""

    def __init__(self, what: str):
        self.what, self.began = what, time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        took = time.perf_counter() - self.began
        print(f"{self.what}: {took:.1f} s; peak memory {peak:.1f} GiB", flush=True)


def compare(folder: Path) -> None:
    """float32 logits of the exported folder, here and in transformers."""
    tokens = np.random.default_rng(0).integers(0, 270, (1, 24))
    model, params = models.load(folder)
    ours = jax.jit(lambda p, t: project(model.hidden(p, t), model.head(p)))(params, tokens)
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("torch is not installed: the export was reloaded here only")
        return
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    print(f"largest difference of logits: {np.abs(np.asarray(ours) - theirs).max():.2e}")
    print(f"their standard deviation: {theirs.std():.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
