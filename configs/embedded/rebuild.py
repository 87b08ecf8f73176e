"""Rebuild the models that kdjax ships: tokenizer, random start, training by kdjax itself, export.

    python configs/embedded/rebuild.py [OUT]        (default OUT: runs/embedded/assets)

The package's own copy in kdjax/models/assets was made by this command; see docs/embedded.md.
"""

import runpy
import sys
from pathlib import Path

from kdjax import models
from kdjax.data.tasks.vocabulary import write_tokenizer
from kdjax.data.tokenizer import load_tokenizer
from kdjax.export import export
from kdjax.models import DecoderConfig
from kdjax.training.loop import train

HERE = Path(__file__).parent
SHAPES = {
    "teacher": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, head_dim=24),
    "student": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, head_dim=16),
}
SEEDS = {"teacher": 0, "student": 1}


def main(out: Path) -> None:
    tokenizer = Path("runs/embedded/tokenizer")
    write_tokenizer(tokenizer)
    for name, shape in SHAPES.items():
        config = runpy.run_path(str(HERE / f"{name}.py"))["get_config"]()
        if not Path(config.student).exists():
            size = load_tokenizer(tokenizer).size
            decoder = DecoderConfig(
                vocab_size=size, num_attention_heads=4, num_key_value_heads=2, **shape
            )
            models.create(config.student, decoder, tokenizer, SEEDS[name])
        train(config)
        export(config.run, out / name)
        print(f"wrote {out / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/embedded/assets"))
