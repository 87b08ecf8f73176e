"""A study trains its cells once, compares them on the same problems, and leaves a page."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from runs import interrupt_at

from kdjax import (
    add,
    clip,
    forward_kl,
    linear,
    mix,
    models,
    reverse_kl,
    scale,
    total_variation,
)
from kdjax import study as study_module
from kdjax.__main__ import main
from kdjax.config import Config, Study
from kdjax.config.as_json import as_dict
from kdjax.config.claims import Claim
from kdjax.config.overrides import load_file
from kdjax.errors import ConfigError, DivergedError, StorageError
from kdjax.export import load_run
from kdjax.report.results import Cell
from kdjax.runtime.jobs import Failure
from kdjax.storage import run_folder
from kdjax.storage.run_folder import git_commit


@pytest.fixture
def study(tiny) -> Study:
    """Two cells, two seeds, two steps each, tested after every step, and a claim."""
    evaluation = dataclasses.replace(tiny.evaluation, every_steps=1)
    base = dataclasses.replace(tiny, steps=2, save_every_steps=1, evaluation=evaluation)
    losses = {"forward": forward_kl, "reverse": reverse_kl}
    return Study(
        str(Path(tiny.run).parent / "study"),
        {name: dataclasses.replace(base, token_loss=loss) for name, loss in losses.items()},
        seeds=(0, 3),
        claims=(
            Claim("longer", "reverse is longer", "length", ("reverse",), ("forward",)),
            Claim("flops", "reverse is cheaper", "avg", ("reverse",), ("forward",), 0.0, "flops"),
            Claim("grown", "reverse is longer than at first", "length", ("reverse",), ("start",)),
        ),
    )


RUNS = ["forward/seed_0", "reverse/seed_0", "forward/seed_3", "reverse/seed_3"]


def test_study_trains_once_and_reports(study, monkeypatch):
    """Each cell and seed in its folder, references once; what was interrupted is resumed; a run
    that fails doesn't stop the others, whose results are kept; the next call makes the rest, one
    more nothing; a changed cell is refused."""
    folder, trained = Path(study.folder), []
    train, evaluate = study_module.train, study_module.evaluate_params

    def fails_at(*names):
        def run(config):
            name = "/".join(Path(config.run).parts[-2:])
            trained.append(name)
            if name in names:
                raise DivergedError("loss is nan")
            return train(config)

        return run

    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            study_module.run_study(study)
    begun = run_folder.read_metrics(folder / RUNS[0])
    assert [record["step"] for record in begun] == [1]
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "train", fails_at(RUNS[1]))
        with pytest.raises(
            study_module.CellError, match=r"^reverse/seed_0: loss is nan; "
        ) as caught:
            study_module.run_study(study)
        assert caught.value.exit_code == 86
        assert trained == RUNS
        assert not (folder / "report.html").exists()
        assert run_folder.read_metrics(folder / RUNS[0])[:1] == begun  # seconds too: resumed
        trained.clear()
        patched.setattr(study_module, "train", fails_at())
        cells, verdicts = study_module.run_study(study)
        assert trained == [RUNS[1]]
        versions = folder / RUNS[3] / "versions.json"
        versions.write_text(json.dumps(json.loads(versions.read_text()) | {"git_commit": "other"}))
        trained.clear()
        patched.setattr(study_module, "evaluate_params", lambda *_: pytest.fail("evaluated again"))
        again = study_module.run_study(study)
        assert trained == []
    assert [[run.report for run in c.runs] for c in again[0]] == [
        [run.report for run in c.runs] for c in cells
    ]
    assert again[1] == verdicts
    _check_written(folder, cells, verdicts)
    assert evaluate is study_module.evaluate_params
    study.cells["forward"] = dataclasses.replace(study.cells["forward"], batch_size=16)
    with pytest.raises(study_module.CellError, match="batch_size: 8 -> 16") as caught:
        study_module.run_study(study)
    assert "(forward/seed_3 failed too)" in str(caught.value)


def _check_written(folder: Path, cells: list[Cell], verdicts) -> None:
    assert [cell.name for cell in cells] == ["start", "teacher", "forward", "reverse"]
    assert [len(cell.runs) for cell in cells] == [1, 1, 2, 2]
    assert [cell.weight for cell in cells] == [None] * 4  # two pure KLs are no sweep
    assert [run.report.seed for run in cells[2].runs] == [0, 3]
    assert cells[1].runs[0].report.forward_kl == 0.0
    assert cells[2].runs[0].samples != cells[2].runs[1].samples
    assert "test_avg" in cells[2].runs[0].metrics[0]
    assert [verdict.claim.name for verdict in verdicts] == ["longer", "flops", "grown"]
    lengths = [np.mean([run.report.length.mean for run in cell.runs]) for cell in cells]
    assert verdicts[2].estimate == pytest.approx(lengths[3] - lengths[0])
    for name in RUNS:
        assert (folder / name / "metrics.jsonl").exists()
    assert "forward" in (folder / "report.html").read_text()
    results = (folder / "results.md").read_text()
    assert "reverse is longer" in results
    assert f"| git_commit | {git_commit()}, other |" in results
    assert "token_loss" not in results
    lines = json.loads((folder / "table.json").read_text())
    with (folder / "table.csv").open() as file:
        assert [x["cell"] for x in csv.DictReader(file)] == [x["cell"] for x in lines]
    assert [x["seed"] for x in lines if x["cell"] == "forward"] == ["0", "3", "all"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(cells={}), "no cells"),
        (dict(cells={"logs": Config()}), "can't be named ['logs']"),
        (dict(cells={"a/b": Config()}), "can't be named ['a/b']"),
        (dict(cells={"a": Config(seed=5)}), "study cell a has seed 5"),
        (dict(seeds=()), "seeds must be some, each once, got ()"),
        (dict(seeds=(1, 1)), "seeds must be some, each once, got (1, 1)"),
        (dict(claims=(Claim("c", "", "avg", ("a",), ("x",)),)), "no cell x; did you mean a?"),
        (
            dict(claims=(Claim("c", "", "avg", ("a",), ("start",), 0.0, "flops"),)),
            "no cell start; did you mean a?",
        ),
        (dict(claims=(Claim("c", "", "avg", ("a",), ()),)), "needs cells on both sides"),
        (
            dict(claims=(Claim("c", "", "length", ("a",), ("a",), 0.0, "flops"),)),
            "only avg is read at equal FLOPs, got length",
        ),
        (
            dict(claims=(Claim("c", "", "avg", ("a",), ("a",), 0.0, "flops"),)),
            "cell a is not tested during training; set its evaluation.every_steps",
        ),
    ],
)
def test_what_a_study_can_t_be(changes, says):
    """One line that names the cell or the claim, before anything runs."""
    with pytest.raises(ConfigError) as caught:
        study_module.pieces(dataclasses.replace(Study("runs/x", {"a": Config()}), **changes))
    assert says in str(caught.value)


def test_a_folder_that_is_no_studys_is_left_alone(study, tmp_path):
    """Its results.md would be written over; what a killed study left of its own files goes."""
    notes, left = tmp_path / "notes", Path(study.folder) / "results.md.0a1b2c3d.partial"
    for folder in (notes, left.parent / "logs"):
        folder.mkdir(parents=True)
    (notes / "results.md").write_text("mine")
    with pytest.raises(StorageError, match=r"holds \['results.md'\] but no study"):
        study_module.run_study(dataclasses.replace(study, folder=str(notes)))
    with pytest.raises(ConfigError, match="the study's folder must be a folder's name"):
        study_module.run_study(dataclasses.replace(study, folder=""))
    assert [path.name for path in notes.iterdir()] == ["results.md"]
    left.touch()
    failing = Failure(70, "not run")
    with pytest.raises(study_module.CellError, match="not run"):
        study_module.run_study(study, lambda wave: {wave[0].name: failing})
    assert [path.name for path in left.parent.iterdir()] == ["logs"]


ROOT = Path(__file__).parent.parent
STUDIES = {
    path.name: load_file(str(path), "get_study")  # validates every cell
    for path in sorted((ROOT / "configs").glob("study_*.py"))
}
SCALES = [f"study_{name}.py" for name in ("tiny", "gpu", "paper", "mixing")]


def test_rl_begins_as_each_distilled_student():
    """Four starts, four RL cells and four controls after them, and a claim of each."""
    study = STUDIES["study_rl_tiny.py"]
    runs = {piece.name: piece for piece in study_module.pieces(study) if not piece.is_reference}
    assert len(study.starts) == 8
    for after, before in study.starts.items():
        if after.startswith("more_"):
            assert study.cells[after].objective is study.cells[before].objective
            continue
        assert runs[f"{after}/seed_2"].config.student.endswith(f"{before}/seed_2/student")
        assert (runs[f"{after}/seed_2"].depth, runs[f"{before}/seed_2"].depth) == (1, 0)
        for less in (before, f"more_{before}"):
            assert any(claim.more == (after,) and claim.less == (less,) for claim in study.claims)
    assert study.cells.keys() == {*study.starts, *study.starts.values()}


@pytest.mark.parametrize("name", SCALES)
def test_the_shipped_studies(name):
    """No config twice, the 2x2 and the whole sweep of mixes, claims of cells that are there, and
    the tests during training that they need."""
    study = STUDIES[name]
    assert study.folder == f"runs/{name.removesuffix('.py')}"
    runs = [piece for piece in study_module.pieces(study) if not piece.is_reference]
    assert len(runs) == len(study.cells) * len(study.seeds)
    written = [json.dumps(as_dict(config)) for config in study.cells.values()]
    assert len(set(written)) == len(written)
    weights = sorted(study_module.sweep(study).values())  # fixed_short is none of them
    assert weights == [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    if name == "study_mixing.py":
        assert [c.name for c in study.claims] == ["mix_avg", "mix_entropy"]
        return
    assert len(study.cells) == 12
    assert len(study.claims) == 12
    lengths = {n: study.cells[n].curriculum.lengths for n in ("fixed_short", "gated", "ungated")}
    longest = study.cells["student_reverse"].curriculum.lengths
    assert lengths["gated"][:1] == lengths["fixed_short"]
    assert lengths["gated"][-1:] == longest
    assert lengths["ungated"] == lengths["gated"]


def test_the_weight_of_a_mix_is_its_own_however_it_is_written():
    """Of forward KL, read from what composes it: nested, turned round, as a sum; none of what is no
    mix of the two, or goes with training."""
    half = mix(forward_kl, reverse_kl, weight=0.5)
    losses = {
        "plain": (mix(forward_kl, reverse_kl, weight=0.8), 0.8),
        "small": (mix(forward_kl, reverse_kl, weight=1e-7), 1e-7),
        "numpy": (mix(forward_kl, reverse_kl, weight=np.float32(0.5)), 0.5),
        "turned": (mix(reverse_kl, forward_kl, weight=0.2), 0.8),
        "by_keyword": (mix(weight=0.3, second=reverse_kl, first=forward_kl), 0.3),
        "nested": (mix(half, reverse_kl, weight=0.5), 0.25),
        "sum": (add(scale(forward_kl, 0.75), scale(reverse_kl, 0.25)), 0.75),
        "forward": (forward_kl, 1.0),
        "reverse": (reverse_kl, 0.0),
        "double": (scale(half, 2.0), None),
        "negative": (add(scale(forward_kl, 2.0), scale(reverse_kl, -1.0)), None),
        "another": (mix(forward_kl, total_variation, weight=0.5), None),
        "clipped": (mix(clip(forward_kl, 1.0), reverse_kl, weight=0.5), None),
        "moving": (mix(forward_kl, reverse_kl, weight=linear(1.0, 0.0)), None),
    }
    base = Config(prefix="student")
    cells = {n: dataclasses.replace(base, token_loss=loss) for n, (loss, _) in losses.items()}
    expected = {name: weight for name, (_, weight) in losses.items() if weight is not None}
    assert study_module.sweep(Study("runs/s", cells)) == pytest.approx(expected)


def test_scales_of_one_study():
    """The three scales have the same cells and claims; each its own models, seeds and sizes."""
    tiny, gpu, paper = (STUDIES[f"study_{n}.py"] for n in ("tiny", "gpu", "paper"))
    assert list(tiny.cells) == list(gpu.cells) == list(paper.cells)
    assert tiny.claims == gpu.claims == paper.claims
    assert [len(study.seeds) for study in (tiny, gpu, paper)] == [3, 5, 3]
    assert {config.student for config in paper.cells.values()} == {"Qwen/Qwen3-0.6B-Base"}


STUDY = """
import dataclasses
from kdjax import Config, Study, forward_kl, reverse_kl
from kdjax.config import Curriculum, Data, Evaluation

def get_study():
    base = Config(
        student={student!r}, teacher={teacher!r}, cache={cache!r}, steps=2, batch_size=8,
        prefix="teacher", data=Data(terms=(2,), problems=8, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)), save_every_steps=1,
        evaluation=Evaluation(problems=4, samples=2, k=(1, 2), max_new_tokens=8, batch_size=8),
    )
    losses = forward_kl, reverse_kl
    cells = {{loss.__name__: dataclasses.replace(base, token_loss=loss) for loss in losses}}
    return Study({folder!r}, cells)
"""


@pytest.mark.release
def test_two_jobs_on_the_command_line(tmp_path, student_folder, teacher_folder, capsys):
    """Real processes: a run that can't begin is named with its error and exit code, the other ends
    and is kept; the same command then makes the rest, and --only a run alone."""
    file, folder = tmp_path / "two.py", tmp_path / "study"
    values = dict(student=str(student_folder), teacher=str(teacher_folder))
    file.write_text(STUDY.format(cache=str(tmp_path / "cache"), folder=str(folder), **values))
    foreign = folder / "reverse_kl" / "seed_0" / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("not a run")
    assert main(["study", str(file), "--jobs", "2"]) == 74
    printed = capsys.readouterr()
    assert printed.err.startswith("kdjax: reverse_kl/seed_0: ")
    assert "holds ['notes.txt'] but no run" in printed.err
    kept = (folder / "forward_kl" / "seed_0" / "evaluation.json").read_bytes()
    foreign.unlink()
    assert main(["study", str(file), "--jobs", "2"]) == 0
    assert "report: " in capsys.readouterr().out
    assert (folder / "forward_kl" / "seed_0" / "evaluation.json").read_bytes() == kept
    assert "--jobs 2" in (folder / "results.md").read_text()
    assert "step 2/2" in (folder / "logs" / "reverse_kl seed_0.txt").read_text()
    assert main(["study", str(file), "--only", "forward_kl/seed_1"]) == 64
    assert "did you mean forward_kl/seed_0?" in capsys.readouterr().err
    assert main(["study", str(file), "--only", "reverse_kl"]) == 64
    assert "did you mean reverse_kl/seed_0?" in capsys.readouterr().err
    assert main(["study", str(file), "--jobs", "two"]) == 64


def test_a_cell_begins_as_another(study, monkeypatch):
    """After the other's run, from its exported student, seed by seed; what is finished is reused,
    and a student that was deleted is exported again."""
    cells = study.cells | {"second": study.cells["reverse"], "third": study.cells["forward"]}
    starts = {"third": "second", "second": "forward"}
    chain = dataclasses.replace(study, cells=cells, seeds=(0,), claims=(), starts=starts)
    reported = study_module.run_study(chain)[0]
    folder, trained = Path(study.folder), []
    for name, parent in starts.items():
        config = json.loads((folder / name / "seed_0/config.json").read_text())
        assert config["student"] == str(folder / parent / "seed_0/student")
        begun = models.load(folder / parent / "seed_0/student")[1]
        chex.assert_trees_all_equal(begun, load_run(folder / parent / "seed_0")[1])
    assert not (folder / "third/seed_0/student").exists()
    _check_costs(folder, {cell.name: cell.runs[0].report for cell in reported}, starts)
    monkeypatch.setattr(study_module, "train", lambda config: trained.append(config.run))
    shutil.rmtree(folder / "forward/seed_0/student")
    study_module.run_study(chain)
    assert trained == [str(folder / "forward/seed_0")]
    assert (folder / "forward/seed_0/student").exists()


def _check_costs(folder: Path, reports, starts) -> None:
    """A cell costs what its run did and what it began as, whose cost holds its own start's."""
    for name, report in reports.items():
        if report.training_flops is not None:
            saved = json.loads((folder / name / "seed_0/evaluation.json").read_text())["report"]
            own, parent = saved["training_flops"], starts.get(name)
            before = reports[parent].training_flops if parent else 0.0
            assert report.training_flops == pytest.approx(own + before)
            assert report.training_flops == pytest.approx(sum(report.flops_by_part.values()))


@pytest.mark.parametrize(
    "starts", [{"forward": "nobody"}, {"forward": "reverse", "reverse": "forward"}]
)
def test_starts_that_cannot_be(study, starts):
    """A cell that is none, or a ring, is named."""
    with pytest.raises(ConfigError, match=r"study starts: .* is no cell, or begins as itself"):
        study_module.pieces(dataclasses.replace(study, starts=starts))
