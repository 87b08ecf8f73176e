"""Plans: what is held is counted from shapes, programs are the real ones, advice helps."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import tiny_config

from kdjax import clipped_surrogate, models, reverse_kl
from kdjax.__main__ import main
from kdjax.config import RL, Config, Curriculum, Data, Layout, Lora, Turn
from kdjax.errors import ConfigError
from kdjax.models.known import KNOWN
from kdjax.models.layers.cache import Recurrent, Slots, Window
from kdjax.plan import plan as plan_module
from kdjax.plan.phase import Phase, device_gib
from kdjax.plan.plan import plan, shapes_of
from kdjax.plan.rollout import _moved_gib
from kdjax.plan.show import advice, to_json
from kdjax.sharding import make_mesh
from kdjax.training.parts.shapes import Shapes, choose_meshes, held_bytes

GIB = 2**30


def elements(folder) -> int:
    config = models.read_config(models.find(folder))
    shapes = models.abstract_params(config, np.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.fixture(scope="module")
def tiny(student_folder, teacher_folder) -> Config:
    return Config(
        student=str(student_folder),
        teacher=str(teacher_folder),
        steps=4,
        batch_size=8,
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
    )


@pytest.fixture(scope="module")
def made(tiny):
    """The plan of a run that distils, then rewards and asks a reference, on the eight devices with
    fsdp 2."""
    config = dataclasses.replace(
        tiny, prefix="dataset", reference=tiny.student, rl=RL(4, epochs=2, redraws=1),
        turns=(Turn(from_step=2, prefix="student", objective=clipped_surrogate(0.2)),),
        layout=Layout(fsdp=2),
    )  # fmt: skip
    return config, plan(config, "local")


def test_what_is_held(made):
    """float32 parameters and two moments dealt over two, the teacher as well, to the byte (norms
    are whole)."""
    config, planned = made
    assert planned.mesh == {"data": 4, "fsdp": 2, "tensor": 1}
    student, teacher = elements(config.student), elements(config.teacher)
    held = planned.held_gib
    assert 0.5 <= held["trained parameters"] * GIB / (4 * student) < 0.52
    assert 0.5 <= held["teacher"] * GIB / (4 * teacher) < 0.52
    assert held["optimizer"] == pytest.approx(2 * held["trained parameters"], rel=2e-3)  # counters
    assert held["reference"] == held["trained parameters"]
    assert held["frozen base"] == 0


def test_phases(made):
    """Every program of the run holds and sends something; the KV cache is counted by hand."""
    config, planned = made
    names = ["step", "step of turn 1", "rollout", "reference", "old policy"]
    assert list(planned.phases) == names
    assert all(phase.flops > 0 and phase.sent_gib for phase in planned.phases.values())
    forward = planned.phases["reference"].flops  # of the student's shape, as is what drew
    assert planned.phases["old policy"].flops == planned.phases["rollout"].flops == forward
    teacher = planned.phases["step"].flops - 3 * forward
    assert teacher > 0
    assert planned.phases["step of turn 1"].flops == planned.phases["step"].flops
    assert [line.split(":")[0] for line in planned.remarks] == ["rl.epochs 2", "rl.redraws 1"]
    step, rollout = planned.phases["step"], planned.phases["rollout"]
    shape = models.read_config(models.find(config.student))
    slots = config.data.max_prompt_tokens + config.curriculum.lengths[-1]
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * slots * shape.head_dim * 4
    assert rollout.extra_gib["KV cache"] * GIB == cache * config.batch_size / 8
    assert step.extra_gib["activations"] > 0
    assert step.flops > 0
    assert step.sent_gib["all-gather"] > 0
    assert planned.memory_gib is None
    assert planned.fits
    assert planned.total_gib("step") == pytest.approx(
        sum(planned.held_gib.values()) + sum(step.extra_gib.values())
    )
    assert json.loads(json.dumps(to_json(planned)))["total_gib"]["step"] > 0


def test_advice_names_what_is_too_large(made):
    """Where memory is short the advice names fields that lower what is too large; else nothing."""
    config, planned = made
    assert planned.advice == []
    small = planned._replace(memory_gib=min(map(planned.total_gib, planned.phases)) / 2)
    assert not small.fits
    said = " ".join(advice(config, small))
    for field in ("--layout.fsdp 8", "--remat full", "--layout.tensor 2"):
        assert field in said


@pytest.fixture
def uncompiled(monkeypatch) -> list[int]:
    """Plans whose phases hold nothing, at once; the methods whose steps are asked for."""
    empty, asked = Phase({}, 1.0, {}, None, 0.0), []

    def step_of(config, method, number, *_):
        asked.append(number)
        return empty, ""

    monkeypatch.setattr(plan_module, "step_phase", step_of)
    monkeypatch.setattr(plan_module, "rollout_phase", lambda *_: empty)
    return asked


@pytest.mark.parametrize(
    ("changes", "rollouts"),
    [
        ({"turns": (Turn(0.5, prefix="student"),)}, ["teacher rollout", "student rollout"]),
        ({"turns": (Turn(0.5, prefix="dataset"),)}, ["rollout"]),
        ({"turns": (Turn(0.5, token_loss=reverse_kl), Turn(0.3))}, ["rollout"]),
    ],
)
def test_a_step_for_each_method_and_a_rollout_for_each_source(tiny, uncompiled, changes, rollouts):
    """Methods that share a source share its rollout; without a reference or epochs nothing is read
    besides."""
    made = plan(dataclasses.replace(tiny, prefix="teacher", **changes), "local")
    steps = len(changes["turns"]) + 1
    assert uncompiled == list(range(steps))
    assert list(made.phases)[:steps] == ["step", "step of turn 1", "step of turn 2"][:steps]
    assert list(made.phases)[steps:] == rollouts


def test_an_adapter_holds_less(tiny, uncompiled):
    """LoRA: moments of the adapter alone, the base once."""
    config = dataclasses.replace(tiny, prefix="dataset", lora=Lora(rank=1))
    planned = plan(config, "local")
    assert set(planned.phases) == {"step"}
    assert planned.held_gib["frozen base"] * GIB == 4 * elements(config.student)
    assert planned.held_gib["optimizer"] < planned.held_gib["frozen base"]


def test_released_checkpoints_are_known_without_a_file():
    """The paper's pairs by their hub names: the published numbers of parameters."""
    config = Config(student="Qwen/Qwen3-0.6B-Base", teacher="Qwen/Qwen3-8B")
    shapes = shapes_of(config)
    assert shapes.vocabulary == 151_669
    assert shapes.teacher_stop_ids[0] == 151_645
    published = {
        "Qwen/Qwen3-0.6B-Base": 596_049_920,
        "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3.5-0.8B": 752_393_024,  # of these and the last, the text parts
        "Qwen/Qwen3.5-4B": 4_205_751_296,
        "google/gemma-3-1b-pt": 999_885_952,
        "google/gemma-3-4b-it": 3_880_263_168,
    }
    for name, count in published.items():
        shapes = models.abstract_params(KNOWN[name].config, np.float32)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_a_token_moves_what_its_layers_read():
    """Half of the slots that a response fills, a window whole, a state twice."""
    array = jax.device_put(np.zeros((2, 1, 16, 4), np.float32))
    bytes_of = [
        _moved_gib(layer, 4, 12) * GIB
        for layer in (Slots(array, array), Window(array, array), Recurrent(array, array))
    ]
    assert bytes_of == [2 * 512 * 10 / 16, 2 * 512, 4 * 512]


def test_an_unknown_model(tiny):
    """A name that is no folder and no released checkpoint is one line."""
    with pytest.raises(Exception, match="absent") as caught:
        plan(dataclasses.replace(tiny, student="./absent"), "local")
    assert "\n" not in str(caught.value)


def test_layouts_that_cannot_be(tiny):
    """Heads and rows that can't be dealt are named."""
    for changes, says in (
        ({"layout": Layout(tensor=8)}, "key/value heads"),
        ({"layout": Layout(fsdp=3)}, "fsdp must divide the 8 devices"),
        ({"batch_size": 12}, "can't be sharded over 8 devices"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan(dataclasses.replace(tiny, **changes), "local")


class Absent:
    """A device that is not here, of a kind whose memory is published."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def memory_stats(self):
        raise jax.errors.JaxRuntimeError("only supported for addressable devices")


def test_states_are_dealt_where_they_would_fill_a_device(monkeypatch):
    """fsdp by default: 1 while states fill at most 40 % of a device, else all but tensor."""
    asked = []
    monkeypatch.setattr(
        "kdjax.training.parts.shapes.make_mesh",
        lambda devices, fsdp, tensor: asked.append((fsdp, tensor)),
    )
    small, large = tiny_config(96), KNOWN["Qwen/Qwen3-4B"].config
    devices = [Absent()] * 8
    for config, student in (
        (Config(), small),
        (Config(), large),
        (Config(layout=Layout(tensor=2)), large),
        (Config(layout=Layout(fsdp=4)), large),
    ):
        choose_meshes(config, devices, Shapes(student, {None: None}, 96, (0,)))
    assert asked == [(1, 1), (8, 1), (4, 2), (4, 1)]
    shapes = Shapes(small, {None: None}, 96, (0,))
    copied = Config(curriculum=Curriculum(policy="fall_back"))
    parameters = sum(x.size for x in jax.tree.leaves(models.abstract_params(small, np.float32)))
    assert held_bytes(copied, shapes) - held_bytes(Config(), shapes) == 4 * parameters


def test_device_gib_counts_shards():
    """An array dealt over eight counts an eighth, a whole one all."""
    mesh = make_mesh(8)
    from kdjax.sharding import batch_spec, replicated

    x = jax.ShapeDtypeStruct((16, 4), np.float32, sharding=batch_spec(mesh))
    y = jax.ShapeDtypeStruct((16, 4), np.float32, sharding=replicated(mesh))
    assert device_gib([x, y]) * GIB == 16 * 4 * 4 * (1 / 8 + 1)


def test_the_command(tiny, tmp_path, capsys):
    """kdjax plan prints a table and writes JSON; overrides are of the config."""
    path = tmp_path / "config.py"
    path.write_text(
        "from kdjax import Config\n"
        "from kdjax.config.schema import Curriculum\n"
        f"def get_config():\n    return Config(run='r', student={tiny.student!r},"
        f" teacher={tiny.teacher!r}, batch_size=8, curriculum=Curriculum(lengths=(8,)))\n"
    )
    out = tmp_path / "plan.json"
    assert main(["plan", str(path), "--out", str(out), "--prefix", "dataset"]) == 0
    printed = capsys.readouterr().out
    assert "total GiB" in printed
    assert "optimizer GiB" in printed
    assert list(json.loads(out.read_text())["phases"]) == ["step"]
    assert main(["plan", str(path), "--topology", "v9z:2x2"]) == 64
    assert main(["plan", str(path), "--out", str(out)]) == 74


def test_the_student_s_average_is_counted(tiny, uncompiled):
    """Teacher self holds no teacher; its average is another float32 copy of what is trained."""
    own = dataclasses.replace(tiny, teacher="self", layout=Layout(fsdp=2))
    data = dataclasses.replace(own.data, teacher_prompt_template="{solution}{prompt}")
    live, average = (
        plan(dataclasses.replace(own, data=data, self_decay=decay), "local").held_gib
        for decay in (0.0, 0.9)
    )
    assert live["teacher"] == average["teacher"] == 0
    more = average["optimizer"] - live["optimizer"]
    assert more == pytest.approx(live["trained parameters"], rel=1e-12)
