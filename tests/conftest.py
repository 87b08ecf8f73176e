"""Strict JAX on eight forced CPU devices, tiny models, a loud word where something is missing."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("KDJAX_AOT") != "true":
    # Most programs run once here: XLA and LLVM take longer over them than they save
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from slurm import CAN_INSTALL, HAS_SLURM, NO_SLURM

jax.config.update("jax_numpy_rank_promotion", "raise")

HAS_TORCH = importlib.util.find_spec("torch") is not None
LEFT_OUT = (
    "LEFT OUT: parity with transformers in torch (torch is not installed; launch/test.sh says why)"
)

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
NO_MATH_VERIFY = "LEFT OUT: symbolic answers (math-verify is not installed: extra math)"

collect_ignore = [] if HAS_TORCH else ["test_parity.py"]


def pytest_configure(config):
    if os.environ.get("CI") != "true":
        return
    if not HAS_TORCH:
        raise pytest.UsageError("CI must run the parity tests: install torch (a CPU build)")
    if not HAS_MATH_VERIFY:
        raise pytest.UsageError("CI must grade symbolic answers: install math-verify")
    if not HAS_SLURM and CAN_INSTALL:
        raise pytest.UsageError("CI must run a job on Slurm: apt-get install slurm-wlm munge")


def pytest_terminal_summary(terminalreporter):
    missing = [LEFT_OUT] * (not HAS_TORCH) + [NO_MATH_VERIFY] * (not HAS_MATH_VERIFY)
    missing += [NO_SLURM] * (not HAS_SLURM)
    if missing:
        terminalreporter.section("left out")
    for line in missing:
        terminalreporter.write_line(line)


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
    shape["qk_norm"] = changes.get("model_type", "qwen3").startswith("qwen3")
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
    config = tiny_config(
        tokenizer.size, hidden_size=24, num_hidden_layers=3, tie_word_embeddings=False
    )
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


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder):
    """The Config of a run of four steps by the tiny models, with a checkpoint every second."""
    from kdjax.config import Config, Curriculum, Data, Evaluation

    return Config(
        run=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        student=str(student_folder),
        teacher=str(teacher_folder),
        steps=4,
        batch_size=8,
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,), measure_every_steps=2, heldout_problems=5),
        evaluation=Evaluation(problems=4, samples=2, k=(1, 2), max_new_tokens=8, batch_size=8),
        save_every_steps=2,
        log_every_steps=1,
    )


def lively(params, seed: int = 0):
    """The same shapes with random weights so large that every layer and norm matters.

    Logits then spread over a few units; fresh weights of deviation 0.02 hide faults.
    """
    rng = np.random.default_rng(seed)

    def redraw(path, weight):
        name, shape = path[-1].key, weight.shape
        if name in ("scale", "norm"):
            return jax.numpy.float32(1 + 0.3 * rng.normal(size=shape))
        deviation = 1.5 * shape[-2] ** -0.5 if name == "kernel" else 0.7
        return jax.numpy.float32(deviation * rng.normal(size=shape))

    return jax.tree_util.tree_map_with_path(redraw, params)


def random_prompts(vocabulary: int, lengths: list[int], rows: list[int]):
    """A Batch of random prompts of these lengths, right-padded, without worked responses."""
    from kdjax.base import Batch

    rng, count = np.random.default_rng(0), len(lengths)
    prompt = np.zeros((count, max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        prompt[row, :length] = rng.integers(0, vocabulary, length)
    none = np.zeros(count, np.int32)
    return Batch(
        prompt, np.array(lengths, np.int32), none[:, None], none, none > 0, np.array(rows, np.int32)
    )


def random_rollout(
    seed: int,
    vocab_size: int,
    prompt_lengths,
    response_lengths,
    *,
    prompt_width: int | None = None,
    response_width: int | None = None,
):
    """A Rollout laid out row by row by NumPy alone; no real token is the padding id 0."""
    from kdjax.base import Rollout

    rng = np.random.default_rng(seed)
    response_width = response_width or max(response_lengths)
    width = (prompt_width or max(prompt_lengths)) + response_width
    tokens = np.zeros((len(prompt_lengths), width), np.int32)
    logp = np.zeros((len(prompt_lengths), response_width), np.float32)
    for row, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        tokens[row, : prompt + response] = rng.integers(1, vocab_size, prompt + response)
        logp[row, :response] = -rng.random(response)
    return Rollout(
        tokens_bs=tokens,
        prompt_length_b=np.array(prompt_lengths, np.int32),
        response_length_b=np.array(response_lengths, np.int32),
        sampler_logp_bt=logp,
        truncated_b=np.zeros(len(prompt_lengths), bool),
    )


def one_layer(vocab_size: int, seed: int):
    """(Model, lively parameters) of a decoder of one layer: attention at half the compile time."""
    from kdjax.models.decoder import build, init_params

    config = tiny_config(vocab_size, num_hidden_layers=1)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return build(config), lively(shapes, seed)


@functools.cache  # one Model, so that programs compiled for it are reused
def bigram():
    """A Model whose next token depends on the last one alone: easy to work out by hand."""
    from kdjax.base import Model
    from kdjax.numerics import LMHead

    return Model(
        config=None,
        hidden=lambda params, tokens_bs: params["embed"][tokens_bs],
        head=lambda params: LMHead(params["head"]),
        init_cache=None,
        prefill=None,
        extend=None,
    )


def bigram_params(seed: int, vocab_size: int, width: int = 4):
    """Random parameters of a bigram model, logits spread over a few units."""
    rng = np.random.default_rng(seed)
    return {
        name: jax.numpy.float32(rng.normal(size=(vocab_size, width))) for name in ("embed", "head")
    }
