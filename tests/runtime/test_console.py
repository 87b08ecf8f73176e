"""Progress says where a run stands: plain lines without a terminal, a bar on one."""

from __future__ import annotations

import io
import re
import sys

import pytest

from kdjax.runtime import console

METRICS = {
    "loss": 0.5, "forward_kl": 0.25, "reverse_kl": 0.125, "student_entropy": 0.75,
    "response_length": 30.0, "response_tokens": 100.0,
}  # fmt: skip
SAID = ("tokens/s", "loss 0.5", "KL(t|s) 0.25", "KL(s|t) 0.125", "entropy 0.75", "length 30")


def test_what_a_terminal_can_not_print_is_escaped(monkeypatch):
    """Words and tables of a run do not end it where the locale has no such letter."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    console.announce("KL(s\u2016t) of a terminal")
    console.print_lines(["\u00e4"], [["\u4e2d"]])
    sys.stdout.flush()
    assert b"KL(s\\u2016t)" in printed.getvalue()
    assert b"\\u4e2d" in printed.getvalue()


def test_lines_without_a_terminal(capsys):
    """The first and the last step are said, with time left and every number."""
    with console.training_progress("run", 10, first=4) as show:
        show(5, METRICS)
        show(6, METRICS)  # within five seconds of the first line
        show(10, METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["run: step 5/10", "run: step 10/10"]
    assert all(said in line for line in lines for said in SAID)
    assert "0 s left" in lines[1]


def test_a_rewarded_run_says_what_it_earns(capsys):
    """Reward, and the share of groups with signal; of other runs' lines they are no part."""
    with console.training_progress("run", 10) as show:
        show(10, METRICS | {"reward": 0.42, "reward_signal": 0.625})
    assert "reward 0.42, groups with signal 0.625, loss 0.5" in capsys.readouterr().out
    with console.training_progress("run", 10) as show:
        show(10, METRICS)
    assert "reward" not in capsys.readouterr().out


def test_bar_on_a_terminal(capsys, monkeypatch):
    """The bar shows steps done and the newest numbers."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with console.training_progress("run", 10) as show:
        show(3, METRICS)
        show(10, None)
    out = capsys.readouterr().out
    assert "10/10" in out
    assert all(said in out for said in SAID)


def test_a_narrow_terminal_shows_the_step(capsys, monkeypatch):
    """Of a line that is too long the steps and the time left stay, and the numbers are cut."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with console.training_progress("student_reverse/seed_0", 1200) as show:
        show(300, METRICS)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    line = plain.replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(r" *300/1200 +(--:--|[\d:]+) student_reverse/seed_0 [\d,]+ tokens/s, ", line)
    assert len(line) <= 80
    assert line.rstrip().endswith("…")


def test_responses_are_counted(capsys, monkeypatch):
    """Over chunks, of which one was finished by an earlier call: its tokens are in the sum, and not
    in those a second."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    with console.response_progress("evaluation", 30) as tally:
        tally.finished(10, 100)
        tally.drawn(0, 40)
        tally.drawn(4, 80)
        tally.scored(4)
        tally.finished(20, 200)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" left, ")[0].split(",")[0] for line in lines] == [
        f"evaluation: response {done}/30" for done in (10, 10, 14, 14, 30)
    ]
    assert [re.search(r"\d+ scored, \d+ tokens", line)[0] for line in lines] == [
        "10 scored, 100 tokens", "10 scored, 140 tokens", "10 scored, 180 tokens",
        "14 scored, 180 tokens", "30 scored, 300 tokens",
    ]  # fmt: skip
    rates = [float(re.search(r"([\d.]+) tokens/s", line)[1]) for line in lines]
    assert rates[0] == 0
    assert all(rate > 0 for rate in rates[1:])


def test_what_is_over_soon_is_not_said(capsys):
    """An evaluation of a moment has no lines."""
    with console.response_progress("evaluation", 2) as tally:
        tally.drawn(2, 8)
        tally.scored(2)
        tally.finished(2, 8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_in_names_are_text(capsys, monkeypatch, terminal):
    """Runs that differ in a bracket differ on the screen, and one that looks like the end of a
    style is no error: in tables, in the bar and in plain lines."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    names = ["lr3[seed0]", "lr3[seed1]", "[/x]", "[bold]a:smile:"]
    console.print_lines(["run", "[red]"], [[name, "1"] for name in names])
    with console.training_progress("lr3[seed2]", 2) as show:
        show(2, METRICS)
    out = capsys.readouterr().out
    assert all(name in out for name in [*names, "[red]", "lr3[seed2]"])


def test_announcements_are_letter_by_letter(capsys):
    """Control tokens in square brackets, as in Mistral's template, are text and not markup."""
    console.announce("[INST] [/INST] [bold] :smile:")
    assert capsys.readouterr().out == "[INST] [/INST] [bold] :smile:\n"
