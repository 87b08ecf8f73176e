"""The start-up report: its facts are right, and what would corrupt a run stops it in one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import a_report
from tiny import tiny_config

from kdjax import forward_kl, models
from kdjax.base import Rollout, Sampling
from kdjax.config import Config, Curriculum, Data, Evaluation, Rollouts
from kdjax.data.tokenizer import load_tokenizer
from kdjax.errors import ConfigError, DataError
from kdjax.losses.combinators import at_temperature
from kdjax.losses.objectives import negative_log_likelihood
from kdjax.runtime.console import announce
from kdjax.sharding import batch_spec, device_bytes, make_mesh
from kdjax.step.score import HeadPlan
from kdjax.step.stops import Stops
from kdjax.storage import run_folder
from kdjax.training import evaluation as examine_module
from kdjax.training import feed
from kdjax.training.loop import train
from kdjax.training.parts import precompute as prefixes_module
from kdjax.training.parts import problems, roles, startup
from kdjax.training.parts import programs as programs_module
from kdjax.training.parts.build import build
from kdjax.training.parts.memory import activation_bytes, rows_at_once, sampling_bytes


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder) -> Config:
    """A run of two steps on copies of the tiny models, free to be spoilt."""
    for name, folder in {"student": student_folder, "teacher": teacher_folder}.items():
        shutil.copytree(folder, tmp_path / name)
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), steps=1, batch_size=8,
        student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"),
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )  # fmt: skip


def edit_json(path: Path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def facts(config: Config) -> dict[str, str]:
    """The report's lines by their subject; notes and warnings are numbered."""
    found: dict[str, str] = {}
    for line in startup.report(build(config)).splitlines():
        subject, _, rest = line.partition(": ")
        found[f"{subject} {sum(s.startswith(subject) for s in found)}"] = rest
    return found


def count(folder: str) -> int:
    return sum(w.size for w in load_file(Path(folder) / "model.safetensors").values())


def test_an_agreeing_pair(tiny, tokenizer):
    """Every line of a pair with one tokenizer, its numbers counted from the files."""
    config = dataclasses.replace(
        tiny, token_loss=at_temperature(forward_kl, 2.0), sampling=Sampling(0.9), head_memory_mib=1
    )
    said = facts(config)
    size_line = said.pop("size 0")
    end, pad = tokenizer.stop_ids
    stops = f"{end} '<|im_end|>', {pad} '<|endoftext|>'; its template ends an answer with {end} "
    size, chunk = tokenizer.size, 256
    student, teacher = count(tiny.student), count(tiny.teacher)
    parts = [16 * student / 2**20, 4 * teacher / 2**20, 2 * chunk * size * 4 / 2**20]
    assert said == {
        "prompt as rendered 0": repr(tokenizer.render("1+1=")),
        "tokenizers 0": f"student and teacher agree id by id ({size} tokens)",
        "stop tokens 0": f"student {stops}'<|im_end|>'",
        "stop tokens 1": f"teacher {stops}'<|im_end|>'",
        "stop policy 0": "raw, stop tokens count like any other",
        "vocabulary 0": f"{size} tokens in use; rows beyond have no probability"
        f" (student {size}, teacher {size} rows)",
        "loss 0": "token loss at_temperature(forward_kl, 2.0) (gradients in closed form),"
        " objective divergence, reduction sequence_mean",
        "sampling 0": "rollouts temperature 0.9; evaluation temperature 1.0;"
        " temperature of the loss as at_temperature says, else 1.0",
        "layers 0": "attention auto, remat none",
        "precision 0": "computes in float32, trained parameters float32, the teacher's float32",
        "devices 0": "8 x cpu, mesh data 8, fsdp 1, tensor 1",
        "self-test 0": "the teacher as its own student has KL 0",
    }
    assert f"student {student:,} parameters, teacher {teacher:,} parameters; at least" in size_line
    held = f"what is trained, its gradient and Adam moments {parts[0]:.1f}, teacher {parts[1]:.1f}"
    assert (
        f"MiB a device (held: {held}; a step adds activations of 8 rows of 32 tokens" in size_line
    )
    assert f", head chunk of {chunk} tokens {parts[2]:.1f}; " in size_line
    for draw in ("the evaluation", "a rollout"):
        assert re.search(rf"; {draw} adds sampler's weights [\d.]+, KV cache [\d.]+, ", size_line)
    total, inside = re.fullmatch(r".*at least ([\d.]+) MiB a device \((.*)\)", size_line).groups()
    held, *phases, _ = (
        sum(float(n) for n in re.findall(r"[a-z] ([\d.]+)(?:,|$)", part))
        for part in inside.split("; ")
    )
    assert float(total) == pytest.approx(held + max(phases), abs=0.3)


def test_a_pair_that_differs_in_what_may_differ(tiny, tokenizer):
    """Templates, stop ids, rows, precision and the number of tokens: noted, and the run goes on."""
    end, pad = tokenizer.stop_ids
    folder = Path(tiny.teacher)
    path = folder / "chat_template.jinja"
    path.write_text("Be brief." + path.read_text())
    ends_alone(tiny)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    new = {**added[-1], "id": tokenizer.size, "content": "<new>"}
    edit_json(folder / "tokenizer.json", added_tokens=[*added, new])
    config = dataclasses.replace(
        tiny, stops="merge", dtype="bfloat16", token_loss=lambda q, p: forward_kl(q, p)
    )
    said = facts(config)
    rendered = tokenizer.render("1+1=")
    assert said["prompt as rendered 0"] == repr(rendered)
    brief = "Be brief." + rendered
    assert said["note 0"] == f"the teacher's own template renders {brief!r}; it reads the student's"
    own = dict(teacher_prompt_template="{solution} {prompt}", max_teacher_prompt_tokens=90)
    apart = facts(dataclasses.replace(config, data=dataclasses.replace(config.data, **own)))
    assert apart["note 0"].endswith(f"renders {brief!r}; it reads its prompts in that")
    assert "Be brief." in apart["prompt of the teacher as rendered, of the first problem 0"]
    assert said["tokenizers 0"] == (
        f"student ({tokenizer.size} tokens) and teacher ({tokenizer.size + 1}) agree on the first"
        f" {tokenizer.size} ids, which are in use"
    )
    both = f"{pad} '<|endoftext|>', {end} '<|im_end|>'"
    assert said["stop tokens 0"].startswith(f"student {both}; its template ends")
    assert "warning 0" not in said
    assert "note 1" not in said
    assert said["stop policy 0"] == (
        f"merge, tokens {[pad, end]} are one event, and the student draws up to any of them"
    )
    assert "(gradients by autodiff from chunk logits)" in said["loss 0"]
    precision = "computes in bfloat16, trained parameters float32, the teacher's bfloat16"
    assert said["precision 0"] == precision
    assert f" teacher {2 * count(tiny.teacher) / 2**20:.1f};" in said["size 0"]
    assert said["self-test 0"] == "the teacher as its own student has KL 0"


def ends_alone(config: Config):
    """The student of a config, made to stop at <|endoftext|> alone, as base models do."""
    pad = load_tokenizer(config.student).stop_ids[1]
    edit_json(Path(config.student) / "generation_config.json", eos_token_id=pad)
    edit_json(Path(config.student) / "tokenizer_config.json", eos_token="<|endoftext|>")


def test_raw_stops_that_differ_are_warned_of(tiny, tokenizer):
    """What raw will do and the remedy, where anything is learned from the teacher; a student that
    stops wherever its teacher does learns to end."""
    ends_alone(tiny)
    end = tokenizer.stop_ids[0]
    said = facts(tiny)
    assert said["warning 1"] == (
        f"the teacher stops at {end} '<|im_end|>', where the student does not: with stops raw the"
        " student learns to write it as any other token and to go on, so responses run to the limit"
        " (docs/study.md); --stops merge makes one event of all stop tokens, in the loss and where"
        " the student draws"
    )
    worked = dataclasses.replace(tiny, prefix="dataset", objective=negative_log_likelihood)
    mild = "student and teacher stop at other tokens; each samples with its own"
    for other in (worked, dataclasses.replace(tiny, stops="mask")):
        assert facts(other)["note 0"] == mild
        assert "warning 1" not in facts(other)
    turned = dataclasses.replace(tiny, student=tiny.teacher, teacher=tiny.student)
    said = facts(turned)
    assert said["note 0"] == mild
    assert said["warning 0"].startswith("the teacher does not stop at")
    assert "warning 1" not in said


def test_merged_stops_end_what_the_student_draws(tiny, tokenizer):
    """In training, the gate's measurements and the evaluation: the rows of raw, cut behind the
    first stop of either model, and that stop is said; the teacher keeps its own."""
    ends_alone(tiny)
    end, pad = tokenizer.stop_ids
    drawn = {}
    for stops in ("raw", "merge"):
        parts = build(dataclasses.replace(tiny, stops=stops, batch_size=8))
        rows = np.arange(24)
        batch = problems.encode(parts.problems.source, parts.tokenizer, rows, 24, 64)
        own = parts.sampler_params(parts.student.trained)
        evaluated = examine_module._evaluation_draw(
            parts, parts.student.trained, tiny.evaluation.sampling
        )
        key = problems.run_key(0, problems.ROLLOUT)
        drawn[stops] = parts.responses.draw(own, batch, key, 64), evaluated(batch, key, 64)
        assert parts.teachers[""].role.tokenizer.stop_ids == (end, pad)
    cut = 0
    for raw, merged in zip(drawn["raw"], drawn["merge"], strict=True):
        for row in rows:
            tokens = np.asarray(raw.tokens_bt)[row, : raw.length_b[row]]
            ends = np.flatnonzero(np.isin(tokens, [end, pad]))
            length = ends[0] + 1 if len(ends) else len(tokens)
            cut += length < len(tokens)
            assert merged.length_b[row] == length
            np.testing.assert_array_equal(merged.tokens_bt[row, :length], tokens[:length])
            assert merged.stop_b[row] == (tokens[length - 1] if len(ends) else -1)
    assert cut >= 4


def test_the_first_step_says_the_overlap(tiny):
    """The share of the first rollout's tokens that are the teacher's most probable one, counted
    from its logits; of another first rollout it is another, and without a teacher there is none."""
    path, shares = Path(tiny.teacher) / "model.safetensors", []
    weights = load_file(path)
    sharp = weights | {"model.norm.weight": 30 * weights["model.norm.weight"]}
    save_file(sharp, path, metadata={"format": "pt"})
    tiny = dataclasses.replace(tiny, student=tiny.teacher)
    for seed in (0, 1):
        config = dataclasses.replace(tiny, seed=seed, run=f"{tiny.run}{seed}", batch_size=16)
        train(config)
        (said,) = re.findall(
            r"^first step: ([\d.]+)% of the responses' tokens are the teacher's most probable one",
            (Path(config.run) / run_folder.STARTUP).read_text(),
            re.MULTILINE,
        )
        parts = build(config)
        rollout = jax.device_get(feed.draw(parts, parts.student.trained, 0, 8, 0))
        states = parts.teachers[""].programs.model.hidden(
            parts.teachers[""].params, jax.numpy.asarray(rollout.tokens_bs)
        )
        head = parts.teachers[""].programs.model.head(parts.teachers[""].params)
        best = np.asarray(states @ head.weight_vd.T).argmax(-1)
        hits = []
        for row, first in enumerate(rollout.prompt_length_b):
            own = slice(first, first + rollout.response_length_b[row])
            hits += (rollout.tokens_bs[row, own] == np.roll(best[row], 1)[own]).tolist()
        shares.append(np.mean(hits))
        assert said == f"{np.mean(hits):.1%}"[:-1]
    assert 0.05 < shares[0] != shares[1] < 0.95
    alone = dataclasses.replace(
        tiny, teacher=None, objective=negative_log_likelihood, prefix="dataset"
    )
    train(alone)
    assert "first step" not in (Path(alone.run) / run_folder.STARTUP).read_text()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_missing_template_is_said(tiny, tokenizer, whose):
    """Base models often have none: the other's is used."""
    (Path(getattr(tiny, whose)) / "chat_template.jinja").unlink()
    said = facts(tiny)
    assert said["prompt as rendered 0"] == repr(tokenizer.render("1+1="))
    assert said["note 0"].startswith(f"the {whose} has no chat template; ")


def test_a_named_template_serves_all(tiny):
    """Where no model has one, or in place of theirs: it is said, and read by student and teacher;
    a file of another text is another run's."""
    for folder in (tiny.student, tiny.teacher):
        (Path(folder) / "chat_template.jinja").unlink()
    plain = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, chat_template="plain"))
    said = facts(plain)
    assert said["prompt as rendered 0"] == repr("1+1=\n")
    assert said["chat template 0"].startswith("plain (data.chat_template), of student, teachers")
    assert "note 0" not in said
    parts = build(plain)
    assert parts.teachers[""].role.tokenizer.render("1") == parts.tokenizer.render("1") == "1\n"
    path = Path(tiny.student).parent / "own.jinja"
    path.write_text("{{ messages[0]['content'] }}:")
    named = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, chat_template=str(path)))
    before = roles.identities(named)
    assert before.keys() - roles.identities(plain).keys() == {"data.chat_template"}
    path.write_text("{{ messages[0]['content'] }};")
    changed = {name for name, now in roles.identities(named).items() if before[name] != now}
    assert changed == {"data.chat_template"}


def test_a_scaling_that_is_not_computed_beyond_the_context_stops_a_run(tiny):
    """Dynamic frequencies are plain up to the trained context: longer rows are refused by name."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    edit_json(
        Path(tiny.student) / "config.json", max_position_embeddings=24 + 8, rope_scaling=dynamic
    )
    longest = dataclasses.replace(tiny.evaluation, max_new_tokens=8)
    startup.report(build(dataclasses.replace(tiny, evaluation=longest)))
    longest = dataclasses.replace(tiny.evaluation, max_new_tokens=9)
    with pytest.raises(DataError, match=r"student may read 24 \+ 9 .* is 32: .* of type dynamic"):
        startup.report(build(dataclasses.replace(tiny, evaluation=longest)))


def test_without_a_teacher(tiny):
    """Nothing is said of a teacher, and there is no self-test."""
    alone = dataclasses.replace(
        tiny, teacher=None, prefix="dataset", objective=negative_log_likelihood
    )
    said = facts(alone)
    assert not any("teacher" in line for line in said.values())
    assert "self-test 0" not in said


def other_tokens(config: Config):
    path = Path(config.teacher) / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    model["vocab"]["0"], model["vocab"]["1"] = model["vocab"]["1"], model["vocab"]["0"]
    edit_json(path, model=model)


def few_rows(config: Config, folder: str):
    size = load_tokenizer(config.student).size
    shutil.move(folder, folder + "_old")
    models.create(Path(folder), tiny_config(size - 1), folder + "_old", seed=0)


def no_template(config: Config):
    for folder in (config.student, config.teacher):
        (Path(folder) / "chat_template.jinja").unlink()


def no_numbers(config: Config):
    path = Path(config.teacher) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (other_tokens, ConfigError, "tokenizers differ in 2 of"),
        (lambda c: few_rows(c, c.student), DataError, "the student has 278 vocabulary rows, its"),
        (lambda c: few_rows(c, c.teacher), DataError, "the teacher has 278 vocabulary rows, its"),
        (no_template, DataError, "student: the tokenizer has no chat template; add"),
        (no_numbers, DataError, "self-test: the teacher as its own student has KL nan nats"),
    ],
    ids=["other_tokens", "student_rows", "teacher_rows", "no_template", "no_numbers"],
)
def test_what_would_corrupt_a_run_stops_it(tiny, spoil, error, says):
    """One line, before anything is written or trained."""
    spoil(tiny)
    with pytest.raises(error) as caught:
        train(tiny)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(tiny.run).exists()


def test_a_model_that_is_not_itself(teacher, tokenizer):
    """Two readings of one text that differ by a little more than rounding fail the self-test; the
    same two, equal, pass."""
    model, params = teacher
    readings = []

    def unsteady(by: float):
        def hidden(params, tokens_bs):
            readings.append(by)
            return model.hidden(params, tokens_bs) * (1 + by * (len(readings) % 2))

        return model._replace(hidden=hidden)

    def largest(by: float) -> float:
        return startup.self_test(
            unsteady(by), params, tokenizer, HeadPlan(4, tokenizer.size, make_mesh(2))
        )

    assert largest(0.0) == 0
    with pytest.raises(DataError, match=r"self-test: .* which must be 0; .* \(cpu\)"):
        largest(0.1)


def test_both_sides_are_read(teacher, tokenizer):
    """The self-test's program reads each side's own parameters: other ones on one side show."""
    model, params = teacher
    tokens = np.int32([tokenizer.encode_prompt("1+1=")])
    rows = (np.int32([1]), np.int32([6]), np.zeros((1, 6), np.float32), np.array([False]))
    other = jax.tree.map(lambda w: 1.1 * w, params)
    plan = HeadPlan(4, tokenizer.size, make_mesh(1))
    scores = programs_module.jitted_score(model, model, plan, params, other, Rollout(tokens, *rows))
    assert min(np.max(kl) for kl in (scores.forward_kl, scores.reverse_kl)) > 1e-4


def test_the_run_folder_keeps_it(tiny, capsys):
    """Shown on the terminal and written to startup.txt; a resumed run rewrites the file."""
    announce.cache_clear()  # what another test's run said would not be said again
    train(tiny)
    shown = capsys.readouterr().out
    text = (Path(tiny.run) / run_folder.STARTUP).read_text()
    about, first = text[: text.index("first step: ")], text.splitlines()[-1]
    assert about == startup.report(build(tiny))
    assert about in shown
    assert first in shown
    train(dataclasses.replace(tiny, evaluation=dataclasses.replace(tiny.evaluation, samples=2)))
    assert (Path(tiny.run) / run_folder.STARTUP).read_text() == text


def test_the_self_test_is_compiled_once_a_model(tiny):
    """A study's cells load the same teacher anew and pay for one program."""
    before = programs_module.jitted_score._cache_size()
    for loss in (forward_kl, at_temperature(forward_kl, 3.0)):
        startup.report(build(dataclasses.replace(tiny, token_loss=loss, head_memory_mib=2)))
    assert programs_module.jitted_score._cache_size() == before + 1


def test_step_and_evaluation_take_the_policy(tiny, tokenizer, monkeypatch):
    """Both get the config's policy with the stop ids of student and teacher, student's first."""
    end, pad = tokenizer.stop_ids
    ends_alone(tiny)
    taken = {}

    def record(*args, **kwargs):
        taken.update(kwargs)
        return lambda *a: None

    monkeypatch.setattr(programs_module, "make_step", record)
    monkeypatch.setattr(programs_module, "_compose", programs_module._compose.__wrapped__)
    parts = build(dataclasses.replace(tiny, stops="mask"))
    assert taken["plan"] == parts.programs.head
    assert parts.programs.head.stops == Stops("mask", (pad, end))
    monkeypatch.setattr(
        examine_module, "evaluate", lambda _, scorer, *a, **k: (a_report([1]), scorer(None, [0]))
    )
    monkeypatch.setattr(examine_module, "unread", lambda *_: None)
    monkeypatch.setattr(examine_module, "jitted_score", lambda *args: args)
    monkeypatch.setattr(examine_module, "rows_on_host", lambda scores: scores)
    scored = examine_module.evaluate_params(parts, parts.student.trained)[1]
    assert parts.programs.head in scored


def test_a_teacher_reads_the_student_s_prompt(tiny, tokenizer, monkeypatch):
    """Its trajectories answer the student's rendering, and stop at its own stop ids."""
    path = Path(tiny.teacher) / "chat_template.jinja"
    path.write_text("Be brief." + path.read_text())
    end, pad = tokenizer.stop_ids
    edit_json(Path(tiny.teacher) / "generation_config.json", eos_token_id=pad)
    taken = []
    encode, drawn = prefixes_module._encode, prefixes_module.sampler_of
    monkeypatch.setattr(
        prefixes_module, "_encode", lambda asked, rows: taken.append(asked) or encode(asked, rows)
    )
    monkeypatch.setattr(prefixes_module, "sampler_of", lambda *a: taken.append(a[4]) or drawn(*a))
    parts = build(dataclasses.replace(tiny, prefix="teacher"))
    rows = parts.problems.batch_at(0)[1][:1]
    batch = problems.encode(
        parts.problems.source, parts.tokenizer, rows, tiny.data.max_prompt_tokens, 8
    )
    parts.responses.sources[parts.config.prefix][""](batch, parts.student.trained, None, 8)
    asked, stop_ids = taken
    assert stop_ids == (pad, end)
    assert asked.student.tokenizer.encode_prompt("1+1=") == tokenizer.encode_prompt("1+1=")


def test_limits_over_a_model_s_context_are_warned_of(tiny):
    """Training's and the evaluation's, each with its model and the numbers; a stretched context
    counts in full."""
    edit_json(Path(tiny.student) / "config.json", max_position_embeddings=24 + 8)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    edit_json(Path(tiny.teacher) / "config.json", max_position_embeddings=16, rope_parameters=yarn)
    longer = dataclasses.replace(tiny.evaluation, max_new_tokens=9)
    parts = build(dataclasses.replace(tiny, evaluation=longer))
    said = [line for line in startup.report(parts).splitlines() if "context" in line]
    assert said == [*startup.evaluation_context(parts)]
    assert [line.partition(":")[2].partition(",")[0] for line in said] == [
        f" the {name} may read 24 + 9 tokens (data.max_prompt_tokens + evaluation.max_new_tokens)"
        for name in ("student", "teacher")
    ]
    assert all("its context is 32 (max_position_embeddings)" in line for line in said)
    parts = parts._replace(config=dataclasses.replace(tiny, curriculum=Curriculum(lengths=(9,))))
    (one, *_) = (line for line in startup.report(parts).splitlines() if "context" in line)
    assert "may read 24 + 9 tokens (data.max_prompt_tokens + curriculum.lengths)" in one


def test_thinking_reaches_both(tiny, tokenizer):
    """data.thinking switches the rendering of student and teacher alike."""
    parts = build(dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, thinking=True)))
    rendered = {t.render("1") for t in (parts.tokenizer, parts.teachers[""].role.tokenizer)}
    assert rendered == {tokenizer.render("1").removesuffix("<think>\n\n</think>\n\n")}


def test_the_wording_reaches_both_and_the_report(tiny, tokenizer):
    """Template and system prompt are in what student and teacher see, and in the report; the key of
    an evaluation tells them apart."""
    worded = dataclasses.replace(tiny.data, system_prompt="Add.", prompt_template="Q: {prompt}")
    worded = dataclasses.replace(worded, max_prompt_tokens=40)
    config = dataclasses.replace(tiny, data=worded)
    parts = build(config)
    for rendered in (t.render("1") for t in (parts.tokenizer, parts.teachers[""].role.tokenizer)):
        assert "system\nAdd.<|im_end|>" in rendered
        assert "user\nQ: 1<|im_end|>" in rendered
    assert repr(parts.tokenizer.render("1+1=")) in startup.report(parts)
    keys = [examine_module.evaluation_key(c) for c in (tiny, config)]
    assert keys[0] != keys[1]


def test_memory_of_drawing_and_of_a_step(tiny):
    """Counted by hand: a float32 copy of the weights; keys and values of 2 layers with 2 heads of 8
    in 32 slots; two numbers a row and token. Residuals grow with rows, and remat drops most."""
    parts = build(tiny)
    own, mesh = parts.programs.student, parts.mesh
    found = sampling_bytes(own.sampler, own.params, mesh, "float32", 16, 32, 279)
    assert found == {
        "sampler's weights": 4 * count(tiny.student), "KV cache": 2 * 2 * 2 * 2 * 8 * 32 * 4,
        "logits": 2 * 2 * 4 * 279,
    }  # fmt: skip
    assert rows_at_once(own.sampler, mesh, Rollouts(), 5, 24, 8) == 8
    assert rows_at_once(own.sampler, mesh, Rollouts(rows=16), 99, 24, 8) == 16
    drawn = startup._of_draws(build(dataclasses.replace(tiny, prefix="teacher")))
    cache = drawn["drawing the teacher's responses"]["KV cache"]
    assert cache == 3 * 2 * 2 * 8 * 32 * 4  # one row a device of the step's 8, not of a chunk's 256
    one, two = (activation_bytes(parts.programs, rows, 32) for rows in (8, 16))
    hidden = 4 * 32 * 16  # of a row a device, in float32
    assert two == pytest.approx(2 * one, rel=0.01)
    assert two > 8 * hidden * 2
    full = build(dataclasses.replace(tiny, remat="full"))
    assert 2 * hidden <= activation_bytes(full.programs, 8, 32) < one / 3


def test_memory_of_dealt_parameters():
    """An array dealt over eight devices counts an eighth on each."""
    x = jax.device_put(np.zeros((16, 4), np.float32), batch_spec(make_mesh(8)))
    assert device_bytes({"x": x}) == 16 * 4 * 4 / 8
    assert device_bytes({"x": x}, 2) == 16 * 4 * 2 / 8
