"""SmolLM2-135M-Instruct here and in transformers: ids, logits, text, KLs, training, export."""

# ruff: noqa: RUF001 (texts in other alphabets)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
from real import FOLDER, worded_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdjax import models
from kdjax.base import Batch, Sampling, random_key
from kdjax.data.chat import render
from kdjax.data.tokenizer import Wording, load_tokenizer
from kdjax.numerics import project
from kdjax.rollouts.sampler import generate

pytestmark = pytest.mark.real

TEXTS = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast and sells the remaining 9 at"
    " $2.50 each. How much in dollars does she make every day, and how much in 1,024 days?",
    "Über 3,5 Äpfel: цена 12 рублей. 価格は１２円です。 🍎 naïve café\u0301 — \u00a0end",
    r"\begin{align} x^2 - 3x + 2 &= 0 \\ x &\in \{1, 2\} \end{align} so $\frac{10}{4} = 2.5$",
)
LINES = (
    *TEXTS, "two  spaces  42", "   three before", "after   ", "tab\t7\n\n8", "12345678",
    "3.14159e-10", "It's we'll they'd I'M", "<b>&amp;</b>", "a" * 50, "\n", " ", "x=1\r\nz=3",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽",
)  # fmt: skip


@pytest.fixture(scope="module")
def hf():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def loaded():
    return models.load(FOLDER)


def test_texts_are_cut_as_in_the_file():
    """By transformers and here, the ids of tokenizer.json itself, digit by digit; decoded, the
    text: odd ones, and 300 of worked problems."""
    own, plain = load_tokenizer(FOLDER), tokenizers.Tokenizer.from_file(f"{FOLDER}/tokenizer.json")
    problems = worded_problems(100)
    assert len({*problems}) == 300
    for text in (*LINES, *problems):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == ids, text
        assert own.decode(ids) == text
    assert [own.token(i) for i in own.encode("1024")] == ["1", "0", "2", "4"]


USERS = (
    "What is 2+2?", "  two spaces before", "and after  ", "\nnewlines around\n\n", " ", "1024",
    "Сколько будет 2+2?", "emoji 🦆🦆 and café\u0301", "user\nassistant\nsystem",
    "<think>so</think>", TEXTS[0], TEXTS[1],
)  # fmt: skip
SYSTEMS = ("Be brief.", "  Отвечай кратко. ")


@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_are_the_templates(hf, thinking):
    """With a system prompt and without one, the ids are those of apply_chat_template."""
    for system in (None, *SYSTEMS):
        own = load_tokenizer(FOLDER, Wording("{prompt}", system, thinking))
        for text in USERS:
            turns = [{"role": "system", "content": system}] * (system is not None)
            turns += [{"role": "user", "content": text}]
            wanted = hf.apply_chat_template(
                turns, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert own.encode_prompt(text) == wanted, (system, text)


TURNS = (
    [("user", "What is 2+2?"), ("assistant", "4"), ("user", " And 1,024 more? ")],
    [
        ("user", "価格は？\n"), ("assistant", "<think>12</think> １２円 "), ("user", "🦆"),
        ("assistant", ""), ("user", TEXTS[2]),
    ],
    [("user", "  " + TEXTS[0]), ("assistant", "\n#### 18"), ("user", TEXTS[1] + "  ")],
    [("user", "1"), ("assistant", "system\n2"), ("user", "\t3"), ("assistant", "4"), ("user", "")],
)  # fmt: skip


@pytest.mark.parametrize("thinking", [False, True])
def test_several_turns_are_the_templates(hf, thinking):
    """Twelve chats, with a system prompt and without one, rendered here and encoded whole: the ids
    of apply_chat_template."""
    own = load_tokenizer(FOLDER)
    values = {"tools": None, "documents": None, "add_generation_prompt": True}
    values |= {"enable_thinking": thinking} | hf.special_tokens_map
    said = [
        [*before, *turns] for before in ([], *([("system", s)] for s in SYSTEMS)) for turns in TURNS
    ]
    chats = [[{"role": role, "content": text} for role, text in turns] for turns in said]
    assert len(chats) == 12
    for chat, text in zip(chats, render(hf.get_chat_template(), chats, values), strict=True):
        wanted = hf.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert own.encode(text) == wanted, chat


def logits(model, params, ids: np.ndarray) -> np.ndarray:
    compute = jax.jit(lambda p, ids: project(model.hidden(p, ids), model.head(p)))
    return np.asarray(compute(params, ids))


def test_logits(hf, reference, loaded):
    """Float32, of three texts, within 2e-4 of their deviation, which is of a trained model."""
    encoded = [hf.encode(text, add_special_tokens=False)[:48] for text in TEXTS]
    ids = np.zeros((3, 48), np.int64)
    for row, own in zip(ids, encoded, strict=True):
        row[: len(own)] = own
    with torch.no_grad():
        wanted = reference(torch.tensor(ids), use_cache=False).logits.numpy()
    found = logits(*loaded, ids.astype(np.int32))
    for a, b, own in zip(found, wanted, encoded, strict=True):
        a, b = a[: len(own)], b[: len(own)]
        assert b.std() > 3
        assert np.abs(a - b).max() <= 2e-4 * b.std()


def test_greedy_text(hf, reference, loaded):
    """64 tokens, or to the stop, of two chats: those of transformers' generate."""
    own = load_tokenizer(FOLDER)
    prompts = [own.encode_prompt(text) for text in ("What is the capital of France?", TEXTS[0])]
    width = max(map(len, prompts))
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((2, width), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    none = np.zeros(2, np.int32)
    batch = Batch(ids, lengths, none[:, None], none, none > 0, np.arange(2, dtype=np.int32))
    drawn = generate(
        *loaded, batch, random_key(0), max_new_tokens=64, stop_ids=own.stop_ids,
        sampling=Sampling(0.0),
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        response = whole[0, len(prompt) :].tolist()
        assert drawn.tokens_bt[row, : drawn.length_b[row]].tolist() == response
    assert "Paris" in own.decode(drawn.tokens_bt[0].tolist())


def kdjax(*arguments: object) -> float:
    """A command, on one device; the most memory that it took, in MiB."""
    # the largest of this process's children, so that a parent of one child counts
    parent = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]);"
        " print('peak KiB', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-c", parent, sys.executable, "-m", "kdjax", *map(str, arguments)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak KiB ", 1)[1]) / 1024


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Two of the thirty layers."""
    folder = tmp_path_factory.mktemp("student") / "student"
    kdjax("init-student", FOLDER, folder, "--layers", 2)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"prompt": f"What is {n} + 7?", "answer": str(n + 7)} for n in (3, 15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_evaluation_is_torchs(hf, reference, student, problems, tmp_path):
    """Entropy and both KLs of a student's greedy responses, recomputed in torch over the whole
    vocabulary."""
    kdjax(
        "evaluate", student, "--teacher", FOLDER, "--evaluation.file", problems, "--n", 1, "--k", 1,
        "--evaluation.sampling.temperature", 0, "--evaluation.max_new_tokens", 12,
        "--evaluation.batch_size", 2, "--data.max_prompt_tokens", 64, "--cache", tmp_path / "cache",
        "--out", tmp_path / "out.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    sums, tokens = np.zeros(3), 0
    for row in map(json.loads, problems.read_text().splitlines()):
        prompt = torch.tensor([load_tokenizer(FOLDER).encode_prompt(row["prompt"])])
        with torch.no_grad():
            whole = small.generate(prompt, max_new_tokens=12, do_sample=False)
            q, p = (
                torch.log_softmax(m(whole).logits[0, prompt.shape[1] - 1 : -1].double(), -1)
                for m in (small, reference)
            )
        sums += [
            float(x.sum()) for x in (-q.exp() * q, p.exp() * (p - q), q.exp() * (q - p))
        ]  # entropy, KL(teacher || student), KL(student || teacher)
        tokens += len(q)
    wanted = sums / tokens
    names = ("entropy", "forward_kl", "reverse_kl")
    np.testing.assert_allclose([found[name] for name in names], wanted, rtol=1e-4)
    assert wanted[1] > 1


def test_an_evaluation_fits_two_gib(tmp_path):
    """Sixteen problems of up to 96 tokens, as many as are drawn and scored at a time of any number,
    in float32: the peak of the process is under 2 GiB (its weights are a quarter of it)."""
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": (2 * text)[:450], "answer": "1"} for text in worded_problems(6)][:16]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    peak = kdjax(
        "evaluate", FOLDER, "--evaluation.file", path, "--n", 1, "--k", 1,
        "--evaluation.max_new_tokens", 96, "--evaluation.batch_size", 16,
        "--data.max_prompt_tokens", 256, "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert peak < 2048


def test_a_trained_student_is_exported(student, problems, tmp_path):
    """One step of distillation moves it, and transformers computes the exported folder's logits."""
    config = tmp_path / "config.py"
    config.write_text(
        "from kdjax import Config, forward_kl\n"
        "from kdjax.config import Curriculum, Data, Evaluation\n\n\n"
        "def get_config():\n"
        f"    return Config(run={str(tmp_path / 'run')!r}, student={str(student)!r},\n"
        f"        teacher={str(FOLDER)!r}, cache={str(tmp_path / 'cache')!r},\n"
        "        token_loss=forward_kl, steps=1, batch_size=2, save_every_steps=1,\n"
        f"        data=Data(file={str(problems)!r}, max_prompt_tokens=64),\n"
        "        curriculum=Curriculum(lengths=(8,)), evaluation=Evaluation(\n"
        f"            file={str(problems)!r}, samples=1, k=(1,), max_new_tokens=8, batch_size=2))\n"
    )
    kdjax("train", config)
    kdjax("export", tmp_path / "run", tmp_path / "exported")
    ids = np.array([load_tokenizer(tmp_path / "exported").encode_prompt("What is 3 + 7?")])
    found = logits(*models.load(tmp_path / "exported"), ids.astype(np.int32))
    before = logits(*models.load(student), ids.astype(np.int32))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    with torch.no_grad():
        wanted = exported.eval()(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - wanted).max() <= 2e-4 * wanted.std()
    assert np.abs(found - before).max() > 0.05 * wanted.std()
