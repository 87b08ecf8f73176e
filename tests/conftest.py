"""Strict JAX on eight forced CPU devices, tiny models, a loud word where something is missing."""

from __future__ import annotations

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where a line of a program is from
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("KDJAX_AOT") != "true":
    # Most programs run once here: XLA and LLVM take longer over them than they save
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at this flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import gc
import importlib.util
import signal
from pathlib import Path

import jax
import pytest
from real import HAS_REAL, NO_REAL
from real_engine import HAS_ENGINE, NO_ENGINE
from slurm import CAN_INSTALL, HAS_SLURM, NO_SLURM
from tiny import HAS_MATH_VERIFY, NO_MATH_VERIFY, tiny_config

jax.config.update("jax_numpy_rank_promotion", "raise")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this

HAS_TORCH = importlib.util.find_spec("torch") is not None
LEFT_OUT = (
    "LEFT OUT: parity with transformers in torch (torch is not installed; launch/test.sh says why)"
)

NEED_TORCH = ["models/test_parity.py", "models/hf/test_vision.py", "test_smollm2.py"]
collect_ignore = [] if HAS_TORCH else NEED_TORCH
collect_ignore += ([] if HAS_REAL else ["real"]) + ([] if HAS_ENGINE else ["engine"])

LEFT_FOR_RELEASE = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="also what is left for a release (folders and marks)"
    )


def pytest_collection_modifyitems(config, items):
    """Without --all, what is for a release is left out, unless it is named."""
    if config.getoption("all"):
        return
    named = tuple(arg for arg in config.args if "::" in arg or arg.startswith(FOR_RELEASE))
    asked = [item for item in items if not _for_release(item) or item.nodeid.startswith(named)]
    left, items[:] = len(items) - len(asked), asked
    config.stash[LEFT_FOR_RELEASE] = left
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist: the one that reports is told
        config.workeroutput["left_for_release"] = left


def pytest_collection_finish():
    """What was imported stays; programs are many small objects, and few of them garbage."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


FOR_RELEASE = ("tests/release", "tests/real", "tests/engine")


def _for_release(item) -> bool:
    return item.nodeid.startswith(FOR_RELEASE) or item.get_closest_marker("release")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_FOR_RELEASE] = getattr(node, "workeroutput", {}).get("left_for_release")


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
    missing += [NO_SLURM] * (not HAS_SLURM) + [NO_REAL] * (not HAS_REAL)
    missing += [NO_ENGINE] * (not HAS_ENGINE)
    if left := terminalreporter.config.stash.get(LEFT_FOR_RELEASE, 0):
        missing += [f"LEFT OUT: {left} tests for a release: kills, Slurm, ...; add --all"]
    if missing:
        terminalreporter.section("left out")
    for line in missing:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The embedded tokenizer, written anew."""
    from kdjax.data.tasks.vocabulary import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from kdjax.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


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
def other_folder(tmp_path_factory, tokenizer, tokenizer_folder) -> Path:
    """A teacher of another shape than both."""
    from kdjax import models

    folder = tmp_path_factory.mktemp("models") / "other"
    models.create(folder, tiny_config(tokenizer.size, hidden_size=32), tokenizer_folder, seed=5)
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
