"""Texts, configs and files of a run that are broken or meant to harm, invented by hypothesis: each
is read, or refused in one clear line.

KDJAX_FUZZ=N tries N times as many, --hypothesis-seed=S others (docs/reliability.md).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hostile import examples, one_line_or_nothing
from hypothesis import given
from hypothesis import strategies as st
from released import RELEASED

from kdjax.config import Config
from kdjax.config.as_json import as_dict, from_dict
from kdjax.config.names import OBJECTIVES, REDUCTIONS, TOKEN_LOSSES, Names, parse
from kdjax.config.overrides import field_names, override
from kdjax.config.validation import check_types, validate
from kdjax.data.chat import render
from kdjax.data.sources.load import load_path
from kdjax.errors import ConfigError, DataError, EngineError, KdjaxError
from kdjax.losses.composition import describe
from kdjax.models.hf.config import from_fields, to_fields
from kdjax.models.shape import DecoderConfig
from kdjax.report.compare import as_report
from kdjax.runtime import files
from kdjax.storage import run_folder

NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, 10**400])
)
TEXTS = st.one_of(
    st.text(st.characters(), max_size=20),
    st.sampled_from(["", "\0", "\ud800", "a\nb", "../../x", "/dev/zero", "{{ 1 }}", "x" * 5000]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def forged(good: dict) -> st.SearchStrategy[dict]:
    """The object with one value, at any depth, replaced by any other."""

    def within(value) -> st.SearchStrategy:
        if not isinstance(value, dict) or not value:
            return VALUES
        inner = [
            within(v).map(lambda new, k=k, own=value: {**own, k: new}) for k, v in value.items()
        ]
        return st.one_of(VALUES, *inner)

    return within(good)


names = [*TOKEN_LOSSES.functions, *TOKEN_LOSSES.combinators, *OBJECTIVES.functions, "linear",
         "switch", "os", "__import__", "exec", "x"]  # fmt: skip
CALLS = st.recursive(
    st.one_of(
        st.sampled_from(names), NUMBERS.map(lambda n: "9" * 500 if n == 10**400 else repr(n))
    ),
    lambda inner: st.tuples(
        st.sampled_from(names),
        st.lists(inner, max_size=3),
        st.sampled_from(["", "*", "weight=", "**"]),
    ).map(
        lambda call: f"{call[0]}({', '.join([*call[1][1:], *(call[2] + a for a in call[1][:1])])})"
    ),
    max_leaves=12,
)
DEEP = st.tuples(
    st.sampled_from(["(", "-", "scale(", "not ", "lambda: ", "[", "x.", "1+", "1<", "f'{"]),
    st.sampled_from([50, 199, 3000, 100_000]),
).map(lambda pair: pair[0] * pair[1])


@examples(300)
@given(st.one_of(TEXTS, CALLS, DEEP), st.sampled_from([TOKEN_LOSSES, OBJECTIVES, REDUCTIONS]))
def test_functions_are_read_from_any_text(text, catalogue: Names):
    """Whatever is typed: a function of the catalogue, which its own text makes again, or one line;
    no warning, and nothing is evaluated."""
    with one_line_or_nothing():
        assert describe(parse(describe(made := parse(text, catalogue)), catalogue)) == describe(
            made
        )


def test_nothing_in_a_function_text_is_run(tmp_path):
    """Calls, attributes and comprehensions that would write a file do not."""
    canary = tmp_path / "canary"
    for text in (
        f"open({str(canary)!r}, 'w')",
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        f"scale(forward_kl, [open({str(canary)!r}, 'w') for _ in [1]][0])",
        f"scale(forward_kl, (lambda: open({str(canary)!r}, 'w'))())",
        f"f'{{open({str(canary)!r}, chr(119))}}'",
    ):
        with pytest.raises(ConfigError):
            parse(text, TOKEN_LOSSES)
    assert not canary.exists()


FIELDS = [f"--{name}" for name in field_names(Config)]
SPELLED = NUMBERS.map(lambda n: str(n) if n != 10**400 else "9" * 5000)  # Python prints no more
ARGUMENTS = st.lists(
    st.one_of(st.sampled_from(FIELDS), TEXTS, SPELLED, CALLS, TEXTS.map(lambda text: f"--{text}")),
    min_size=1,
    max_size=5,
).filter(lambda arguments: not {"--help", "-h"} & {*arguments})


@examples(15)
@given(ARGUMENTS)
def test_any_command_line_is_a_config_or_one_line(arguments):
    """Arguments of any kind and order."""
    with one_line_or_nothing():
        config = override(Config(), arguments, "kdjax train")
        json.dumps(as_dict(config)).encode()


@examples(150)
@given(forged(as_dict(Config())))
def test_forged_config_files_are_refused(fields):
    """A run's config.json with any value anywhere: a config of the right kinds, or one line."""
    with one_line_or_nothing():
        config = from_dict(fields)
        check_types(config)
        validate(config)


MODELS = [
    to_fields(DecoderConfig(10, 4, 8, 1, 2, 1, 2, model_type=kind)) | {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "use_sliding_window": False,
        "layer_types": ["full_attention"], "attention_bias": False, "max_window_layers": 1,
    }
    for kind in ("qwen3", "qwen3_moe", "llama")
] + [*RELEASED.values()]  # fmt: skip


@examples(300)
@given(st.sampled_from(MODELS).flatmap(forged))
def test_forged_model_configs_are_refused(fields):
    """A model's config.json with any value anywhere: shapes that a device could index, or one
    line."""
    with one_line_or_nothing():
        config = from_fields(fields, "config.json")
        assert 0 < math.prod((config.hidden_size, config.num_attention_heads)) < 2**62
        assert from_fields(to_fields(config), "again") == config


LINES = st.lists(
    st.one_of(
        st.builds(lambda step: json.dumps({"step": step, "loss": 1.0}).encode(), st.integers(0, 9)),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=20),
        st.just(b"[" * 100_000),
    ),
    max_size=4,
).map(b"\n".join)


@examples(100)
@given(content=LINES)
def test_any_metrics_file_is_records_or_one_line(tmp_path_factory, content):
    """metrics.jsonl and samples.jsonl of any bytes: rising steps, or one line."""
    folder = tmp_path_factory.mktemp("run")
    for name in (run_folder.METRICS, run_folder.SAMPLES, run_folder.CONFIG):
        (folder / name).write_bytes(content)
    with one_line_or_nothing():
        steps = [record["step"] for record in run_folder.read_metrics(folder)]
        assert steps == sorted(set(steps))
    with one_line_or_nothing():
        run_folder.read_samples(folder)
    with one_line_or_nothing():
        files.read_json(folder / run_folder.CONFIG)


@pytest.mark.parametrize("line", ['{"step": 1, "lo', '{"loss": 1.0}', "[]", '{"step": 1}'])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    """What is no record, or goes back, is dropped at the end of the file alone."""
    good = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / run_folder.METRICS).write_text(good + line)
    assert run_folder.read_metrics(tmp_path) == [json.loads(good)]
    (tmp_path / run_folder.METRICS).write_text(good + line + '\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: no record; delete it"):
        run_folder.read_metrics(tmp_path)


@examples(60)
@given(st.one_of(st.binary(max_size=80), st.integers(0, 600)))
def test_a_damaged_chunk_is_none(tmp_path_factory, damage):
    """Any bytes, or one bit, in a kept chunk's place: it is not there, and will be made again."""
    folder = tmp_path_factory.mktemp("kept")
    run_folder.write_chunk(folder, 0, {"sums": {"tokens": 3.0}, "records": [{"response": "né"}]})
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if isinstance(damage, int):
        content[damage // 8 % len(content)] ^= 1 << damage % 8
    file.write_bytes(bytes(content) if isinstance(damage, int) else damage)
    assert run_folder.read_chunk(folder, 0) is None


@examples(100)
@given(VALUES)
def test_any_json_is_an_evaluation_or_one_line(value):
    """What `kdjax compare` is given."""
    with one_line_or_nothing():
        as_report(value, Path("evaluation.json"))


TEMPLATES = {
    "string": "{{ 'a' * 10**10 }}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 }}{% for i in range(9**9) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "much": "{{ 'a' * 2**21 }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "unfinished": "{% if",
    "two lines": "{{ raise_exception('a\nb') }}",
    "huge": " " * 2**21,
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_have_limits(case):
    """Loops, bombs and escapes end in one line, without a file or this process's memory."""
    with pytest.raises(DataError) as caught:
        render(TEMPLATES[case], [[]], {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_templates_know_no_secrets(monkeypatch):
    """A template's process is not told this one's environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary_canary")
    from kdjax.data import chat

    assert "HF_TOKEN" not in chat.KEPT


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}\n {% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m['role'] }}\n"
        "{% endfor %}",
        "{{ bos_token }}{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}"
        "{{ {'b': 1} | tojson(indent=1) }}",
        "{{ dict(a=1) | items | list }}{{ messages | map(attribute='role') | join(',') }}",
    ],
)
def test_templates_say_what_they_say_in_transformers(tokenizer_folder, template):
    """The sandbox has the names, filters and white space of apply_chat_template."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    turns = [{"role": "user", "content": "né <&> \"'\n"}, {"role": "assistant", "content": "x"}]
    wanted = hf.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert render(template, [turns], hf.special_tokens_map) == [wanted]


NAMES = ["p[1].jsonl", "a*.jsonl", "a?.jsonl", "né\u2028.jsonl", "a b.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whatever_it_is_called(tmp_path, name):
    """A name with wildcards is that file's alone."""
    for each, prompt in (("aa.jsonl", "other"), ("p1.jsonl", "other"), (name, "mine")):
        (tmp_path / each).write_text(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
    found = load_path(tmp_path / name)
    assert [found.problem(i).prompt for i in range(found.size)] == ["mine"]


IMAGES = {"path": "/etc/hostname", "bytes": None}


def test_a_column_of_files_opens_none(tmp_path):
    """A column that says it is of images, whose cells name files and addresses, is refused."""
    import datasets

    features = datasets.Features(prompt=datasets.Image(), answer=datasets.Value("string"))
    rows = datasets.Dataset.from_dict({"prompt": [IMAGES], "answer": ["1"]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="column prompt holds Image"):
        load_path(tmp_path / "saved")


@pytest.mark.parametrize("kind", [ConfigError, DataError, EngineError])
@pytest.mark.parametrize("quoted", ["a\nb\x1b[31m\u202e", "\ud800", "x" * 10**6, "é 漢"])
def test_an_error_is_one_line_whatever_it_quotes(kind: type[KdjaxError], quoted):
    """Printable, of bounded length, its remedy at its end."""
    said = str(kind(f"field {quoted}; the remedy"))
    assert said.isprintable()
    assert said.startswith("field ")
    assert said.endswith("; the remedy")
    assert len(said) <= 2000
