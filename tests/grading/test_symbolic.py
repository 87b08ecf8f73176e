r"""Symbolic grading: workers hang, crash and fill their memory, and nothing of it is felt here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import pytest
from golden_answers import SYMBOLIC, flat
from tiny import HAS_MATH_VERIFY, NO_MATH_VERIFY

from kdjax.base import Problem
from kdjax.config import RL, Config, Evaluation
from kdjax.config.validation import validate
from kdjax.errors import ConfigError
from kdjax.grading import rewards, symbolic
from kdjax.grading.answers import Outcome
from kdjax.grading.pool import Reply, Workers
from kdjax.grading.rewards import math, open_rewarder
from kdjax.grading.symbolic import Lenient, Strict, is_decided, open_lenient, open_symbolic, unfit
from kdjax.training.evaluation import GRADERS

with_math_verify = pytest.mark.skipif(not HAS_MATH_VERIFY, reason=NO_MATH_VERIFY)
STUB = Path(__file__).parents[1] / "support" / "stub_worker.py"
GOLD = r"2\sqrt{3}"


def command(memory_mib: int = 512, deadline_seconds: float = 30.0) -> list[str]:
    return [sys.executable, "-P", str(STUB), str(deadline_seconds), str(memory_mib)]


def asked(*answers: str) -> list[dict[str, str]]:
    return [{"answer": answer, "gold": "g"} for answer in answers]


@pytest.fixture
def stub():
    workers = Workers(command(), 1, 30.0)
    yield workers
    workers.close()


@pytest.fixture
def hasty():
    workers = Workers(command(), 1, 0.5)
    yield workers
    workers.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- the pool -------------------------------------------------------------------------------------


def test_replies_are_in_order():
    """Three workers, forty requests: each reply belongs to its request, whoever finished first."""
    workers = Workers(command(), 3, 30.0)
    replies = workers.map(asked("nap", *("gno"[n % 3] for n in range(40))))
    assert [reply.value for reply in replies] == ["slept", *(n % 3 == 0 for n in range(40))]
    pids = {reply.value for reply in workers.map(asked(*["pid"] * 40))}
    assert 1 <= len(pids) <= 3
    assert workers.map([]) == []
    workers.close()
    assert not any(map(is_running, pids))
    with pytest.raises(ValueError, match="closed"):
        workers.map(asked("g"))


@pytest.mark.parametrize("order", ["hang", "sleep"])
def test_a_hang_is_killed_and_the_next_answer_is_fine(hasty, order):
    """A loop and a sleep miss the deadline; a fresh worker answers what comes after."""
    first, second, third = hasty.map(asked("pid", order, "pid"))
    assert second == Reply(None, "deadline")
    assert third.value != first.value
    assert not is_running(first.value)


def test_a_crash_is_one_failure(stub):
    """A worker that dies takes no other answer with it."""
    assert stub.map(asked("g", "exit", "g")) == [Reply(True), Reply(None, "crash"), Reply(True)]


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_something_else_ends(stub, busy):
    """What it was asked is asked of another, idle or busy as it was."""
    pid = stub.map(asked("pid"))[0].value
    if busy:
        timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        timer.start()
        assert stub.map(asked("nap")) == [Reply("slept")]
        timer.join()
    else:
        os.kill(pid, signal.SIGKILL)
        assert stub.map(asked("g", "x")) == [Reply(True), Reply(False)]


def test_memory_has_a_limit(stub):
    """A memory bomb fails in its worker, which is replaced."""
    first, bomb, after = stub.map(asked("pid", "memory", "pid"))
    assert bomb == Reply(None, "memory")
    assert after.value != first.value


def test_an_exception_is_named_and_the_worker_stays(stub):
    """What a judge raises is its reply; what it prints is no reply."""
    first, raised, printed, after = stub.map(asked("pid", "raise", "print", "pid"))
    assert raised == Reply(None, "OverflowError")
    assert printed == Reply(False)
    assert after.value == first.value


def test_a_worker_is_replaced_in_time(stub, monkeypatch):
    """After its share of answers a worker ends, so that caches can't grow for ever."""
    monkeypatch.setattr("kdjax.grading.pool.ANSWERS_A_WORKER", 2)
    pids = [reply.value for reply in stub.map(asked(*["pid"] * 4))]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_worker_that_never_starts_is_an_error():
    """Too little memory to start: an error that says how to see why, not an endless loop."""
    workers = Workers([sys.executable, "-c", "raise SystemExit(1)"], 2, 1.0)
    with pytest.raises(ConfigError, match="before it was ready; give it more memory"):
        workers.map(asked("g"))


def test_an_interrupt_leaves_no_busy_worker(stub):
    """Ctrl-C while a worker hangs ends the worker, and the pool is of use afterwards."""
    pid = stub.map(asked("pid"))[0].value
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        stub.map(asked("hang"))
    timer.join()
    assert not is_running(pid)
    assert stub.map(asked("g")) == [Reply(True)]


SCRIPT = """
import os, signal, sys
from kdjax.grading.pool import Workers
workers = Workers({command!r}, 1, 30.0)
print(workers.map([{{"answer": "pid", "gold": "g"}}])[0].value, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then",
    [
        "", "raise ValueError", "workers.map([{'answer': 'hang', 'gold': 'g'}])",
        "os.kill(os.getpid(), 9)",
    ],
    ids=["exit", "exception", "interrupt", "kill"],
)  # fmt: skip
def test_nothing_is_left_running(then):
    """Neither at the interpreter's end nor after Ctrl-C; even a killed parent's worker ends."""
    script = SCRIPT.format(command=command(), then=then)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    worker = int(parent.stdout.readline())
    if "hang" in then:
        time.sleep(0.3)
        parent.send_signal(signal.SIGINT)
    parent.wait(timeout=60)
    parent.stdout.close()
    until = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(worker)


def test_an_orphan_that_hangs_ends_itself():
    """After twice its deadline a worker is ended by its own timer, if nobody else did."""
    worker = subprocess.Popen(
        command(deadline_seconds=0.3), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.stdout.readline()
    worker.stdin.write(b'{"answer": "hang", "gold": "g"}\n')
    worker.stdin.flush()
    assert worker.wait(timeout=30) == -signal.SIGALRM
    worker.stdin.close()
    worker.stdout.close()


# --- graders over a stub --------------------------------------------------------------------------


def boxed(*answers: str) -> list[tuple[str, str]]:
    return [(rf"\boxed{{{answer}}}", GOLD) for answer in answers]


def test_only_what_the_exact_verifier_cannot_decide_is_asked(monkeypatch, stub):
    """Right, missing and numerical answers, and those that a filter stops, never meet a worker."""
    asked_of: list = []
    monkeypatch.setattr(stub, "map", lambda requests: asked_of.extend(requests) or [])
    pairs = [*boxed(r"2 \sqrt3", "9^{9^9}", r"\int_0^1 x"), ("no box", GOLD), (r"\boxed{41}", "42")]
    outcomes = [graded.outcome.value for graded in Strict(stub)(pairs)]
    assert outcomes == ["correct", "not_scored", "wrong", "no_answer", "wrong"]
    assert asked_of == []


def test_failures_are_not_scored_with_their_reason(hasty):
    """Each outcome in its place; equal samples are asked once; a failure is never "wrong"."""
    graded = Strict(hasty)([*boxed("exit", "x", "hang", "raise", "raise"), ("so", GOLD)])
    said = [(g.outcome.value, g.answer, g.reason) for g in graded]
    assert said == [
        ("not_scored", "exit", "crash"),
        ("wrong", "x", ""),
        ("not_scored", "hang", "deadline"),
        ("not_scored", "raise", "OverflowError"),
        ("not_scored", "raise", "OverflowError"),
        ("no_answer", None, ""),
    ]


def test_lenient_asks_for_everything(stub):
    """The whole response is given, numbers too."""
    assert [g.outcome for g in Lenient(stub)([("42", "42"), ("43", "42")])] == [
        Outcome.CORRECT,
        Outcome.WRONG,
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 512, ""), ("x" * 513, "length"), ("9" * 64, ""), ("9" * 65, "digits"),
        ("(" * 16, ""), ("(" * 17, "nesting"), (r"\frac{1}{" * 17, "nesting"), ("{}" * 100, ""),
        ("9**9**9", "power tower"), ("9^{9^9}", "power tower"), ("2^{2x 3^5}", "power tower"),
        ("9^(9)^9", "power tower"), ("2^{10}+3^{5}", ""), ("x^2y^2", ""), ("e^{x^2}", ""),
        ("2^{n}", ""), ("9^{10}^9", "power tower"),
    ],
)  # fmt: skip
def test_filters(text, reason):
    """512 characters, 64 digits in a row, 16 levels, and no power of a power of numbers."""
    assert unfit(text) == reason


@pytest.mark.parametrize(
    ("answer", "gold", "decided"),
    [
        (r"6\cdot7", "42", True), ("x", "42", True), ("x", "(C)", True),
        ("x", r"\text{Evelyn}", True),
        (r"\sqrt{12}", GOLD, False), ("q-p", "p-q", False), (r"\sum_k k", GOLD, True),
        (r"\sum_k k", r"\sum_k 2k", False), ("5!", "x", True), (r"\int_0^1 x", r"\sum_k k", True),
        ("xy", "yx", False), (r"(1,\pi)", r"(1,2\pi)", False), (r"\infty", "x", False),
        (r"(3, 2\cdot2)", "(3, 4)", True), (r"\{2\cdot2\}", "[0,1)\\cup(2,3]", True),
    ],
)  # fmt: skip
def test_when_the_exact_verdict_is_final(answer, gold, decided):
    """Literal golds ask for literals, and answers leave to evaluate only what their golds do."""
    assert is_decided(answer, gold) == decided


def test_without_the_extra_the_error_names_it(monkeypatch):
    """One line with the command that installs it."""
    monkeypatch.setattr(symbolic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "kdjax\[math\]"'):
        open_symbolic()
    with pytest.raises(ConfigError, match=r"evaluation\.grader math needs math-verify"):
        validate(Config(evaluation=Evaluation(grader="math")))
    with pytest.raises(ConfigError, match=r"rl\.reward math needs math-verify"):
        validate(Config(rl=RL(2, math)))


def test_workers_of_a_reward_live_until_it_is_closed(monkeypatch, stub):
    """One process for all batches; what it can't judge is 0 and said to be so."""
    monkeypatch.setattr(rewards, "open_symbolic", lambda workers: Strict(stub))
    rewarder, problems = open_rewarder(math), [Problem("p", "", GOLD)] * 5
    said = [r"\boxed{pid}", r"\boxed{x}", r"\boxed{raise}", r"\boxed{2 \sqrt3}", "no box"]
    made = [rewarder.of_all(problems, said) for _ in range(2)]
    for value_b, not_scored_b in made:
        assert value_b.tolist() == [1, 0, 0, 1, 0]
        assert not_scored_b.tolist() == [False, False, True, False, False]
    (worker,) = stub._workers
    assert worker.answers == 6
    rewarder.close()
    assert not is_running(worker.process.pid)


@with_math_verify
def test_the_reward_alone():
    """A plain function like any other: equal by algebra, not by text."""
    assert math("", r"so \boxed{\sqrt{12}}", GOLD) == 1.0


def test_limits_are_positive(monkeypatch):
    """A pool of nothing, or without time, is refused by name."""
    monkeypatch.setattr(symbolic, "check_installed", lambda what: None)
    with pytest.raises(ConfigError, match=r"must be positive, got 0, 3\.0 and 1024"):
        open_symbolic(workers=0)


def test_every_grader_of_the_config_opens_a_verifier():
    """The names that evaluation.grader takes are those that the root knows."""
    assert typing.get_args(typing.get_type_hints(Evaluation)["grader"]) == tuple(GRADERS)
    for name, outcome in {"exact": "no_answer", "exact_flexible": "correct"}.items():
        with GRADERS[name]() as grader:
            assert [graded.outcome for graded in grader([("7", "7")])] == [outcome]


# --- math-verify ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict():
    with open_symbolic(deadline_seconds=60.0) as grader:
        yield grader


@with_math_verify
def test_golden_symbolic(strict):
    """Equal formulas are equal, others are not, and none is beyond the verifier."""
    for expected, pairs in SYMBOLIC.items():
        graded = strict([(rf"so \boxed{{{answer}}}", gold) for answer, gold in pairs])
        wrong = [p for p, g in zip(pairs, graded, strict=True) if g.outcome != expected and p[0]]
        assert wrong == []


@with_math_verify
def test_symbolic_is_exact_and_more():
    """On the golden table's right answers and hostile ones the symbolic grader says the same."""
    from golden_answers import CORRECT, WRONG

    rows = flat(CORRECT) + flat({k: WRONG[k] for k in ("code", "too much to compute")})
    with open_symbolic(deadline_seconds=20.0) as grader:
        graded = grader([(rf"\boxed{{{answer}}}", gold) for _, answer, gold in rows])
    right = [row[1:] for row, g in zip(rows, graded, strict=True) if g.outcome is Outcome.CORRECT]
    assert right == [row[1:] for row in flat(CORRECT)]


@with_math_verify
def test_hostile_formulas_end_at_the_deadline(strict):
    """A formula that math-verify would work on for minutes costs a second and is not scored."""
    with open_symbolic(deadline_seconds=1.0) as grader:
        (hang, fine) = grader([(r"\boxed{(x+y+z+w)^{200}}", "2x"), (r"\boxed{x+x}", "2x")])
    assert (hang.outcome, hang.reason) == (Outcome.NOT_SCORED, "deadline")
    assert fine.reason in ("", "deadline")  # a fresh worker on a busy machine


@with_math_verify
def test_no_model_text_is_executed(strict, tmp_path):
    """Payloads that would touch a file touch none, boxed or plain, as answer or as gold."""
    target = tmp_path / "touched"
    calls = f"open('{target}','w')", f"__import__('pathlib').Path('{target}').touch()"
    pairs = [(rf"\boxed{{{c}}}", GOLD) for c in calls] + [(r"\boxed{x}", c) for c in calls]
    strict(pairs)
    with open_lenient(deadline_seconds=20.0) as lenient:
        lenient([*pairs, *((call, "x") for call in calls)])
    assert not target.exists()


@with_math_verify
def test_lenient_is_math_verify_by_default():
    """What published numbers count as right: unboxed, truncated, unevaluated, before </think>."""
    table = [
        (r"\boxed{42}", "42", True),
        ("6*7 = 42. Wait, maybe I should", "42", True),
        (r"<think>\boxed{42}</think> so answer 41", "42", True),
        (r"\boxed{6\cdot 7}", "42", True),
        (r"\boxed{41=42}", "42", True),
        (r"\boxed{41}", "42", False),
        (r"\boxed{41, 42}", "42", False),
        ("", "42", False),
    ]
    with open_lenient(deadline_seconds=60.0) as grader:
        graded = grader([row[:2] for row in table])
    assert [g.outcome is Outcome.CORRECT for g in graded] == [row[2] for row in table]
    assert all(g.reason == "" for g in graded)


@with_math_verify
def test_timers_of_this_process_are_left_alone(strict):
    """math-verify cancels a process's timer; here it runs elsewhere."""
    signal.setitimer(signal.ITIMER_REAL, 600)
    strict([(r"\boxed{\sqrt{27}}", r"3\sqrt{3}")])
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 0
