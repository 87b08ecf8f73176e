"""Configs: the same thing in Python, in JSON and in an error message."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing

import jax
import pytest

from kdjax import (
    add,
    at_temperature,
    centered,
    clip,
    divergence,
    forward_kl,
    log_ratio,
    mix,
    negative_log_likelihood,
    reverse_kl,
    scale,
    token_mean,
)
from kdjax.base import Sampling
from kdjax.config import (
    RL,
    Checkpointing,
    Config,
    Curriculum,
    Data,
    Evaluation,
    Faults,
    Layout,
    Lora,
    Optimizer,
    Rollouts,
    Served,
    Turn,
)
from kdjax.config.as_json import as_dict, from_dict, trained_by
from kdjax.config.overrides import load_file
from kdjax.config.validation import validate
from kdjax.errors import ConfigError
from kdjax.grading.rewards import math as math_reward
from kdjax.runtime.files import differences
from kdjax.step.gate import POLICIES
from kdjax.training.loop import HELDOUT_RESPONSES

FULL = Config(
    turns=(Turn(0.25, 3, "dataset", forward_kl, mix(divergence, log_ratio, weight=0.5)), Turn(0.5)),
    reference="d",
    run="runs/other",
    student="a folder",
    teacher=None,
    teachers=("math=a folder", "code=kdjax:teacher"),
    self_decay=0.5,
    prefix="dataset",
    trajectories="kept",
    token_loss=mix(at_temperature(forward_kl, 2.0), clip(reverse_kl, 5.0), weight=0.8),
    objective=add(negative_log_likelihood, scale(divergence, -0.1)),
    reduction=token_mean,
    stops="merge",
    least_aligned=0.25,
    steps=7,
    batch_size=6,
    micro_batches=2,
    sampling=Sampling(0.0, 0.9, 20, 0.1),
    rollouts=Rollouts(8, 0.5, "int8", 0.2, True, "http://localhost:1/v1", "m", "drawn", 2, 3.0),
    served=Served("http://localhost:1", "m", "sglang", 5, 3),
    seed=3,
    rl=RL(3, math_reward, centered, 2, 1, 1),
    data=Data(
        task="calc",
        terms=(2,),
        problems=9,
        file="p.jsonl",
        columns=("prompt=question", "answer=gold"),
        max_prompt_tokens=5,
        prompt_template="Q: {prompt}",
        system_prompt="Add.",
        thinking=True,
    ),
    optimizer=Optimizer(3e-4, 0.1, 0.5, 2.0, 0.01, 0.99),
    curriculum=Curriculum(
        lengths=(8, 16),
        entropy_threshold_share=0.25,
        policy="hold",
        measure_every_steps=3,
        heldout_responses="finished",
        heldout_problems=4,
        heldout_file="h.jsonl",
    ),
    evaluation=Evaluation(
        5,
        "t.jsonl",
        4,
        (1, 4),
        Sampling(0.6),
        32,
        16,
        4,
        grader="exact_flexible",
        temperatures=(0.3,),
    ),
    save_every_steps=2,
    checkpoints=Checkpointing(3, 4, "lowest test_entropy", "go_on"),
    log_every_steps=1,
    dtype="bfloat16",
    teacher_weights="int8",
    attention="chunked",
    remat="dots",
    layout=Layout(fsdp=2, tensor=4, teacher_devices=1),
    faults=Faults(skipped_in_a_row=2, step_limit_seconds=9.0),
    lora=Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
    head_memory_mib=4,
    cache="elsewhere",
    teacher_shares="equal",
    wandb_project="w",
)
APART = {"turns": (), "rl": RL(), "stops": "mask", "least_aligned": None, "served": Served()}
APART |= {"self_decay": 0.0}
VALID = dataclasses.replace(FULL, **APART)  # these don't go with the rest


def test_the_full_example_leaves_no_field_at_its_default():
    """Or else the round trip below could lose a field unseen."""
    default, full = Config(), FULL
    same = {
        f.name
        for f in dataclasses.fields(Config)
        if getattr(default, f.name) == getattr(full, f.name)
    }
    assert same == set()


def test_what_is_infinite_is_read_back():
    """No limit on the norm or the gap: strict JSON, and the same config."""
    unbounded = dataclasses.replace(
        Config(),
        optimizer=dataclasses.replace(Config().optimizer, clip_norm=math.inf),
        rollouts=dataclasses.replace(Config().rollouts, gap_limit_nats=math.inf),
    )
    text = json.dumps(as_dict(unbounded), allow_nan=False)
    assert from_dict(json.loads(text)) == unbounded


@pytest.mark.parametrize("config", [Config(), FULL], ids=["default", "full"])
def test_round_trip_through_json(config):
    """from_dict(as_dict(c)) = c through a JSON file, composed losses by their text."""
    written = json.loads(json.dumps(as_dict(config)))
    again = from_dict(written)
    assert as_dict(again) == as_dict(config)
    functions = ("token_loss", "objective", "reduction")
    plain = {name: None for name in (*functions, "turns")}
    assert dataclasses.replace(again, **plain) == dataclasses.replace(config, **plain)


def test_a_curriculum_can_name_what_there_is():
    """The names that validation lets through are those of the tables, no more and no fewer."""
    hints = typing.get_type_hints(Curriculum)
    assert typing.get_args(hints["policy"]) == tuple(POLICIES)
    assert typing.get_args(hints["heldout_responses"]) == tuple(HELDOUT_RESPONSES)


def test_a_younger_field_has_its_default_in_an_older_run():
    """A config.json of before a field, in a section or not, is that of a config with its default:
    the run goes on."""
    now, old = as_dict(FULL), as_dict(dataclasses.replace(FULL, seed=0, data=Data(task="calc")))
    del old["seed"], old["data"]["overlong_prompts"]
    same = as_dict(dataclasses.replace(FULL, seed=0, data=Data(task="calc")))
    assert trained_by(old) == trained_by(same) != trained_by(now)


def test_a_config_imports_what_lies_beside_it(tmp_path, monkeypatch):
    """A module in the config's folder, wherever the command is typed; a library's name stays its
    own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("STEPS = 7\n")
    (tmp_path / "json.py").write_text("raise ValueError('not this one')\n")
    text = "import json, kdjax, beside_it\n"
    text += "def get_config():\n    return kdjax.Config(steps=beside_it.STEPS)\n"
    (tmp_path / "mine.py").write_text(text)
    assert load_file(str(tmp_path / "mine.py"), "get_config").steps == 7


def test_losses_are_written_as_text():
    """The JSON shows what would be typed on the command line."""
    written = as_dict(FULL)
    expected = "mix(at_temperature(forward_kl, 2.0), clip(reverse_kl, 5.0), weight=0.8)"
    assert written["token_loss"] == expected
    assert written["objective"] == "add(negative_log_likelihood, scale(divergence, -0.1))"
    assert written["reduction"] == "token_mean"


def test_an_unknown_loss_becomes_the_default():
    """A loss of the user's own is only known to its file: reading the run again does not fail."""

    def own(student_logp, teacher_logp):
        return forward_kl(student_logp, teacher_logp)

    written = as_dict(Config(token_loss=own, steps=3))
    assert written["token_loss"].endswith(".own")
    again = from_dict(written)
    assert again.token_loss is forward_kl
    assert again.steps == 3


def test_differences():
    """One line a value that differs, by dotted name; nothing where nothing differs."""
    old = as_dict(Config(steps=200, data=Data(problems=4096)))
    changed = Config(steps=9, token_loss=reverse_kl, data=Data(problems=5))
    new = as_dict(changed)
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.problems: 4096 -> 5",
        "steps: 200 -> 9",
        "token_loss: forward_kl -> reverse_kl",
    ]
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 -> None", "b: None -> 2"]
    assert differences({"a": {"b": 1}}, {"a": None}) == ["a: {'b': 1} -> None"]


@pytest.mark.parametrize("config", [Config(), VALID], ids=["default", "full"])
def test_a_valid_config_comes_back_itself(config):
    """validate returns its argument."""
    assert validate(config) is config


def nested(field: str, **changes) -> dict:
    """A change of one of the config's parts."""
    return {field: dataclasses.replace(getattr(Config(), field), **changes)}


ON_FILE = dict(data=Data(file="p.jsonl"))

WRONG = [
    (dict(steps="3"), "steps must be int, got '3'"),
    (dict(steps=3.0), "steps must be int, got 3.0"),
    (dict(steps=True), "steps must be int, got True"),
    (dict(seed=None), "seed must be int, got None"),
    (dict(run=None), "run must be str, got None"),
    (dict(run="two\nlines", steps="a\nb"), r"steps must be int, got 'a\nb'"),
    (dict(teacher=5), "teacher must be str | None, got 5"),
    (dict(sampling=Sampling("1")), "sampling.temperature must be float, got '1'"),
    (dict(sampling=Sampling(True)), "sampling.temperature must be float, got True"),
    (dict(sampling=1.0), "sampling must be a Sampling, got 1.0"),
    (dict(prefix="both"), "prefix must be Literal['dataset', 'teacher', 'student'], got 'both'"),
    (dict(dtype="float16"), "dtype must be Literal['float32', 'bfloat16'], got 'float16'"),
    (dict(token_loss="forward_kl"), "token_loss must be"),
    (dict(objective=None), "objective must be"),
    (dict(reduction=1), "reduction must be"),
    (dict(data={"task": "calc"}), "data must be a Data, got {'task': 'calc'}"),
    (dict(optimizer=Data()), "optimizer must be a Optimizer, got Data("),
    (nested("data", terms=[2]), "data.terms must be tuple[int, ...], got [2]"),
    (nested("data", terms=(2.0,)), "data.terms must be tuple[int, ...], got (2.0,)"),
    (nested("optimizer", learning_rate="1e-3"), "optimizer.learning_rate must be float"),
    (nested("curriculum", lengths=64), "curriculum.lengths must be tuple[int, ...], got 64"),
    (nested("evaluation", k=1), "evaluation.k must be tuple[int, ...], got 1"),
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(batch_size=0), "batch_size must be at least 1, got 0"),
    (dict(micro_batches=-1), "micro_batches must be at least 1, got -1"),
    (dict(save_every_steps=0), "save_every_steps must be at least 1, got 0"),
    (dict(log_every_steps=0), "log_every_steps must be at least 1, got 0"),
    (dict(head_memory_mib=0), "head_memory_mib must be at least 1, got 0"),
    (dict(batch_size=10, micro_batches=4), "batch_size 10 is not a multiple of micro_batches 4"),
    (
        dict(teacher=None, prefix="teacher", objective=negative_log_likelihood),
        "prefix teacher needs a teacher; set teacher, or prefix dataset",
    ),
    (dict(teacher=None), "objective divergence needs a teacher; set teacher, or objective neg"),
    (
        dict(teacher=None, objective=negative_log_likelihood, teacher_weights="int8"),
        "teacher_weights int8 needs a teacher; set teacher, or teacher_weights compute",
    ),
    (dict(teachers=("a=b",)), "teacher kdjax:teacher and teachers ('a=b',) are both set"),
    (dict(teacher=None, teachers=("b",)), "teachers: each is written \"tag=model\", got 'b'"),
    (dict(teacher=None, teachers=("=b",)), "teachers: each is written \"tag=model\", got '=b'"),
    (dict(teacher=None, teachers=("a=b", "a=c")), "teachers: tag 'a' has two"),
    (dict(layout=Layout(teacher_devices=-1)), "layout.teacher_devices is -1; set it to 0"),
    (dict(sampling=Sampling(-0.5)), "sampling.temperature must be at least 0, got -0.5"),
    (dict(sampling=Sampling(math.nan)), "sampling.temperature must be a number, got nan"),
    (dict(sampling=Sampling(1e-46)), "sampling.temperature must be 0 (greedy), or finite"),
    (
        dict(sampling=Sampling(math.inf)),
        "sampling.temperature must be 0 (greedy), or finite",
    ),
    (nested("rollouts", engine_at_once=0), "rollouts.engine_at_once must be at least 1, got 0"),
    (nested("rollouts", engine_retries=-1), "rollouts.engine_retries must be at least 0, got -1"),
    (
        nested("rollouts", engine_timeout_seconds=0),
        "rollouts.engine_timeout_seconds must be",
    ),
    (dict(sampling=Sampling(top_p=0.0)), "sampling.top_p must be in (0, 1], got 0.0"),
    (dict(sampling=Sampling(top_k=-1)), "sampling.top_k must be at least 0"),
    (dict(sampling=Sampling(min_p=1.0)), "sampling.min_p must be in [0, 1), got 1.0"),
    (ON_FILE, "data.file needs evaluation.file"),
    (nested("data", name="a/b"), "data.name needs evaluation.name beside it"),
    (nested("data", file=""), "data.file is empty; leave it out"),
    (nested("evaluation", name=""), "evaluation.name is empty; leave it out"),
    (nested("data", name="a/b", file="f"), "data.name a/b and data.file f are both set; choose"),
    (nested("evaluation", name="a/b", file="f"), "evaluation.name a/b and evaluation.file f are"),
    (nested("curriculum", heldout_name="a/b", heldout_file="f"), "curriculum.heldout_name a/b and"),
    (
        dict(
            data=Data(name="a/b"),
            evaluation=Evaluation(name="c/d"),
            curriculum=Curriculum(lengths=(8, 16)),
        ),
        "a curriculum on data.name needs curriculum.heldout_name",
    ),
    (nested("data", columns=("prompt=q",)), "data.columns ('prompt=q',) has no file to be of"),
    (nested("evaluation", columns=("prompt=q",)), "evaluation.columns ('prompt=q',) has no file"),
    (
        dict(data=Data(file="p", columns=("question=q",)), evaluation=Evaluation(file="t")),
        'columns: each is written "field=column" once',
    ),
    (nested("data", prompt_template="Solve."), "must hold {prompt} exactly once, got 'Solve.'"),
    (nested("data", prompt_template="{prompt}{prompt}"), "must hold {prompt} exactly once"),
    (
        nested("data", prompt_template="{prompt} {answer}"),
        "data.prompt_template has the field {answer}, and only {prompt} is filled in",
    ),
    (nested("data", system_prompt=" "), "data.system_prompt must be a text, got ' '"),
    (
        nested("data", chat_template="chatml"),
        "data.chat_template must be plain or the path of a .jinja file, got 'chatml'",
    ),
    (
        ON_FILE | dict(evaluation=Evaluation(file="t"), curriculum=Curriculum(lengths=(8, 16))),
        "a curriculum on data.file needs curriculum.heldout_file",
    ),
    (nested("curriculum", lengths=(8, 16)), "entropy_threshold_share, got None and None"),
    (
        nested("curriculum", entropy_threshold_nats=0.1, entropy_threshold_share=0.5),
        "set one of entropy_threshold_nats and entropy_threshold_share, got 0.1 and 0.5",
    ),
    (nested("curriculum", policy="leave"), "curriculum.policy must be Literal["),
    (nested("curriculum", measure_every_steps=0), "curriculum.measure_every_steps and"),
    (nested("curriculum", heldout_problems=0), "heldout_problems must be at least 1"),
    (nested("evaluation", k=()), "evaluation.k must lie in 1..samples (8), got ()"),
    (nested("evaluation", k=(0, 1)), "evaluation.k must lie in 1..samples (8), got (0, 1)"),
    (nested("evaluation", k=(1, 9)), "evaluation.k must lie in 1..samples (8), got (1, 9)"),
    (
        nested("evaluation", sampling=Sampling(-1.0)),
        "evaluation.sampling.temperature must be at least 0, got -1",
    ),
    (nested("evaluation", temperatures=(0.6, 0.6)), "and 0.6 is among them twice; name each once"),
    (nested("evaluation", temperatures=(0.6, 1.0)), "and 1.0 is among them twice; name each once"),
    (
        nested("evaluation", temperatures=(-0.5,)),
        "evaluation.temperatures: temperature must be at least 0, got -0.5",
    ),
    (dict(teacher_shares="equal"), "teacher_shares equal is of teachers of several tags, got ()"),
    (nested("evaluation", problems=0), "evaluation.problems"),
    (nested("evaluation", grader="sympy"), "evaluation.grader must be"),
    (nested("evaluation", max_new_tokens=0), "max_new_tokens"),
    (nested("faults", skipped_in_a_row=0), "faults.skipped_in_a_row must be at least 1, got 0"),
    (nested("faults", step_limit_seconds=0.0), "faults.step_limit_seconds must be over 0, got 0"),
    (nested("evaluation", batch_size=0), "batch_size must be at least 1"),
    (nested("evaluation", every_steps=-1), "evaluation.every_steps must be at least 0"),
    (nested("evaluation", samples_during_training=0), "samples_during_training at least 1, got 0"),
    (nested("checkpoints", last=0), "checkpoints.last must be at least 1 and"),
    (nested("checkpoints", every_steps=-50), "checkpoints.every_steps at least 0, got 2 and -50"),
    (
        nested("checkpoints", every_steps=75),
        "checkpoints.every_steps 75 is not a multiple of",
    ),
    (nested("checkpoints", best="test_avg"), "checkpoints.best must be"),
    (nested("checkpoints", best="highest test_avg"), "test_avg needs tests during training; set"),
    (
        dict(
            checkpoints=Checkpointing(best="highest test_avg"),
            evaluation=Evaluation(every_steps=20),
        ),
        "evaluation.every_steps 20 is not a multiple of save_every_steps 50",
    ),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_each_rule_names_its_field(changes, says):
    """A ConfigError of one line: the field by its dotted name, what it got, the remedy."""
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(Config(), **changes))
    assert str(caught.value).startswith(says) or says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_may_hold_latex():
    """Braces of a LaTeX command are text."""
    template = "{prompt} Put it in \\boxed{} or \\frac{a}{b} or {}."
    config = Config(data=Data(prompt_template=template))
    assert validate(config) is config


def test_one_length_on_a_file_needs_no_heldout_problems():
    """The gate has nothing to measure for a fixed horizon, so the rule does not reach it."""
    config = Config(data=Data(file="p.jsonl"), evaluation=Evaluation(file="t.jsonl"))
    assert validate(config) is config


def test_a_wrapped_loss_of_the_package_is_written_by_its_name():
    """What jit or a decorator wraps is still that loss, and is read back as it."""
    wrapped = Config(token_loss=jax.jit(forward_kl))
    assert as_dict(wrapped)["token_loss"] == "forward_kl"
    assert from_dict(as_dict(wrapped)).token_loss is forward_kl
