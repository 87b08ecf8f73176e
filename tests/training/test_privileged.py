"""In the trainer: a teacher that reads more than the student, and the student as its own."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    assert_bitwise_equal,
    assert_interrupted_equals_uninterrupted,
    even_digits,
    final_state,
    logged,
)

from kdjax import clipped_surrogate, divergence, models, negative_log_likelihood
from kdjax.__main__ import main
from kdjax.config import RL, Config, Data, Evaluation, Layout, Lora, Served, Turn
from kdjax.config.validation import validate
from kdjax.errors import ConfigError
from kdjax.losses.combinators import add
from kdjax.runtime.files import read_json
from kdjax.step.average import average_of
from kdjax.storage import run_folder, trajectories
from kdjax.training import loop as train_module
from kdjax.training.feed import draw
from kdjax.training.parts import startup
from kdjax.training.parts.build import asked_of, build, fresh_state
from kdjax.training.parts.precompute import fill
from kdjax.training.parts.precomputed import Keep

TOLD = "{solution} {prompt}"
NAN = jnp.float32(np.nan)


def log_softmax64(logits) -> np.ndarray:
    logits = np.float64(logits)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def told(config: Config, template: str | None = TOLD, **changes) -> Config:
    """The config with a teacher that reads this, in up to 50 tokens."""
    most = None if template is None else 50
    data = dataclasses.replace(
        config.data, teacher_prompt_template=template, max_teacher_prompt_tokens=most
    )
    return validate(dataclasses.replace(config, data=data, **changes))


def step_of(parts, state=None, number: int = 0):
    """(rollout, state, metrics) after a step."""
    state = fresh_state(parts) if state is None else state
    state = jax.tree.map(jnp.copy, state)  # the step takes what it is given
    rollout = train_module._rollout(parts, state, number)
    (teacher,) = parts.teachers.values()
    read = teacher.programs.read(teacher.params, rollout)
    after, values = teacher.programs.steps[0](state, teacher.given, read, NAN, parts.student.frozen)
    return rollout, after, jax.device_get(values)


def test_the_teacher_reads_the_solution_and_the_student_does_not(tiny):
    """Tokens by the tokenizer and the problem's text; the loss and KL of a step are those of logits
    of each row alone, without padding, in float64."""
    parts = build(told(tiny))
    rollout, _, metrics = step_of(parts)
    student, own = models.load(tiny.student)
    teacher, theirs = models.load(tiny.teacher)

    @functools.lru_cache
    def logits(who: int, ids: tuple[int, ...]):
        model, params = ((student, own), (teacher, theirs))[who]
        states = model.hidden(params, jnp.array([ids]))[0]
        return log_softmax64(states @ model.head(params).weight_vd.T)

    sequences, tokens = [], []
    for row, index in enumerate(parts.problems.batch_at(0)[1]):
        problem, length = parts.problems.source.problem(index), rollout.response_length_b[row]
        prompt = parts.tokenizer.encode_prompt(problem.prompt)
        more = parts.tokenizer.encode_prompt(f"{problem.solution} {problem.prompt}")
        response = np.asarray(rollout.tokens_bs[row])[len(prompt) :][:length].tolist()
        rows = rollout.teacher_rows
        assert np.asarray(rows.tokens_bs[row])[: len(more) + length].tolist() == more + response
        size = parts.programs.head.vocabulary
        q = logits(0, (*prompt, *response))[len(prompt) - 1 : -1, :size]
        p = logits(1, (*more, *response))[len(more) - 1 : -1, :size]
        kl = (np.exp(p) * (p - q)).sum(-1)
        sequences.append(kl.mean())
        tokens += kl.tolist()
    np.testing.assert_allclose(metrics["loss"], np.mean(sequences), rtol=1e-4)
    np.testing.assert_allclose(metrics["forward_kl"], np.mean(tokens), rtol=1e-4)
    plain = step_of(build(tiny))[2]
    assert not np.isclose(plain["loss"], metrics["loss"], rtol=1e-3)


@pytest.mark.parametrize("prefix", ["student", "dataset", "teacher"])
def test_equal_prompts_are_the_ordinary_step(tiny, prefix):
    """To the bit, in parameters, optimizer and metrics, whoever wrote the responses."""
    plain = dataclasses.replace(
        tiny, prefix=prefix, data=Data(terms=(2,), problems=24, max_prompt_tokens=50)
    )
    steps = [step_of(build(config)) for config in (plain, told(plain, "{prompt}"))]
    assert steps[0][0].teacher_rows is None
    assert steps[1][0].teacher_rows is not None
    assert_bitwise_equal(steps[0][0], steps[1][0]._replace(teacher_rows=None))
    assert_bitwise_equal(jax.device_get(steps[0][1]), jax.device_get(steps[1][1]))
    assert steps[1][2].pop("aligned") == 1  # every token is read
    assert {n: float(v) for n, v in steps[0][2].items()} == {
        n: float(v) for n, v in steps[1][2].items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 2, "layout": Layout(fsdp=2, teacher_devices=4)},
        {"micro_batches": 1, "layout": Layout(fsdp=2)},
    ],
)
def test_micro_batches_and_devices_of_its_own(tiny, changes):
    """The same step, to rounding, split or with the teacher elsewhere."""
    whole = told(tiny)
    one, other = step_of(build(whole)), step_of(build(dataclasses.replace(whole, **changes)))
    for name, value in one[2].items():
        np.testing.assert_allclose(other[2][name], value, rtol=1e-4, err_msg=name)
    assert one[2]["loss"] > 1e-4


def test_the_teacher_draws_after_what_it_reads(tiny):
    """Its responses are those that it gives where every prompt is put so; the student learns them
    behind its own prompts. The cache tells them from those to other prompts."""
    config = dataclasses.replace(tiny, prefix="teacher")
    data = dataclasses.replace(config.data, prompt_template="Well: {prompt}", max_prompt_tokens=50)
    ordinary = build(dataclasses.replace(config, data=data))
    privileged = build(told(config, "Well: {prompt}"))
    ours, theirs = (
        jax.device_get(train_module._rollout(parts, fresh_state(parts), 0))
        for parts in (privileged, ordinary)
    )
    for row in range(8):
        lengths = ours.response_length_b[row], theirs.response_length_b[row]
        assert lengths[0] == lengths[1] > 0
        a, b = (
            r.tokens_bs[row, r.prompt_length_b[row] :][: lengths[0]].tolist()
            for r in (ours, theirs)
        )
        assert a == b
        assert ours.prompt_length_b[row] < theirs.prompt_length_b[row]
    plain = build(config)
    train_module._rollout(plain, fresh_state(plain), 0)
    kept = sorted((Path(tiny.cache) / "trajectories").glob("*/settings.json"))
    settings = [read_json(path) for path in kept]
    assert len(kept) == 3
    assert sum("teacher_prompts" in one for one in settings) == 1


def test_kept_states_are_of_what_the_teacher_reads(tiny, tmp_path, monkeypatch):
    """States and top-k from a folder give the live teacher's step, to rounding; a config whose
    teacher reads something else is refused."""
    monkeypatch.setattr(trajectories, "CHUNK_ROWS", 12)
    config = told(tiny, prefix="dataset")
    live = build(config)
    wanted = step_of(live)[2]
    for keep in (Keep("states"), Keep("top_k", live.programs.head.vocabulary)):
        folder = str(tmp_path / keep.kind)
        fill(asked_of(live, "dataset")[""], folder, keep, (0, 1), False)
        read = build(dataclasses.replace(config, trajectories=folder))
        rollout, _, metrics = step_of(read)
        assert rollout.teacher_rows is None
        for name in ("loss", "forward_kl", "reverse_kl"):
            np.testing.assert_allclose(metrics[name], wanted[name], rtol=2e-4, err_msg=name)
        for other in (None, "{answer} {prompt}"):
            with pytest.raises(ConfigError, match=r"are not this config's: .*teacher_prompts"):
                build(dataclasses.replace(told(config, other), trajectories=folder))
    bare = dataclasses.replace(config, trajectories=folder, teacher=None)
    np.testing.assert_allclose(step_of(build(bare))[2]["loss"], wanted["loss"], rtol=2e-4)
    with pytest.raises(ConfigError, match=r"nothing of a teacher that read this data\.teacher"):
        build(told(bare, "{answer} {prompt}"))
    build(told(bare, None))  # who leaves it out takes what was kept


def test_groups_are_read_with_their_solutions(tiny):
    """RL beside a teacher: each row's teacher prompt is of its own problem, in a group that was
    drawn anew too."""
    first = []

    def reward(prompt, response, answer):
        return 0.0 if prompt in first else even_digits(prompt, response, answer)

    objective = add(clipped_surrogate(0.2), divergence)
    rollouts = dataclasses.replace(tiny.rollouts, reward_workers=1)
    parts = build(told(tiny, objective=objective, rl=RL(4, reward, redraws=1), rollouts=rollouts))
    first.append(parts.problems.source.problem(parts.problems.batch_at(0)[1][0]).prompt)
    rollout = jax.device_get(draw(parts, fresh_state(parts).params, 0, 8, 0))
    own = parts.problems.batch_at(0)[1], parts.problems.batch_at(0, 1)[1]
    assert rollout.draws_b.tolist() == [2] * 4 + [1] * 4
    for row in range(8):
        index = own[int(row < 4 and rollout.signal_b[row])][row // 4]
        problem, length = parts.problems.source.problem(index), rollout.response_length_b[row]
        more = parts.tokenizer.encode_prompt(f"{problem.solution} {problem.prompt}")
        response = rollout.tokens_bs[row, rollout.prompt_length_b[row] :][:length].tolist()
        read = rollout.teacher_rows.tokens_bs[row, : len(more) + length].tolist()
        assert read == more + response


@pytest.fixture
def myself(tiny) -> Config:
    """The student as its own teacher, with the solution before it."""
    return told(tiny, teacher="self")


def stepped(parts, steps: int):
    """(trained parameters before each step and after the last, the last state)."""
    state, seen = fresh_state(parts), []
    for number in range(steps):
        seen.append(jax.device_get(state.params))
        state = step_of(parts, state, number)[1]
    return [*seen, jax.device_get(state.params)], state


def test_at_decay_0_it_is_the_live_student(myself):
    """Each step is that with the present parameters given as a teacher's, to the bit, and no copy
    is kept."""
    parts = build(myself)
    given = build(dataclasses.replace(myself, teacher=myself.student))
    (teacher,) = given.teachers.values()
    state = fresh_state(parts)
    assert "average" not in state.opt_state
    for number in range(3):
        rollout, after, metrics = step_of(parts, state, number)
        params = jax.tree.map(jnp.copy, state.params)
        other, values = teacher.programs.steps[0](
            jax.tree.map(jnp.copy, state), params, rollout, NAN, None
        )
        assert metrics["loss"] > 1e-5
        assert_bitwise_equal(jax.device_get(other), jax.device_get(after))
        assert_bitwise_equal(jax.device_get(values), metrics)
        state = after


def test_at_decay_1_it_is_the_start(myself):
    """The run is that of a teacher of the student's own folder, to the bit."""
    frozen = dataclasses.replace(
        myself, teacher=myself.student, run=myself.run + "2", cache=myself.cache + "2"
    )
    start = dataclasses.replace(myself, self_decay=1.0)
    reports = [train_module.train(config) for config in (start, frozen)]
    state, wanted = (final_state(config)[1] for config in (start, frozen))
    assert_bitwise_equal(state.params, wanted.params)
    assert_bitwise_equal(state.opt_state["guard"], wanted.opt_state["guard"])
    assert_bitwise_equal(average_of(state), jax.device_get(fresh_state(build(start)).params))
    flops = [[r.pop("flops_teacher") for r in logged(c)] for c in (start, frozen)]
    assert flops[0] == flops[1] != [0, 0, 0, 0]
    assert logged(start) == logged(frozen)
    assert (reports[0].avg, reports[0].forward_kl) == (reports[1].avg, None)
    said = (Path(start.run) / run_folder.STARTUP).read_text()
    assert "teacher: the student itself, as it is at the start" in said
    assert "prompt of the teacher as rendered, of the first problem: " in said


def test_between_it_is_the_average(myself):
    """That of NumPy's recursion over the parameters of each step; the teacher's log-probabilities
    are those of the average before the update."""
    config = dataclasses.replace(myself, self_decay=0.75)
    parts = build(config)
    seen, state = stepped(parts, 3)
    average = jax.tree.map(np.float64, seen[0])
    for after in seen[1:]:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.float64(p), average, after)
    for ours, wanted, last in zip(
        *map(jax.tree.leaves, (average_of(state), average, seen[-1])), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-7)
        assert not np.allclose(ours, last, rtol=1e-5, atol=1e-7)
    given = build(dataclasses.replace(myself, teacher=myself.student))
    (teacher,) = given.teachers.values()
    average = jax.tree.map(jnp.copy, average_of(state))
    rollout, after, metrics = step_of(parts, state, 3)
    bare = state._replace(opt_state={n: v for n, v in state.opt_state.items() if n != "average"})
    bare = jax.tree.map(jnp.copy, bare._replace(opt_state=type(state.opt_state)(bare.opt_state)))
    _, values = teacher.programs.steps[0](bare, average, rollout, NAN, None)
    assert values["loss"] == metrics["loss"]
    places = [
        [leaf.sharding for leaf in jax.tree.leaves(tree)]
        for tree in (average_of(after), after.params)
    ]
    assert places[0] == places[1]


def test_the_average_is_sharded_like_the_parameters(myself):
    config = dataclasses.replace(myself, self_decay=0.75, layout=Layout(fsdp=4))
    state = build(config).programs.student.state
    own, params = (
        [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
        for tree in (average_of(state), state.params)
    )
    assert own == params
    assert any(any(spec) for spec in own)


def test_interrupted_equals_uninterrupted(myself, tmp_path, monkeypatch):
    """With an average: the same bits, and it is among them."""
    whole = dataclasses.replace(myself, self_decay=0.5)
    assert_interrupted_equals_uninterrupted(whole, tmp_path, monkeypatch)
    assert "average" in final_state(whole)[1].opt_state
    with pytest.raises(ConfigError, match="with another config: self_decay: 0"):
        train_module.train(dataclasses.replace(whole, self_decay=0.25))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_with_an_adapter_it_is_the_adapter_s_average(myself, decay):
    """At decay 1 the teacher is the frozen base; the average has the adapter's leaves alone, and
    moves with them."""
    config = dataclasses.replace(myself, self_decay=decay, lora=Lora(2))
    parts = build(config)
    seen, state = stepped(parts, 2)
    kept = jax.device_get(average_of(state))
    wanted = jax.tree.map(lambda a, b, c: decay**2 * a + (1 - decay) * (decay * b + c), *seen)
    for ours, expected in zip(*map(jax.tree.leaves, (kept, wanted)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    metrics = step_of(parts, state, 2)[2]
    base = build(dataclasses.replace(myself, teacher=myself.student, lora=Lora(2)))
    (teacher,) = base.teachers.values()
    rollout = train_module._rollout(parts, state, 2)
    bare = fresh_state(base)._replace(params=jax.tree.map(jnp.copy, state.params))
    values = teacher.programs.steps[0](bare, teacher.given, rollout, NAN, base.student.frozen)[1]
    alike = np.isclose(metrics["loss"], values["loss"], rtol=1e-4)
    assert alike == (decay == 1.0)


def test_the_run_of_a_student_that_teaches_itself_is_evaluated(myself):
    """`kdjax evaluate RUN` has no KL, or that to a teacher that is named."""
    result = train_module.train(dataclasses.replace(myself, self_decay=0.5, steps=2))
    assert result.forward_kl is None
    for number, named in enumerate([(), ("--teacher", myself.student)]):
        out = Path(myself.run).parent / f"report{number}.json"
        assert main(["evaluate", myself.run, "--out", str(out), *named]) == 0
        assert (read_json(out)["forward_kl"] is not None) == bool(named)


def test_a_teacher_prompt_that_nobody_reads_is_said(tiny, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{n}", "answer": "1", "teacher_prompt": "t"}}\n' for n in range(9))
    )
    data = dataclasses.replace(tiny.data, file=str(path))
    config = dataclasses.replace(tiny, data=data, evaluation=Evaluation(file=str(path)))
    assert "note: problems have a teacher_prompt, and nobody" in startup.report(build(config))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefix": "teacher"}, "prefix teacher draws once, and teacher self is the student of"),
        ({"turns": (Turn(0.5, prefix="teacher"),)}, "prefix teacher draws once"),
        ({"layout": Layout(teacher_devices=2)}, "teacher_devices is 2; set it to 0, or beside"),
        ({"teacher_weights": "int8"}, "int8 needs a teacher of its own weights"),
        ({"self_decay": 1.5}, r"self_decay must be in \[0, 1\], got 1.5"),
        ({"self_decay": float("nan")}, "self_decay must be a number"),
        ({"self_decay": 0.5, "teacher": "kdjax:teacher"}, "0.5 is of teacher self, and teacher is"),
        ({"teacher": None, "teachers": ("a=self",)}, "teachers: a=self is for teacher alone"),
        ({"served": Served("http://localhost:1/v1")}, "served.url scores as another teacher"),
        (
            {"teacher": "kdjax:teacher", "served": Served("http://localhost:1/v1")},
            "data.teacher_prompt_template and served.url are both set",
        ),
        (
            {"teacher": "kdjax:teacher", "least_aligned": 0.5},
            "data.teacher_prompt_template and least_aligned are both set",
        ),
        ({"data": Data()}, "teacher self reads what the student reads, and both begin as one"),
        ({"data": Data(), "self_decay": 0.5}, "the loss is 0 and stays it: set data.teacher_pr"),
        ({"data": Data(teacher_prompt_template="{prompt}")}, "begin as one model"),
        (
            {"teacher": "kdjax:teacher", "data": Data(max_teacher_prompt_tokens=9)},
            "tokens is 9, and there is no data.teacher_p",
        ),
        ({"data": Data(teacher_prompt_template="")}, "has none, in ''; its fields are {prompt}"),
        ({"data": Data(teacher_prompt_template="{hint} {prompt}")}, "has the field {hint}; its f"),
        (
            {"data": Data(teacher_prompt_template=TOLD, max_teacher_prompt_tokens=0)},
            "max_teacher_prompt_tokens must be at least 1, got 0",
        ),
    ],
)
def test_what_can_not_be_is_one_line(changes, says):
    own = Config(teacher="self", data=Data(teacher_prompt_template=TOLD))
    with pytest.raises(ConfigError, match=says) as caught:
        validate(dataclasses.replace(own, **changes))
    assert "\n" not in str(caught.value)


def test_a_student_may_hold_itself_back():
    """Beside what moves it, its own past is a teacher of the same prompts."""
    moved = add(divergence, negative_log_likelihood)
    validate(Config(teacher="self", self_decay=1.0, objective=moved))


def test_a_template_needs_a_reader():
    """No teacher, and no folder that may hold what one said."""
    alone = Config(teacher=None, prefix="dataset", data=Data(teacher_prompt_template=TOLD))
    alone = dataclasses.replace(alone, objective=negative_log_likelihood)
    with pytest.raises(ConfigError, match="teacher_prompt_template needs a teacher that reads it"):
        validate(alone)
    validate(dataclasses.replace(alone, trajectories="folder"))


def test_kept_outputs_are_not_of_the_student_itself(tiny, myself, tmp_path):
    """A folder with states and teacher self: refused; nothing can be kept of it. It reads the
    responses of a folder that keeps nothing."""
    kept = told(tiny, prefix="dataset")
    folder = str(tmp_path / "kept")
    fill(asked_of(build(kept), "dataset")[""], folder, Keep("states"), (0, 1), False)
    with pytest.raises(ConfigError, match="keep states of a teacher, and teacher self reads"):
        build(dataclasses.replace(myself, prefix="dataset", trajectories=folder))
    asked = asked_of(build(dataclasses.replace(myself, prefix="dataset")), "dataset")[""]
    with pytest.raises(ConfigError, match="--keep states needs a teacher; set teacher"):
        fill(asked, str(tmp_path / "other"), Keep("states"), (0, 1), False)
    fill(asked, str(tmp_path / "bare"), Keep(), (0, 1), False)
    folders = None, str(tmp_path / "bare")
    losses = [
        step_of(build(dataclasses.replace(myself, prefix="dataset", trajectories=f)))[2]["loss"]
        for f in folders
    ]
    assert losses[0] == losses[1] > 1e-5
