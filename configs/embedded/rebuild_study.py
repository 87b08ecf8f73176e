"""Rebuild the study's models from the shipped `kdjax:teacher` and `kdjax:student`.

    python configs/embedded/rebuild_study.py [OUT]        (default OUT: runs/embedded/assets)

The package's own copies in kdjax/models/assets were made by this command; see docs/embedded.md.
"""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp

from kdjax import Config, models
from kdjax.data.tokenizer import load_tokenizer
from kdjax.export import export
from kdjax.runtime.files import whole_folder
from kdjax.training.loop import train

HERE = Path(__file__).parent
BASE_STOP = "<|endoftext|>"


def main(out: Path) -> None:
    teacher, student = (
        runpy.run_path(str(HERE / f"{name}.py"))["get_config"]()
        for name in ("study_teacher", "study_student")
    )
    for config in (teacher, student, ending_differently(student)):
        train(config)
        name = Path(config.run).name
        export(config.run, out / name, jnp.bfloat16)
        print(f"wrote {out / name}")


def ending_differently(config: Config) -> Config:
    """The same student and recipe, but a response ends with `<|endoftext|>`, as a base model's does
    whose chat teacher ends with `<|im_end|>`."""
    folder = Path("runs/embedded/start/study-student-endoftext")
    if not folder.exists():
        with whole_folder(folder) as partial:
            shutil.copytree(models.find(config.student), partial, dirs_exist_ok=True)
            (end,) = load_tokenizer(partial).encode(BASE_STOP)
            for name, fields in {
                "tokenizer_config.json": {"eos_token": BASE_STOP},
                "generation_config.json": {"eos_token_id": end},
            }.items():
                found = json.loads((partial / name).read_text(encoding="utf-8"))
                (partial / name).write_text(
                    json.dumps(found | fields, indent=2) + "\n", encoding="utf-8"
                )
    return dataclasses.replace(config, run=f"{config.run}-endoftext", student=str(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/embedded/assets"))
