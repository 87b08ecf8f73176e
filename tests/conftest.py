"""Strict JAX on eight forced CPU devices, a tiny model folder, and a loud word where torch is missing."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

HAS_TORCH = importlib.util.find_spec("torch") is not None
LEFT_OUT = "LEFT OUT: parity with transformers in torch (torch is not installed; launch/test.sh says why)"

collect_ignore = [] if HAS_TORCH else ["test_parity.py"]


def pytest_configure(config):
    if not HAS_TORCH and os.environ.get("CI") == "true":
        raise pytest.UsageError("CI must run the parity tests: install torch (a CPU build)")


def pytest_terminal_summary(terminalreporter):
    if not HAS_TORCH:
        terminalreporter.section("left out")
        terminalreporter.write_line(LEFT_OUT)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The embedded tokenizer, written anew."""
    from kdjax.tasks.vocabulary import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from kdjax.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


def tiny_config(vocab_size: int, **changes):
    from kdjax.models import DecoderConfig

    shape = dict(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return DecoderConfig(**{**shape, **changes})


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, tokenizer, tokenizer_folder) -> Path:
    """A random model of a few thousand parameters, with the embedded tokenizer."""
    from kdjax import models

    folder = tmp_path_factory.mktemp("models") / "student"
    models.create(folder, tiny_config(tokenizer.size), tokenizer_folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer, tokenizer_folder) -> Path:
    """A wider, deeper random model than the student's."""
    from kdjax import models

    folder = tmp_path_factory.mktemp("models") / "teacher"
    config = tiny_config(tokenizer.size, hidden_size=24, num_hidden_layers=3, tie_word_embeddings=False)
    models.create(folder, config, tokenizer_folder, seed=2)
    return folder


@pytest.fixture(scope="session")
def student(student_folder):
    """(Model, params) of the tiny student, through the loading door."""
    from kdjax import models

    return models.load(student_folder)


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    """(Model, params) of the tiny teacher."""
    from kdjax import models

    return models.load(teacher_folder)
