"""README and docs are part of the product: their code runs, their commands parse, their links lead
somewhere, and their tables are of what is there."""

from __future__ import annotations

import ast
import importlib
import math
import re
import runpy
import shlex
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors import safe_open

from kdjax import errors, models
from kdjax.__main__ import HELP, main
from kdjax.bench.head import HeadBench
from kdjax.bench.rollout import RolloutBench
from kdjax.bench.verifier import VerifierBench
from kdjax.config import Config
from kdjax.config.overrides import field_names
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.data.sources.check import DataCheck

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def python_of(page: str) -> list[str]:
    """The Python blocks of a page."""
    return [code for kind, code in FENCE.findall((ROOT / page).read_text()) if kind == "python"]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    table = (ROOT / page).read_text().split(f"\n{heading}", 1)[1].split("\n\n", 1)[0]
    lines = table.splitlines()[2:]  # the heading's rest, the rule
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# What a page shows runs


def test_the_readme_is_short():
    """At most 160 lines, and the two commands on its first screen."""
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 160
    shown = [line.split()[0] for line in lines[:20] if line.startswith("    ")]
    assert shown == ["./launch/quickstart.sh", "./launch/test.sh"]


def test_the_readmes_configs_are_valid():
    """The first is the shipped mix, word for word; the second is what its own.py holds."""
    mixed, own = python_of("README.md")
    shipped = (ROOT / "configs/student_mix.py").read_text()
    assert shipped.rpartition('"""')[2].strip() == mixed.strip()
    names: dict = {}
    exec(own, names)
    assert validate(names["get_config"]()).prefix == "student"


def test_the_loop_by_hand_runs():
    """The composed loss trains as printed (two steps of its twenty)."""
    (code,) = python_of("docs/methods.md")
    names: dict = {}
    exec(code.replace("range(20)", "range(2)"), names)
    assert int(names["state"].step) == 2
    assert float(names["metrics"]["loss"]) > 0


def test_the_loss_head_page_runs(capsys):
    """The three kinds of teacher of docs/loss_head.md give losses, top-k no more than the whole."""
    (code,) = python_of("docs/loss_head.md")
    exec(code, {})
    said = [line.rsplit(" ", 3) for line in capsys.readouterr().out.splitlines()]
    losses = {line[0]: float(line[1]) for line in said}
    assert losses["hidden states"] == losses["logits"] > losses["top 8"] > 0


def test_the_verifier_page_grades_as_it_says():
    """Each call of its first block gives the value behind it."""
    code, *_ = python_of("docs/verifier.md")
    names: dict = {}
    exec(code, names)
    calls = re.findall(r"^(grade\(.*)  # (.+)$", code, re.MULTILINE)
    assert len(calls) == 3
    for call, value in calls:
        assert eval(call, names) == eval(value, names)


@each_page
def test_python_compiles(page):
    """The blocks that need more than is here (an engine, workers) are Python at least."""
    for code in python_of(str(page.relative_to(ROOT))):
        ast.parse(code)


# Commands, fields and names


class Parsed(errors.KdjaxError):
    """Raised in place of the work: the command line was read to its end."""

    exit_code = 0


WORK = (
    "training.loop.train", "training.parts.build.build", "plan.plan.plan",
    "report.compare.read_result", "data.sources.check.check",
    "study.run_study", "study.run_piece", "study.side_by_side", "export.export",
    "export.export_adapter", "models.find", "bench.head.bench_head", "bench.rollout.bench_rollout",
    "bench.verifier.bench_verifier",
)  # fmt: skip
"""What the commands do once their arguments are read."""


@pytest.fixture
def parsing_alone(monkeypatch):
    """The command line, with nothing behind it."""

    def stop(*_, **__) -> NoReturn:
        raise Parsed("read")

    for name in WORK:
        monkeypatch.setattr(f"kdjax.{name}", stop)
    monkeypatch.setattr("kdjax.config.validation.check_installed", lambda _: None)
    monkeypatch.chdir(ROOT)


def commands(page: Path) -> list[str]:
    """The arguments of every `kdjax` line and span of a page; `kdjax plan` alone is but a name."""
    code = [*(text for kind, text in FENCE.findall(page.read_text()) if kind != "python")]
    code += re.findall(r"^ {4}(\S.*(?:\n {4}.*)*)", prose(page), re.MULTILINE)
    lines = [line.strip() for text in code for line in text.replace("\\\n", " ").splitlines()]
    called = [
        found[1]
        for line in [*lines, *spans(page)]
        if (found := re.match(r"(?:[A-Z_]+=\S+ |taskset -c \d+ |\S+/bin/)*kdjax (\w.*)", line))
        or (found := re.match(r"\S+/bin/kdjax (-.*)", line))
    ]
    return [words for words in called if words.split("#")[0].strip() not in NAMES]


NAMES = set(re.findall(r"kdjax ([\w-]+)", HELP)) | {"data check"}


@each_page
def test_commands_parse(page, parsing_alone, tmp_path, capsys):
    """Each is read by the real command line, overrides and their checks included. CONFIG is
    on-policy distillation, own.py is the README's block."""
    own = tmp_path / "own.py"
    own.write_text(python_of("README.md")[1])
    stands_for = {
        "CONFIG": "configs/student_reverse.py",
        "configs/methods/NAME.py": "configs/methods/gkd.py",
        "own.py": str(own),
    }
    for command in commands(page):
        words = [stands_for.get(word, word) for word in shlex.split(command, comments=True)]
        assert main(words) == 0, f"kdjax {command}: {capsys.readouterr().err}"


def test_commands_are_found():
    """The parser sees what a reader sees: more than sixty, ten of them in the README."""
    found = [len(commands(page)) for page in PAGES]
    assert found[0] >= 10
    assert sum(found) > 60


FIELDS = set(field_names(Config)) | {
    name
    for kind in (HeadBench, RolloutBench, VerifierBench, DataCheck)
    for name in field_names(kind)
}
GROUPS = {name.partition(".")[0] for name in field_names(Config) if "." in name}
FILES = ("py", "md", "json", "jsonl", "csv", "html")


@each_page
def test_fields_exist(page):
    """Options with a dot or an underscore, and names such as rollouts.rows, are fields."""
    named = [
        found[1] for span in spans(page) if (found := re.match(r"--(\w+[._]\w+(?:\.\w+)*)", span))
    ]
    for group in GROUPS:
        named += [
            f"{group}.{leaf}"
            for span in spans(page)
            for leaf in re.findall(rf"(?<![\w./]){group}\.(\w+)", span)
            if leaf not in FILES
        ]
    unknown = {name for name in named if name not in FIELDS}
    assert {name for name in unknown if not any(f.startswith(f"{name}.") for f in FIELDS)} == set()


@each_page
def test_names_of_the_package_exist(page):
    """`kdjax.step.gate.DECISIONS` and the like."""
    for name in {n for span in spans(page) for n in re.findall(r"\bkdjax((?:\.\w+)+)", span)}:
        *modules, last = name.strip(".").split(".")
        module = importlib.import_module(".".join(["kdjax", *modules]))
        if not hasattr(module, last):
            importlib.import_module(f"kdjax{name}")


# Links and files


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_page
def test_links_lead_somewhere(page):
    """Every relative link is of a file in the project and, with a #fragment, of its heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), link
        assert place.is_relative_to(ROOT), link
        assert not fragment or fragment in anchors(place), link


@each_page
def test_files_exist(page):
    """Every path of the project that a page names."""
    named = re.findall(
        r"(?<![\w/])(?:configs|docs|kdjax|launch|tests)/[\w/]+\.(?:py|sh|md|yaml)", page.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists() and "NAME" not in path] == []


def test_files_named_by_the_code_exist():
    """Docstrings and messages send readers to pages that are there."""
    sources = [p for folder in ("kdjax", "configs", "launch") for p in (ROOT / folder).rglob("*")]
    for path in (p for p in sources if p.suffix in (".py", ".sh", ".yaml", ".html")):
        for page in re.findall(r"docs/\w+\.md", path.read_text()):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} names {page}"


def test_every_page_is_in_the_index():
    """The README's last table has a line for each page of docs/."""
    listed = [
        re.search(r"\((docs/\w+\.md)\)", first)[1] for first, _ in rows("README.md", "| page")
    ]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))


# Tables are of what is there


def test_the_table_of_methods():
    """It has each of configs/methods once; a row's prefixes are those its configs train on, and
    the paper that a config names is the row's."""
    listed = []
    for _, paper, config, prefixes, *_ in rows("docs/methods.md", "| method | paper"):
        names = re.findall(r"`([\w/]+)`", config)
        found = set()
        for name in names:
            path = ROOT / f"configs/{name}.py"
            text, listed = runpy.run_path(str(path)), [*listed, path]
            papers = re.findall(r"arXiv\s+(\d{4}\.\d{5})", text["__doc__"])
            assert paper in papers or not papers, name
            found |= {method.prefix for method in timetable(text["get_config"]()).methods}
        assert not names or found == set(re.findall(r"teacher|student|dataset", prefixes)), names
    shipped = [path for path in listed if path.parent.name == "methods"]
    assert sorted(shipped) == sorted((ROOT / "configs/methods").glob("*.py"))


def test_the_tests_of_faults_exist():
    """Each test that docs/faults.md names is in its file."""
    text = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_the_table_of_exit_codes():
    """It has the codes of `kdjax --help`, and every error's."""
    codes = {int(code) for code, *_ in rows("docs/runs.md", "| code | meaning")}
    assert codes == {int(code) for code in re.findall(r"\d+", HELP.partition("Exit codes:")[2])}
    assert {error.exit_code for error in errors.KdjaxError.__subclasses__()} <= codes


def test_the_table_of_rooms():
    """docs/development.md says what each room and file of the package is for, and no other."""
    named = {where.strip("`/") for where, *_ in rows("docs/development.md", "| room or file")}
    entries = (p for p in (ROOT / "kdjax").iterdir() if p.is_dir() or p.suffix == ".py")
    there = {p.stem for p in entries if not p.name.startswith("__")}
    assert named == there


def test_the_shipped_models_have_the_size_they_are_said_to_have():
    """docs/embedded.md counts parameters."""
    (line,) = [row for row in rows("docs/embedded.md", "| | `kdjax:t") if row[0] == "parameters"]
    for name, said in zip(("teacher", "student"), line[1:], strict=True):
        with safe_open(models.find(f"kdjax:{name}") / "model.safetensors", "numpy") as file:
            names = list(file.keys())
            shapes = [file.get_slice(tensor).get_shape() for tensor in names]
        assert sum(map(math.prod, shapes)) == int(said.replace(",", "")), name


@pytest.mark.parametrize(
    ("study", "table"),
    [
        ("tiny", "| claim of arXiv"),
        ("stops", "| claim | verdict"),
        ("curriculum", "| asked"),
        ("rl_tiny", "| question"),
    ],
)
def test_the_studies_verdicts_are_those_of_their_reports(study, table):
    """docs/study.md repeats, in order, each study's verdicts, differences, p-values and what could
    have been seen."""
    said = rows("docs/study.md", table)
    made = rows(f"docs/study_{study}/results.md", "| claim | verdict")
    plain = [[verdict.strip("*"), *numbers] for _, verdict, *numbers in said]
    assert [
        [verdict, re.sub(r"(?<=[( ])\+", "", difference), p, least]
        for _, verdict, _, difference, p, least, *_ in made
    ] == plain
