"""Models and tokenizers of other vocabularies: a model's own in another order, BPEs trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

EMBEDDINGS = "model.embed_tokens.weight", "lm_head.weight"


def permuted(folder, out: Path, seed: int = 0) -> np.ndarray:
    """A copy of a model whose tokens have other ids; the new id of each old one."""
    shutil.copytree(folder, out)
    path = out / "tokenizer.json"
    fields = json.loads(path.read_text())
    ids = dict(fields["model"]["vocab"]) | {t["content"]: t["id"] for t in fields["added_tokens"]}
    new = np.random.default_rng(seed).permutation(len(ids))
    fields["model"]["vocab"] = {name: int(new[i]) for name, i in ids.items()}
    for token in fields["added_tokens"]:
        token["id"] = int(new[token["id"]])
    fields["added_tokens"].sort(key=lambda token: token["id"])
    path.write_text(json.dumps(fields))
    generation = json.loads((out / "generation_config.json").read_text())
    generation["eos_token_id"] = [int(new[i]) for i in generation["eos_token_id"]]
    generation["pad_token_id"] = int(new[generation["pad_token_id"]])
    (out / "generation_config.json").write_text(json.dumps(generation))
    weights = load_file(out / "model.safetensors")
    for name in EMBEDDINGS:
        if name in weights:
            rows = weights[name].copy()
            rows[new] = weights[name][: len(new)]
            weights[name] = rows
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return new
