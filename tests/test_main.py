"""The command line: every mistake is one line with the remedy and an exit code."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import CONFIG, fails
from jax.errors import JaxRuntimeError

import kdjax
from kdjax.__main__ import COMMANDS, HELP, NO_FIELDS, main
from kdjax.commands import measure
from kdjax.commands.evaluate import BENCHMARK_TOKENS
from kdjax.config import Config
from kdjax.errors import ConfigError


@pytest.fixture
def config_file(tmp_path, student_folder, teacher_folder) -> Path:
    path = tmp_path / "tiny.py"
    values = dict(run=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    path.write_text(
        CONFIG.format(student=str(student_folder), teacher=str(teacher_folder), **values)
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--stepz", "3"], "unknown field stepz; did you mean steps?"),
        (["--learning_rate", "3"], "did you mean optimizer.learning_rate?"),
        (["--lr", "3"], "did you mean optimizer.learning_rate?"),
        (["--optimizer.lr", "3"], "did you mean optimizer.learning_rate?"),
        (["--optimizer.learning-rat", "3"], "did you mean optimizer.learning_rate?"),
        (["--steps", "abc"], "--steps: invalid literal for int() with base 10: 'abc'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--prefix", "both"], "invalid choice 'both' for argument '--prefix'"),
        (["--token_loss", "kl"], "'kl' is not one of these"),
        (
            ["--token_loss", "mix(forward_kl, reverse_kl, weight=1.3)"],
            "weight must be in [0, 1], got 1.3",
        ),
        (["--teacher", "None"], "objective divergence needs a teacher"),
        (["--batch_size", "4"], "make it a multiple of 8"),
        (["--batch_size", "16"], "is over the 8 training problems"),
        (["--micro_batches", "3"], "not a multiple of micro_batches 3"),
        (["--curriculum.lengths", "16", "8"], "lengths must be positive and rise"),
        (["--data.task", "algebra"], "unknown task 'algebra'"),
        (["--wandb_project", "x"], "pip install wandb"),
        (["--seed", "-1"], "seed must be in 0.."),
    ],
)
def test_wrong_config_is_64(config_file, capsys, tmp_path, overrides, says):
    """Unknown fields name the nearest, wrong types and values name the field."""
    assert says in fails(capsys, 64, "train", config_file, *overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--data.max_prompt_tokens", "5"], "prompts over data.max_prompt_tokens 5"),
        (["--student", "nowhere"], "no model folder nowhere"),
        (["--data.problems", "0"], "has no problems"),
    ],
)
def test_bad_data_is_65(config_file, capsys, overrides, says):
    """A prompt over the limit, a missing model, an empty dataset."""
    assert says in fails(capsys, 65, "train", config_file, *overrides)


def test_bad_files(tmp_path, capsys):
    """A missing config names the nearest one; a broken or wrong one says what is wrong."""
    assert "did you mean student_mix?" in fails(capsys, 64, "train", "configs/student_mixx.py")
    path = tmp_path / "broken.py"
    path.write_text("import nothing_like_this")
    wrong = fails(capsys, 64, "train", path)
    assert f"kdjax: {path}:1: ModuleNotFoundError: No module named 'nothing_like_this'" in wrong
    path.write_text("x = (")
    assert f"kdjax: {path}: SyntaxError: '(' was never closed" in fails(capsys, 64, "train", path)
    path.write_text("x = 1")
    assert "has no get_config()" in fails(capsys, 64, "train", path)
    path.write_text("from kdjax import Config\ndef get_config(): return Config(stepz=1)")
    assert "unknown field stepz; did you mean steps?" in fails(capsys, 64, "train", path)
    path.write_text("from kdjax import Config\ndef get_config(): return Config(steps='many')")
    assert "steps must be int, got 'many'" in fails(capsys, 64, "train", path)
    path.write_text("def get_config():\n    steps = {}\n    return steps['many']")
    assert f"get_config ({path}:3): KeyError: 'many'" in fails(capsys, 64, "train", path)
    path.write_text("import kdjax\ndef get_config(): return kdjax.scale(kdjax.add, kdjax.at())")
    assert f"get_config ({path}:2): AttributeError" in fails(capsys, 64, "train", path)
    path.write_text("def get_config(): return 3")
    assert "must return a kdjax.Config, got 3" in fails(capsys, 64, "train", path)


def test_bad_studies(tmp_path, capsys):
    """The cell is named, what is no config or claim of it, the line that raised; a study is not
    trained as a config."""
    path = tmp_path / "study.py"
    head = "from kdjax import Config, Study\nfrom kdjax.claims import Claim\ndef get_study():\n    "
    for wrong, says in (
        ("return Study('s', {'a': Config(), 'b': Config(steps=0)})", "cell b: steps must be at le"),
        ("return Study('s', {'a': 3})", "study cells must be dict[str, Config], got {'a': 3}"),
        ("return Study('s', {'a': Config()}, seeds=3)", "study seeds must be tuple[int, ...]"),
        ("return Study('s', {'a': Config()}, claims=('a',))", "study claims must be"),
        (
            "return Study('s', {}, claims=(Claim('c', 'x', 'average', ('a',), ('b',)),))",
            "claim c: metric must be Literal['avg', 'pass', 'length', 'entropy', 'truncated']",
        ),
        ("return Study('s', {'a': Config()}[0])", f"get_study ({path}:4): KeyError: 0"),
    ):
        path.write_text(head + wrong)
        assert says in fails(capsys, 64, "study", path)
    said = fails(capsys, 64, "train", path)
    assert "has no get_config(); it must return a kdjax.Config (it has get_study(): kdjax" in said


OWN = """
import kdjax
from kdjax.config import RL

def own(*args):
    {body}

def get_config():
    return kdjax.Config(
        run={run!r}, student={student!r}, teacher={teacher!r}, {fields}, steps=2, batch_size=8,
        data=kdjax.config.Data(terms=(2,), problems=8, max_prompt_tokens=24),
        curriculum=kdjax.config.Curriculum(lengths=(8,)),
    )
"""


@pytest.mark.parametrize(
    ("fields", "body", "says"),
    [
        ("token_loss=own", "return args[0].sum()", "token_loss: own ({}:5) made [], not [3]"),
        (
            "token_loss=kdjax.mix(own, kdjax.forward_kl, weight=0.5)", "return args[0].fo(-1)",
            "token_loss: own ({}:6): AttributeError: ",
        ),
        (
            "token_loss=own", "return (0 * args[0] / 0).sum(-1)",
            "token_loss: own ({}:6): its value is nan for two ordinary distributions",
        ),
        ("objective=own", "return args[0].divergance", "objective: own ({}:6): AttributeError: "),
        ("objective=own", "return -args[0].advantage", "own ({}:6): TypeError: bad operand type"),
        ("reduction=own", "return 1 / args", "reduction: own ({}:6): TypeError: "),
        (
            "objective=kdjax.clipped_surrogate(0.2), rl=RL(4, own)", "return args[1].split()[0]",
            "rl.reward: own ({}:6): IndexError: list index out of range, of problem calc/train/",
        ),
        (
            "objective=kdjax.clipped_surrogate(0.2), rl=RL(4, advantage=own)", "raise OSError('x')",
            "rl.advantage: own ({}:6): OSError: x; advantages are finite",
        ),
    ],
    ids=["shape", "in a mix", "NaN", "objective", "None", "reduction", "reward", "advantage"],
)  # fmt: skip
def test_a_mistake_in_a_function_of_theirs_is_64(
    tmp_path, student_folder, teacher_folder, capsys, fields, body, says
):
    """One line with the function, its file and its line, before the run; no bug of ours."""
    path = tmp_path / "own.py"
    models = dict(student=str(student_folder), teacher=str(teacher_folder))
    path.write_text(OWN.format(run=str(tmp_path / "run"), fields=fields, body=body, **models))
    assert main(["train", str(path)]) == 64
    printed = capsys.readouterr()
    assert printed.err.startswith("kdjax: " + says.format(path))
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert not (tmp_path / "run").exists()


def test_a_bug_of_ours_is_70(config_file, capsys, monkeypatch):
    """With the traceback; an error of no code of theirs."""
    monkeypatch.setattr("kdjax.config.timetable.GOLDEN_RATIO", None)
    assert main(["train", str(config_file)]) == 70
    assert "this is a bug of kdjax" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_debug_nans"])
def test_settings_of_jax_that_must_be_off(config_file, capsys, name):
    """One line with the variable, where each ended in a traceback."""
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        assert f"{name.upper()} is set; unset it: " in fails(capsys, 64, "train", config_file)
    finally:
        jax.config.update(name, before)


def test_usage(capsys, tmp_path):
    """No command, unknown commands and missing arguments are told how to go on."""
    assert main([]) == 0
    assert "kdjax train CONFIG" in capsys.readouterr().out
    assert "unknown command 'trian'" in fails(capsys, 64, "trian")
    assert "usage: kdjax train CONFIG" in fails(capsys, 64, "train")
    assert "usage: kdjax export RUN OUT" in fails(capsys, 64, "export", "a")
    assert "is not a run" in fails(capsys, 65, "export", tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(capsys, command):
    """Its own lines of `kdjax --help`, wherever help is asked for before a target."""
    asked = [[command, "--help"], [command, "-h"]]
    asked += [[command, "A", "--help"]] if command in NO_FIELDS else []
    asked += [["data", "check", "--help"]] if command == "data" else []
    for args in asked:
        assert main(args) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"  kdjax {command} ")
        assert said in HELP
        assert said.count("  kdjax ") == 1


def test_help_is_quick():
    """`kdjax --help` and `import kdjax` load neither jax nor any other heavy package."""
    code = "import sys, kdjax.__main__ as m; m.main(['--help']); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {
        "jax",
        "transformers",
        "datasets",
        "matplotlib",
        "orbax",
        "flax",
        "torch",
        "tyro",
    }


def test_train_export_evaluate(config_file, tmp_path, capsys):
    """A run and the folder exported from it evaluate to the same numbers."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", str(config_file)]) == 0
    assert "report:" in capsys.readouterr().out
    assert main(["export", str(run), str(out), "--step", "2"]) == 0
    assert "keeps no best" in fails(capsys, 65, "evaluate", run, "--step", "best")
    assert "is no run" in fails(capsys, 64, "evaluate", out, "--step", "best")
    capsys.readouterr()
    assert "nothing was overwritten" in fails(capsys, 74, "export", run, out)
    assert main(["evaluate", str(run), "--out", str(tmp_path / "a.json")]) == 0
    small = ["--data.terms", "2", "--data.max_prompt_tokens", "24", "--evaluation.problems", "4"]
    small += [
        "--evaluation.samples",
        "2",
        "--evaluation.k",
        "1",
        "2",
        "--evaluation.max_new_tokens",
        "8",
    ]
    small += ["--evaluation.batch_size", "8"]
    small += ["--out", str(tmp_path / "b.json")]
    assert main(["evaluate", str(out), *small]) == 0
    import json

    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["length"] == b["length"]
    assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-6)
    assert a["forward_kl"] > 0
    assert b["forward_kl"] is None


def test_evaluate_a_benchmark_by_name(student_folder, tmp_path, capsys):
    """A benchmark of the hub, from a file of it; the report holds how prompts were put."""
    import json

    rows = [{"question": f"{n}+1=", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(3)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--data.max_prompt_tokens", "40", "--data.prompt_template", "Q: {prompt}"]
    small += ["--evaluation.samples", "2", "--evaluation.k", "1", "--evaluation.batch_size", "8"]
    small += ["--evaluation.max_new_tokens", "8", "--evaluation.name", f"openai/gsm8k={path}"]
    assert main(["evaluate", str(student_folder), *small, "--out", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["problems"] == 3
    assert "Q: {prompt}<|im_end|>" in report["template"]
    _check_evaluations_compare(student_folder, small, tmp_path, capsys)
    small[-1] = "openai/gsm8k"
    assert "can't be reached" in fails(capsys, 65, "evaluate", student_folder, *small)


def _check_evaluations_compare(student_folder, arguments, tmp_path, capsys):
    """Short forms mean the long ones; a folder holds the whole result; both compare with it."""
    import json

    short = [*arguments[:4], "--n=2", "--k", "1", *arguments[8:-2], "--benchmark", arguments[-1]]
    folder, file = tmp_path / "folder", tmp_path / "r.json"
    assert main(["evaluate", str(student_folder), *short, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "length 90 %" in printed
    assert "Pass@1" in printed
    made = {path.name for path in folder.iterdir()}
    assert made == {"evaluation.json", "samples.jsonl", "report.html", "report.md"}
    kept = json.loads((folder / "evaluation.json").read_text())
    alone = json.loads(file.read_text())
    for found in (kept["report"], alone):
        assert found.pop("seconds") > 0
    assert kept["report"] == alone
    assert kept["key"]["weights"] == alone["weights"] != ""
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 6
    out = tmp_path / "compared.json"
    assert main(["compare", str(folder), str(file), "--out", str(out)]) == 0
    assert "B - A (95 %)" in capsys.readouterr().out
    compared = json.loads(out.read_text())
    assert compared["Avg@2"]["difference"] == compared["length"]["difference"] == 0
    assert compared["length"]["low"] < 0 < compared["length"]["high"]  # other problems may differ
    assert "nothing was overwritten" in fails(capsys, 74, "compare", folder, file, "--out", out)
    assert "usage: kdjax compare A B" in fails(capsys, 64, "compare", folder)
    alone |= {"grader": "math", "seconds": 1.0}
    file.write_text(json.dumps(alone))
    assert "differ in grader (exact and math)" in fails(capsys, 64, "compare", folder, file)


def test_short_forms_of_evaluate(student_folder, tmp_path, capsys):
    """k over n is one line that names both; so is a benchmark without answers, and one whose
    columns are not there."""
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    wrong = fails(capsys, 64, "evaluate", student_folder, "--n", "4", "--k", "1,8")
    assert "evaluation.k must lie in 1..samples (4), got (1, 8); give other k (--k)" in wrong
    named = ["--benchmark", f"openai/gsm8k={path}"]
    missing = fails(capsys, 65, "evaluate", student_folder, *named)
    assert "question" in missing
    short = fails(capsys, 64, "evaluate", student_folder, "--benchmark", "gsm8k")
    assert "did you mean openai/gsm8k?" in short
    path.write_text('{"prompt": "1+1="}\n')
    columns = ["--evaluation.columns", "prompt=prompt", "answer=answer"]
    file = ["--evaluation.file", path]
    missing = fails(capsys, 65, "evaluate", student_folder, *file, *columns)
    assert "answer" in missing


def test_a_benchmark_has_room(student_folder, monkeypatch, capsys):
    """A model folder on a dataset by name has the limits of one, unless others are given."""
    built = []

    def build(config):
        built.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr("kdjax.training.parts.build.build", build)
    named = ["evaluate", student_folder, "--benchmark", "openai/gsm8k", "--n", "16", "--k", "1,16"]
    fails(capsys, 64, *named)
    fails(capsys, 64, *named, "--evaluation.max_new_tokens", "32")
    fails(capsys, 64, "evaluate", student_folder)
    limits = [(c.data.max_prompt_tokens, c.evaluation.max_new_tokens) for c in built]
    default = Config()
    assert limits[:2] == [BENCHMARK_TOKENS, (BENCHMARK_TOKENS[0], 32)]
    assert limits[2] == (default.data.max_prompt_tokens, default.evaluation.max_new_tokens)
    assert built[0].evaluation.name == "openai/gsm8k"
    assert (built[0].evaluation.samples, built[0].evaluation.k) == (16, (1, 16))


def test_a_model_is_named_either_way(capsys):
    """`kdjax evaluate TARGET` and `kdjax evaluate --model TARGET` are one command."""
    said = []
    for words in (["nowhere"], ["--model", "nowhere"]):
        assert main(["evaluate", *words, "--n", "2", "--k", "1"]) == 65
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "no model folder nowhere" in said[0]


def raises(error: BaseException):
    """A command of kdjax's own that raises."""
    found = {"error": error}
    exec(compile("def run(args): raise error", measure.__file__, "exec"), found)
    return found["run"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 71, "out of memory (MemoryError); make batch_size"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: no 8 bytes.\nLong dump"), 71, "no 8 bytes.); make"),
        (OSError(errno.EMFILE, "Too many open files", "a"), 71, "Too many open files; end what"),
        (RuntimeError("can't start new thread"), 71, "(ulimit -u)"),
        (ImportError("libx.so.1: cannot open shared object file"), 71, "libx.so.1: cannot open"),
        (OSError(errno.ENOSPC, "No space", "runs/a"), 74, "can't read or write runs/a: No space"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 74, "can't read or write what it needs: Quota"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 74, "x: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), 74, "f/x: Not a directory"),
    ],
)
def test_ordinary_faults_are_no_bugs(monkeypatch, capsys, error, code, says):
    """Wherever they are raised, one line and the documented code; also where a library has wrapped
    them."""
    wrapped = ValueError("a library's own")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        monkeypatch.setattr(measure, "bench", raises(raised))
        assert says in fails(capsys, code, "bench", "head")


@pytest.mark.parametrize("error", [ValueError("x"), ConnectionResetError(104, "reset"), OSError()])
def test_other_errors_are_bugs(monkeypatch, capsys, error):
    """They are told with their traceback."""
    monkeypatch.setattr(measure, "bench", raises(error))
    assert main(["bench", "head"]) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "this is a bug of kdjax" in said


def test_an_out_that_can_not_be_is_refused_first(tmp_path, capsys):
    """Before the hours of an evaluation, not after them."""
    file = tmp_path / "file"
    file.write_text("")
    said = fails(capsys, 74, "evaluate", "nowhere", "--out", file / "deep" / "r.json")
    assert f"r.json: {file} is no folder that takes files" in said


@pytest.mark.parametrize("place", ["", "    "], ids=["file", "get_config"])
def test_an_exit_in_a_config_is_an_error(tmp_path, capsys, place):
    """It is no end of the command: a script that looks at the exit code would take it for done."""
    path = tmp_path / "ends.py"
    path.write_text(f"import sys\ndef get_config():\n    pass\n{place}sys.exit(0)\n")
    assert f"{path}:4" in fails(capsys, 64, "train", path)


def test_a_model_that_is_too_large(config_file, capsys, monkeypatch):
    """What XLA says where memory ends, through the whole of a run."""
    monkeypatch.setattr(
        "kdjax.training.resume.fresh_state", lambda parts: jnp.zeros((1 << 44,)).sum()
    )
    said = fails(capsys, 71, "train", config_file)
    assert "kdjax plan CONFIG says what fits" in said


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("configs", r"quickstart +a study: The main job"),
        ("methods", r"methods/gkd +GKD: Jensen-Shannon"),
        ("losses", r"mix +weight \* first"),
        ("objectives", r"log_ratio +log p - log q"),
        ("reductions", r"sequence_mean +The paper's"),
        ("models", r"kdjax:teacher +331,728 parameters; comes along"),
        ("tasks", r"calc +a calculator chain"),
        ("datasets", r"openai/gsm8k +train 7,473 rows, test 1,319 rows"),
    ],
)
def test_what_comes_along_is_listed(kind, line, capsys):
    """A line a name, and what it is in a sentence."""
    assert main(["list", kind]) == 0
    assert re.search(f"(?m)^  {line}", capsys.readouterr().out)


def test_everything_is_listed_within_the_terminal(capsys, monkeypatch):
    """All kinds under their names; on a terminal a line is cut at its edge."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"configs:", "methods:", "losses:", "models:", "datasets:"} <= {*lines}
    assert max(map(len, lines)) == 80
    assert main(["list", "nothing"]) == 64
    assert "usage: kdjax list [configs|" in capsys.readouterr().err


def test_the_version(capsys):
    """As the package's metadata has it."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kdjax {kdjax.__version__}\n"
    assert kdjax.__version__ == importlib.metadata.version("kdjax")
