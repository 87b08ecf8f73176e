"""Prefixes computed once: training from a folder is training live; what doesn't fit is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails
from release import by_default
from runs import assert_bitwise_equal, final_state, interrupt_at, logged, padded, write_problems
from serving import Reply, engine_core, serving, vllm

from kdjax import models
from kdjax.__main__ import main
from kdjax.base import Sampling
from kdjax.config import Config, Curriculum, Data, Evaluation, Layout, Optimizer, Rollouts
from kdjax.errors import ConfigError, DataError, EngineError
from kdjax.losses.combinators import add
from kdjax.losses.objectives import divergence, negative_log_likelihood
from kdjax.sharding import shard_batch
from kdjax.step.score import response_states
from kdjax.storage import run_folder, trajectories
from kdjax.training import loop as train_module
from kdjax.training.parts import startup
from kdjax.training.parts.build import asked_of, build, fresh_state
from kdjax.training.parts.precompute import fill, parse_share
from kdjax.training.parts.precomputed import Keep, parse_keep
from kdjax.training.parts.problems import encode

SOURCES = ("teacher", "student", "dataset")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(trajectories, "CHUNK_ROWS", 10)


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder) -> Config:
    """Four steps of 8 rows on 24 problems; three chunks of trajectories."""
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), student=str(student_folder),
        teacher=str(teacher_folder), prefix="teacher", steps=4, batch_size=8, save_every_steps=2,
        log_every_steps=1, optimizer=Optimizer(warmup_fraction=0.0),
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,), heldout_problems=5, measure_every_steps=2),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )  # fmt: skip


def stored(config: Config, keep: str | None, name: str = "kept") -> Config:
    """The config, reading from a folder that its own trajectories were written to."""
    folder = Path(config.run).parent / name
    live = build(dataclasses.replace(config, trajectories=None))
    for asked in asked_of(live, live.config.prefix).values():
        fill(asked, str(folder), parse_keep(keep), (0, 1), False)
    return dataclasses.replace(config, trajectories=str(folder))


def step_of(parts, rollout=None, number: int = 0):
    """(rollout, parameters and optimizer state, metrics) of a step from the start."""
    state = jax.tree.map(jnp.copy, fresh_state(parts))  # the step takes what it is given
    tag, _ = parts.problems.batch_at(number)
    if rollout is None:
        rollout = train_module._rollout(parts, state, number)
    teacher = parts.teachers[tag]
    read = teacher.programs.read(teacher.params, rollout)
    state, values = teacher.programs.steps[0](state, teacher.given, read, jnp.float32(np.nan), None)
    return rollout, jax.device_get((state.params, state.opt_state)), jax.device_get(values)


def bare(rollout):
    return rollout._replace(teacher_states_btd=None, teacher_top_k_bt=None)


def assert_close(found, wanted, tolerance=1e-5):
    """Every array to within a share of its largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("prefix", by_default(SOURCES, "dataset"))
def test_kept_states_train_as_the_live_teacher(tiny, prefix):
    """The same batch gives the same metrics, both KLs over the whole vocabulary among them, and
    the same gradient (the optimizer's moments), to rounding; of the teacher the head alone is
    there."""
    config = dataclasses.replace(tiny, prefix=prefix)
    cached, live = build(stored(config, "states")), build(config)
    rollout, moved, values = step_of(cached)
    assert rollout.teacher_states_btd.shape == (8, 8, 24)
    _, wanted_moved, wanted = step_of(live, bare(rollout))
    assert set(values) == set(wanted)
    assert wanted["forward_kl"] > 1e-5
    assert_close(values, wanted)
    assert_close(moved[1], wanted_moved[1])
    teacher = cached.teachers[""]
    assert teacher.params is None
    assert teacher.given.weight_vd.shape == (cached.tokenizer.size, 24)
    if prefix != "student":  # those of the live student are drawn anew at every step
        assert_bitwise_equal(bare(rollout), train_module._rollout(live, fresh_state(live), 0))


@pytest.mark.parametrize("dtype", by_default(["float32", "bfloat16"], "bfloat16"))
def test_kept_states_are_the_teacher_s_bits(tiny, dtype):
    """What the folder holds of rows that were read together is what the teacher's program says of
    them, bit for bit, and so is a step from it."""
    config = dataclasses.replace(tiny, dtype=dtype)
    parts, live = build(stored(config, "states")), build(config)
    batch = encode(
        parts.problems.source, parts.tokenizer, range(8), config.data.max_prompt_tokens, 8
    )
    rollout = shard_batch(
        parts.responses.sources[parts.config.prefix][""](batch, None, None, 8), parts.mesh
    )
    teacher = live.teachers[""]
    read = jax.jit(lambda params, rollout: response_states(teacher.programs.model, params, rollout))
    states = read(teacher.params, bare(rollout))
    inside = np.arange(8)[None] < np.asarray(rollout.response_length_b)[:, None]
    found, wanted = (np.asarray(x)[inside] for x in (rollout.teacher_states_btd, states))
    assert found.dtype == wanted.dtype == jnp.dtype(dtype)
    assert found.tobytes() == wanted.tobytes()
    assert not np.asarray(rollout.teacher_states_btd)[~inside].any()
    _, moved, values = step_of(parts, rollout)
    _, again, same = step_of(parts, rollout._replace(teacher_states_btd=states))
    assert_bitwise_equal((moved, values), (again, same))


def test_kept_top_k(tiny):
    """All V tokens kept give the live loss and gradient to 1e-6; four give less divergence, and no
    more than is there; nothing of the teacher is loaded, nor need it be named."""
    size = build(tiny).tokenizer.size
    whole, few = (stored(tiny, f"top_k={k}", f"top{k}") for k in (size, 4))
    _, moved, values = step_of(build(whole))
    rollout, _, coarse = step_of(parts := build(dataclasses.replace(few, teacher=None)))
    assert rollout.teacher_top_k_bt.ids.shape == (8, 8, 4)
    _, wanted_moved, wanted = step_of(build(tiny), bare(rollout))
    for name in ("loss", "forward_kl", "reverse_kl"):
        assert abs(values[name] - wanted[name]) < 1e-6
        assert 0 < coarse[name] < wanted[name]
    assert_close(moved[1], wanted_moved[1])
    assert "teacher_entropy" not in values
    for name in ("top1_agreement", "teacher_top1"):
        assert coarse[name] == wanted[name]
    assert parts.teachers[""].given is None


def test_top_k_is_of_the_real_vocabulary(tiny, tmp_path):
    """Padding rows of the teacher with logits far above all others are as if they were not
    there."""
    wide = dataclasses.replace(tiny, teacher=padded(tmp_path / "teacher8", tiny.teacher, 8))
    rows, kept = np.arange(24), []
    for name, config in (("plain", tiny), ("wide", wide)):
        config = stored(dataclasses.replace(config, prefix="dataset"), "top_k=5", name)
        path = Path(config.trajectories)
        kept.append(trajectories.reader(path, trajectories.read_settings(path))(rows))
    assert kept[1].top_k_bt.ids.max() < build(tiny).tokenizer.size
    assert_bitwise_equal(kept[0].samples, kept[1].samples)
    assert_close(kept[1].top_k_bt, kept[0].top_k_bt)


def test_a_shorter_curriculum_cuts_what_is_kept(tiny):
    """Lengths 4, 8 from a folder of 8: the first stage has the first four tokens and states."""
    whole = stored(tiny, "states")
    curriculum = Curriculum(lengths=(4, 8), entropy_threshold_nats=0.1)
    short = dataclasses.replace(whole, curriculum=curriculum)
    (long_one, *_), (cut_one, _, values) = step_of(build(whole)), step_of(build(short))
    assert cut_one.teacher_states_btd.shape[1] == 4
    np.testing.assert_array_equal(
        cut_one.teacher_states_btd, np.asarray(long_one.teacher_states_btd)[:, :4]
    )
    lengths = np.asarray(long_one.response_length_b)
    assert lengths.max() > 4
    np.testing.assert_array_equal(cut_one.response_length_b, np.minimum(lengths, 4))
    assert values["response_length"] == np.minimum(lengths, 4).mean()


def test_a_run_from_a_folder(tiny, tmp_path, monkeypatch, capsys):
    """Interrupted and resumed it ends bit for bit the same; the start and the evaluation say what
    is missing; another folder's contents are refused, the same elsewhere is not."""
    whole = stored(tiny, "states")
    result = train_module.train(whole)
    said = capsys.readouterr().out
    assert "no KL to a teacher, as its outputs were read from a folder" in said
    assert result.forward_kl is None
    assert result.entropy > 0
    started = (Path(whole.run) / run_folder.STARTUP).read_text()
    assert f"24 responses of the teacher, up to 8 tokens, from {whole.trajectories}" in started
    assert "kept of the teacher: states" in started
    assert "teachers' LM heads" in started
    assert "self-test" not in started
    assert logged(whole)[-1]["forward_kl"] > 0

    moved = tmp_path / "moved"
    shutil.copytree(whole.trajectories, moved)
    halves = dataclasses.replace(whole, run=str(tmp_path / "halves"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(halves)
    train_module.train(dataclasses.replace(halves, trajectories=str(moved)))
    assert_bitwise_equal(final_state(whole)[1], final_state(halves)[1])
    assert logged(whole) == logged(halves)

    other = stored(dataclasses.replace(tiny, seed=1), "states", "other").trajectories
    with pytest.raises(ConfigError, match="other weights or data: trajectories: "):
        train_module.train(dataclasses.replace(halves, trajectories=other))
    with pytest.raises(ConfigError, match=r"other weights or data: trajectories: .* -> None"):
        train_module.train(dataclasses.replace(halves, trajectories=None))
    assert main(["evaluate", whole.run, "--out", str(tmp_path / "with.json")]) == 0
    with_teacher = json.loads((tmp_path / "with.json").read_text())
    assert with_teacher["forward_kl"] > 0
    assert with_teacher["entropy"] == pytest.approx(result.entropy, rel=1e-6)


def test_responses_alone(tiny):
    """A folder that keeps nothing of the teacher: it is loaded and read live, with its KLs in the
    evaluation; an objective without a teacher needs none."""
    config = stored(tiny, None)
    result = train_module.train(config)
    assert result.forward_kl > 0
    live = dataclasses.replace(config, trajectories=None, run=tiny.run + "2")
    train_module.train(live)
    own, drawn = logged(config), logged(live)
    assert {r.pop("flops_sampling") for r in own} == {0.0}  # and nothing else tells them apart
    assert all(r.pop("flops_sampling") > 0 for r in drawn)
    assert own == drawn
    alone = dataclasses.replace(
        config, teacher=None, objective=negative_log_likelihood, run=tiny.run + "3"
    )
    assert train_module.train(alone).forward_kl is None
    assert logged(alone)[0]["student_logp"] == logged(live)[0]["student_logp"]


def test_the_cache_is_such_a_folder(tiny, tmp_path):
    """Without --out, `kdjax rollouts` fills the folder that prefix teacher reads: a run after it
    draws nothing."""
    parts = build(tiny)
    place, drawn = fill(asked_of(parts, parts.config.prefix)[""], None, Keep(), (0, 1), False)
    assert place.parent == tmp_path / "cache" / "trajectories"
    assert drawn == 3
    ages = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    train_module.train(tiny)
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == ages
    assert list(place.parent.iterdir()) == [place]


def test_a_run_draws_what_its_steps_need(tiny, tmp_path, capsys):
    """One step of 8 rows draws 8 of the 24 responses, and says so; a longer run draws the others
    that it needs, a chunk's number at a time, in the order of its steps."""
    build_one = build(dataclasses.replace(tiny, steps=1))
    _rows_of(build_one, [0])
    (place,) = (tmp_path / "cache" / "trajectories").iterdir()
    assert [len(rows) for rows in _pieces(place)] == [8]
    assert "drawing responses 1 to 8 of the 8 that are needed" in capsys.readouterr().out
    parts = build(dataclasses.replace(tiny, steps=2))
    first, second = _rows_of(parts, [0]), _rows_of(parts, [0, 1])
    assert sorted(map(len, _pieces(place))) == [6, 8, 10]
    drawn = {row for rows in _pieces(place) for row in rows}
    wanted = [row for step in (0, 1) for row in parts.problems.batch_at(step)[1]]
    assert drawn == {*wanted}
    assert len(drawn) == 16
    assert_bitwise_equal(first, jax.tree.map(lambda x: x[:8], second))


def _rows_of(parts, steps):
    """The teacher's responses to the problems of these steps."""
    rows = [row for step in steps for row in parts.problems.batch_at(step)[1]]
    batch = encode(parts.problems.source, parts.tokenizer, rows, 24, 8)
    return parts.responses.sources["teacher"][""](batch, None, None, 8)


def _pieces(place: Path) -> list[list[int]]:
    return [datasets.load_from_disk(str(p))["row"][:] for p in place.glob("rows-*")]


@pytest.mark.release
def test_several_teachers(tiny, tmp_path, other_folder):
    """Each tag has a folder of its own teacher's states; steps are the live ones."""
    train, test = (write_problems(tmp_path / f"{n}.jsonl", 36) for n in ("train", "test"))
    config = dataclasses.replace(
        tiny, teacher=None, teachers=(f"add={tiny.teacher}", f"sub={other_folder}"),
        data=Data(file=train, max_prompt_tokens=24),
        evaluation=dataclasses.replace(tiny.evaluation, file=test),
    )  # fmt: skip
    cached, live = build(stored(config, "states")), build(config)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["teacher add", "teacher sub"]
    assert {"trajectories add", "trajectories sub"} <= set(cached.identities)
    assert "36 responses of the teacher" in startup.report(cached)
    widths = {}
    for number in (0, 1):
        rollout, moved, values = step_of(cached, number=number)
        _, wanted_moved, wanted = step_of(live, bare(rollout), number)
        widths[cached.problems.batch_at(number)[0]] = rollout.teacher_states_btd.shape[-1]
        assert_close(values, wanted)
        assert_close(moved[1], wanted_moved[1])
    assert widths == {"add": 24, "sub": 32}


REFUSED = {
    "prefix": (dict(prefix="student"), "not this config's: prefix: teacher -> student; "),
    "problems": (dict(data=Data(terms=(3,), problems=24)), r"problems: task:calc/train/24/\(2,\)"),
    "template": (dict(data=None), "template: "),
    "sampling": (dict(sampling=Sampling(0.5)), r"sampling\.temperature: 1\.0 -> 0\.5; set the old"),
    "dtype": (dict(dtype="bfloat16"), "dtype: float32 -> bfloat16"),
    "length": (
        dict(curriculum=Curriculum(lengths=(8, 16), entropy_threshold_nats=0.1)),
        r"end at 8 tokens, and curriculum\.lengths reach 16; lower those",
    ),
    "head": (dict(teacher=None), "keep the teacher's states, which its LM head .* set teacher to"),
    "devices": (dict(layout=Layout(teacher_devices=4)), "teacher_devices is 4; set it to 0"),
    "nothing": (
        dict(teacher=None),
        "keep nothing of a teacher, and objective divergence needs one; .* --keep states",
    ),
    "merge": (dict(stops="merge"), "keep the teacher's top 4, and stops merge needs its whole"),
}


def by_teacher_entropy(scores):
    return scores.divergence - 0.1 * scores.teacher_entropy


REFUSED |= {
    "objective": (
        dict(objective=by_teacher_entropy),
        r"objective \S*by_teacher_entropy needs more of the teacher",
    ),
    "composed": (
        dict(teacher=None, objective=add(negative_log_likelihood, divergence)),
        r"keep nothing of a teacher, and objective add\(.* needs one",
    ),
}
KEPT = {"nothing": None, "composed": None, "merge": "top_k=4", "objective": "top_k=4"}


@pytest.fixture(scope="module")
def filled() -> dict:
    """The folders that were filled for the tests below, by what they keep of the teacher."""
    return {}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_do_not_fit_are_refused(tiny, tmp_path, filled, name):
    """Other prompts, another sampling, too short responses, nothing kept: one line that names what
    differs and the remedy, and no run folder."""
    changes, says = REFUSED[name]
    keep = KEPT.get(name, "states")
    if keep not in filled:
        filled[keep] = stored(tiny, keep).trajectories
    kept = dataclasses.replace(tiny, trajectories=filled[keep])
    if name == "template":
        folder = tmp_path / "student"
        shutil.copytree(tiny.student, folder)
        template = folder / "chat_template.jinja"
        template.write_text("now " + template.read_text())
        changes = dict(student=str(folder))
    with pytest.raises(ConfigError, match=f"^trajectories {kept.trajectories} .*{says}") as caught:
        train_module.train(dataclasses.replace(kept, **changes))
    assert "\n" not in str(caught.value)
    assert not Path(tiny.run).exists()


def test_other_weights_and_vocabularies_are_refused(tiny, tmp_path):
    """Another teacher than the one whose outputs were kept, and a student with fewer tokens."""
    kept = stored(tiny, "states")
    other = tmp_path / "other"
    shutil.copytree(tiny.teacher, other)
    path = other / "generation_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ConfigError, match=r"teacher: \w+ -> \w+; weights: \w+ -> \w+; set the old"):
        build(dataclasses.replace(kept, teacher=str(other)))
    top = stored(tiny, "top_k=4", "top")
    settings = Path(top.trajectories) / "settings.json"
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps(fields | {"vocabulary": fields["vocabulary"] + 1}))
    size = fields["vocabulary"]
    with pytest.raises(ConfigError, match=f"vocabulary: {size + 1} -> {size}"):
        build(dataclasses.replace(top, teacher=None))


def test_a_missing_or_damaged_folder_stops_the_start(tiny, tmp_path):
    """No folder, one that is not complete, and a chunk that was changed, by name."""
    with pytest.raises(DataError, match="nowhere holds no trajectories"):
        build(dataclasses.replace(tiny, trajectories=str(tmp_path / "nowhere")))
    kept = stored(tiny, "states")
    chunk = Path(kept.trajectories) / "chunk-00001"
    (arrow,) = chunk.glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    with pytest.raises(DataError, match=r"chunk-00001 are damaged \(data-.*arrow is not what was"):
        train_module.train(kept)
    shutil.rmtree(chunk)
    with pytest.raises(DataError, match="1 of 3 chunks are missing"):
        build(kept)


COMMAND = """
from kdjax import Config
from kdjax.config import Curriculum, Data, Evaluation

def get_config():
    return Config(
        run={run!r}, student={student!r}, teacher={teacher!r}, cache={cache!r}, prefix="student",
        steps=1, batch_size=8, data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )
"""


def test_the_command(tiny, tmp_path, capsys):
    """Drawn in two shares, completed, refused with other settings, trained from; each mistake is
    one line."""
    path, out = tmp_path / "config.py", tmp_path / "out"
    names = {n: getattr(tiny, n) for n in ("run", "student", "teacher", "cache")}
    path.write_text(COMMAND.format(**names))
    command = ["rollouts", str(path), "--out", str(out), "--keep", "top_k=4"]
    assert main([*command, "--share", "1/2"]) == 0
    assert f"{out}: 1 chunks drawn now, 24 responses in all" in capsys.readouterr().out
    assert "2 of 3 chunks are missing" in fails(capsys, 65, "train", path, "--trajectories", out)
    assert main([*command, "--redo"]) == 0
    assert f"{out}: 2 chunks drawn now" in capsys.readouterr().out
    assert "keep: top_k=4 -> states" in fails(capsys, 64, *command[:-1], "states")
    wrong = [
        (["--keep", "all"], "--keep is states or top_k=K, such as top_k=64, got 'all'"),
        (["--keep", "top_k=5000"], "is over the vocabulary of"),
        (["--share", "2/2"], "INDEX below COUNT"),
        (["--keep", "states", "--teacher", "None"], "objective divergence needs a teacher"),
        (["--steppz", "3"], "unknown field steppz"),
    ]
    for options, says in wrong:
        assert says in fails(capsys, 64, "rollouts", path, *options)
    sft = ["--teacher", "None", "--objective", "negative_log_likelihood"]
    no_teacher = fails(capsys, 64, "rollouts", path, "--keep", "states", *sft)
    assert "--keep states needs a teacher" in no_teacher
    (tmp_path / "file").write_text("")
    taken = tmp_path / "file" / "out"
    assert "can't keep trajectories in" in fails(capsys, 74, "rollouts", path, "--out", taken)
    assert main(["train", str(path), "--trajectories", str(out), "--teacher", "None"]) == 0
    assert (Path(tiny.run) / "report.html").exists()


def test_options_as_written():
    """--keep and --share, by what they are written as."""
    assert [str(parse_keep(t)) for t in (None, "states", "top_k=64")] == [
        "nothing", "states", "top_k=64",
    ]  # fmt: skip
    assert parse_share(None) == (0, 1)
    for text in ("top_k=0", "top_k", "state"):
        with pytest.raises(ConfigError, match="--keep is states or top_k=K"):
            parse_keep(text)


def test_only_the_head_is_read(tiny, monkeypatch):
    """read_head reads one tensor of the folder, and gives the head that loading all of it gives."""
    from kdjax.models.hf import weights

    pieces, piece = [], weights._piece
    monkeypatch.setattr(weights, "_piece", lambda *args: pieces.append(args) or piece(*args))
    for folder in (tiny.teacher, tiny.student):  # with a head of its own, and tied
        config = models.read_config(Path(folder))
        found = models.read_head(Path(folder), config)
        assert len(pieces) == 1
        model, params = models.load(folder)
        np.testing.assert_array_equal(found.weight_vd, model.head(params).weight_vd)
        pieces.clear()


@pytest.mark.parametrize("prefix", by_default(["teacher", "student"], "teacher"))
def test_an_engine_draws_in_place_of_this_process(tiny, prefix, teacher, student):
    """`rollouts.engine`: the responses of a server that holds the model, greedily those drawn here;
    kept apart from them, without the entropy that it does not say; training reads them."""
    greedy = dataclasses.replace(tiny, prefix=prefix, sampling=Sampling(0.0), trajectories=None)
    model, params = {"teacher": teacher, "student": student}[prefix]
    core = engine_core(model, params, 8)
    with serving(lambda body: vllm(core(body), body)) as server:
        engine = Rollouts(
            engine=server.url, engine_model="tiny", engine_at_once=2, engine_timeout_seconds=50
        )
        config = stored(dataclasses.replace(greedy, rollouts=engine), "states", "engine's")
        assert [body["max_tokens"] for body in server.asked] == [1] + 24 * [8]
        assert max(server.in_flight) <= 2
        assert {float(h["x-stainless-read-timeout"]) for h in server.headers} == {50.0}
    own = stored(greedy, "states", "own")
    drawn, wanted = (
        trajectories.reader(Path(c.trajectories), trajectories.read_settings(Path(c.trajectories)))(
            np.arange(24)
        )
        for c in (config, own)
    )
    assert drawn.samples.entropy_bt is None
    for name in ("tokens_bt", "length_b", "stop_b"):
        np.testing.assert_array_equal(
            getattr(drawn.samples, name), getattr(wanted.samples, name), name
        )
    settings = trajectories.read_settings(Path(config.trajectories))
    assert settings["engine"] == "tiny"
    _, _, values = step_of(build(config))
    assert values["forward_kl"] > 0


def test_an_engine_is_asked_for_one_token_first(tiny):
    """One that lists its models and fails at a request is named by a single one; one whose context
    is too short for the longest row by none."""
    config = dataclasses.replace(tiny, prefix="teacher", trajectories=None)
    cards = [{"id": "tiny", "max_model_len": length} for length in (24 + 8, 16)]
    failing, short = ({"data": [card]} for card in cards)
    with serving(lambda body: Reply({"error": {"message": "head_dim"}}, 500), failing) as server:
        engine = Rollouts(engine=server.url, engine_model="tiny", engine_retries=0)
        with pytest.raises(EngineError, match=r"500 - .*head_dim.*one token first; docs/engines"):
            stored(dataclasses.replace(config, rollouts=engine), None, "engine's")
    assert [body["max_tokens"] for body in server.asked] == [1]
    with serving(dict, short) as server:
        engine = Rollouts(engine=server.url, engine_model="tiny")
        with pytest.raises(ConfigError, match=r"the longest row: .* context of 16; start it with"):
            stored(dataclasses.replace(config, rollouts=engine), None, "engine's")
    assert server.asked == []


def test_a_missing_client_is_said_before_a_chunk_is_drawn(tiny, monkeypatch, capsys):
    """The engine's, which needs an extra."""
    monkeypatch.setitem(sys.modules, "openai", None)
    engine = Rollouts(engine="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r'pip install "kdjax\[engine\]"'):
        stored(dataclasses.replace(tiny, rollouts=engine, trajectories=None), None, "engine's")
    assert "drawing chunk" not in capsys.readouterr().out
