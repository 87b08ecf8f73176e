"""Other vocabularies: a model's own in another order, and tokenizers trained here."""

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


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}A:"


def byte_level(out: Path, texts, size: int, stop: str = "<|end|>") -> Path:
    """A folder with a byte-level BPE trained on these texts, of `size` tokens without its own
    control tokens <|pad|> and `stop`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    made.train_from_iterator(texts, trainer)
    return folder_of(made, out, stop)


def sentence_pieces(out: Path, texts, size: int, stop: str = "</s>") -> Path:
    """A folder with a BPE as SentencePiece has it: spaces as a letter, one before each text, bytes
    of letters that it has not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=size - 256, show_progress=False, max_token_length=8)
    made.train_from_iterator(texts, trainer)
    fields = json.loads(made.to_str())
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    fields["model"]["vocab"] = bytes_ | {
        name: 256 + i for name, i in fields["model"]["vocab"].items()
    }
    made = Tokenizer.from_str(json.dumps(fields))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return folder_of(made, out, stop)


def unigram(out: Path, texts, size: int, stop: str = "</s>") -> Path:
    """A folder with a Unigram of SentencePiece's kind, without bytes: letters may be unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return folder_of(made, out, stop)


def folder_of(tokenizer, out: Path, stop: str) -> Path:
    """A tokenizer's folder with a small chat template, that ends a response with `stop`."""
    tokenizer.add_special_tokens(["<|pad|>", stop])
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": stop}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.token_to_id(stop)})
    )
    return out
