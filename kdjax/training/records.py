"""Records of a run, and what they give reason to say: skipped updates, and what often goes wrong,
with the setting to change. Metrics in, records and lines out."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kdjax.base import TrainState
from kdjax.config.schema import Config
from kdjax.config.timetable import Method
from kdjax.errors import DivergedError, KdjaxError, place_of
from kdjax.losses.composition import describe, theirs
from kdjax.report.results import WARNINGS
from kdjax.runtime import files, processes
from kdjax.runtime.console import announce
from kdjax.step.gate import last_decision, rollout_length
from kdjax.step.optimizer import SKIPPED, gate_state, guard_state
from kdjax.step.update import Metrics
from kdjax.storage.run_folder import STARTUP
from kdjax.training.cost import PARTS, open_account, spent
from kdjax.training.parts.build import Parts


def record_of(
    parts: Parts, state: TrainState, updates: Sequence[Metrics], entropy: float, seconds: float
) -> dict[str, Any]:
    """The finite metrics of a step as host numbers (this waits for the step).

    Args:
        parts, state: of the run, after the step.
        updates: the metrics of each of its updates.
        entropy: held-out, in nats, measured before the step; NaN where it was not.
        seconds: of the run so far.

    They are of its first update, before the student has moved; policy_drift, the mean distance of
    its log-probabilities from those of the student that drew, is of the last. gate_length is the
    limit of the next rollout; at a measurement gate_decision says what was decided
    (`gate.DECISIONS`). skipped counts the updates that were skipped so far.
    """
    gate = gate_state(state.opt_state)
    values = updates[0] | {n: updates[-1][n] for n in ("policy_drift",) if n in updates[-1]}
    record: dict[str, Any] = {n: float(value) for n, value in values.items() if n != SKIPPED}
    record = {name: value for name, value in record.items() if math.isfinite(value)}
    record |= {
        "gate_stage": int(gate.stage),
        "gate_length": rollout_length(gate, parts.config.curriculum.lengths),
    }
    record |= {"skipped": int(guard_state(state.opt_state).total), "seconds": seconds}
    if math.isfinite(entropy):
        record |= {"heldout_entropy": entropy, "gate_decision": last_decision(gate)}
        record["gate_threshold_nats"] = float(gate.threshold_nats)
    return record


def check_gap(config: Config, record: dict[str, float], step: int) -> None:
    """Stop where the sampler's distribution is not the one that is trained. Rollouts drawn ahead,
    or by an engine before it got newer weights, are of older ones, so their gap is no fault."""
    gap, limit = record.get("sampler_gap", 0.0), config.rollouts.gap_limit_nats
    if gap > limit and not config.rollouts.ahead and not record.get("staleness"):
        raise DivergedError(
            f"sampler and scorer differ by {gap:.3g} nats a token at step {step}, over"
            f" rollouts.gap_limit_nats {limit}; set rollouts.kv_cache compute or a wider dtype"
        )


FIRST_STEP = "first step: "


def write_startup(folder: Path, about: str, resumed: bool) -> None:
    """Write a run's report; a resumed run's keeps the line of its first step. Errors:
    StorageError."""
    path = folder / STARTUP
    if resumed and path.is_file():
        before = files.read_text(path).splitlines(keepends=True)
        about += "".join(line for line in before if line.startswith(FIRST_STEP))
    files.write_text(path, about)


def _add_first_step(folder: Path, metrics: Metrics) -> None:
    """Say, and add to the report, how many tokens of the first step's responses are the teacher's
    most probable one too; nothing without a teacher.

    Of the student's own responses it says what fresh ones are worth: live on-policy distillation
    beat frozen rollouts of the initial student only where it was high (arXiv 2610.11291). It waits
    for the step.
    """
    if "teacher_top1" not in metrics:
        return
    line = (
        f"{FIRST_STEP}{float(metrics['teacher_top1']):.1%} of the responses' tokens are the"
        " teacher's most probable one (first-step token overlap; of a student's own responses,"
        " fresh ones beat frozen ones only where it was high: configs/methods/semi_opd.py)"
    )
    announce(line)
    path = folder / STARTUP
    if processes.is_first() and path.is_file():  # a report that someone took away ends no run
        files.write_text(path, files.read_text(path) + line + "\n")


Record = Mapping[str, Any]

MOST_RECORDS = 20_000
"""Of a run that has more, a checkpoint keeps none: they are some 700 bytes each, in every one."""

COLLAPSED = 0.1  # of the first entropy
COLLAPSED_REWARD = 0.25  # of the first reward
FEW = 4  # records whose mean smooths the noise of rewards
SPIKE, LEAST_RECORDS, RECENT = 10.0, 10, 50  # times the median of the recent records, of so many


class Update(NamedTuple):
    """An update's step (from 1), what the guard's decision rests on, the decision (how many updates
    were skipped since one was made, with this one; 0 where it was made), and its response
    tokens."""

    step: int
    loss: Any
    gradient_norm: Any
    skipped_in_a_row: Any
    tokens: Any = 0


def skipped_lines(updates: Sequence[Update]) -> list[str]:
    """A line for each update that the guard skipped, with why. Reads arrays of a device.

    >>> skipped_lines([Update(7, 0.5, 1.0, 0), Update(8, float("nan"), 1.0, 1)])
    ['step 8: loss is nan, its update was skipped']
    """
    skipped = [update for update in updates if int(update.skipped_in_a_row)]
    return [f"step {one.step}: {_why(one)}, its update was skipped" for one in skipped]


def _why(update: Update) -> str:
    numbers = {"loss": float(update.loss), "gradient_norm": float(update.gradient_norm)}
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    # the guard's own norm may overflow where the metric, another program's sum, just does not
    return " and ".join(f"{name} is {value}" for name, value in (bad or numbers).items())


def warnings(earlier: Sequence[Record], new: Record) -> list[str]:
    """What a new record (with its `step`) gives reason to warn of, each thing once a run: as the
    lines that were said are in the earlier records, a resumed run does not say them again."""
    said = [line for record in earlier for line in record.get(WARNINGS, ())]
    found = ((name, check(earlier, new)) for name, check in CHECKS.items())
    return [
        f"step {new['step']}: {name}: {text}"
        for name, text in found
        if text is not None and not any(f": {name}: " in line for line in said)
    ]


def _collapse(earlier: Sequence[Record], new: Record) -> str | None:
    first = next((r["student_entropy"] for r in earlier if "student_entropy" in r), None)
    now = new.get("student_entropy")
    if first is None or now is None or now >= COLLAPSED * first:
        return None
    return (
        f"the student's {now:.3g} nats a token are under {COLLAPSED:.0%} of its first {first:.3g};"
        " more forward KL (token_loss), a shorter curriculum.lengths or a lower"
        " optimizer.learning_rate keeps more"
    )


def _truncation(earlier: Sequence[Record], new: Record) -> str | None:
    if new.get("truncated", 0.0) < 1.0:
        return None
    return (
        "no response of the batch ended before its limit of tokens, so no end is learned from it;"
        " raise curriculum.lengths"
    )


def _reward_collapse(earlier: Sequence[Record], new: Record) -> str | None:
    rewarded = [r for r in (*earlier, new) if "reward" in r]
    if "reward" not in new or len(rewarded) <= FEW:
        return None
    first, now = rewarded[0]["reward"], statistics.mean(r["reward"] for r in rewarded[-FEW:])
    if first <= 0 or now >= COLLAPSED_REWARD * first:
        return None
    signal = statistics.mean(r.get("reward_signal", 1.0) for r in rewarded[-FEW:])
    return (
        f"{now:.3g}, the mean of the last {FEW} records, is under {COLLAPSED_REWARD:.0%} of the"
        f" first {first:.3g}, and {signal:.0%} of the groups still have signal; start again with a"
        " lower optimizer.learning_rate or a higher batch_size (more problems a step)"
    )


def _no_signal(earlier: Sequence[Record], new: Record) -> str | None:
    last = [r for r in (*earlier, new) if "reward_signal" in r][-FEW:]
    if len(last) < FEW or "reward_signal" not in new or any(r["reward_signal"] for r in last):
        return None
    return (
        f"in the last {FEW} records the rewards of every group were equal, so no advantage is left"
        " to learn from; take a start that solves a part of the problems, other problems, or a"
        " higher rl.group_size"
    )


def _spike(earlier: Sequence[Record], new: Record) -> str | None:
    norms = [r["gradient_norm"] for r in earlier[-RECENT:] if "gradient_norm" in r]
    now = new.get("gradient_norm")
    if now is None or len(norms) < LEAST_RECORDS or now <= SPIKE * statistics.median(norms):
        return None
    return (
        f"{now:.3g} is over {SPIKE:.0f} times the median {statistics.median(norms):.3g} of the last"
        f" {len(norms)} records; lower optimizer.clip_norm or optimizer.learning_rate if it stays"
    )


CHECKS: dict[str, Callable[[Sequence[Record], Record], str | None]] = {
    "entropy collapse": _collapse,
    "all responses truncated": _truncation,
    "reward collapse": _reward_collapse,
    "groups without signal": _no_signal,
    "gradient-norm spike": _spike,
}
"""What is warned of, by the name that its line has: (earlier records, new record) -> why, or
None."""


class Notes(NamedTuple):
    """What is kept of steps between two records. updated(step, metrics of each update);
    completed(step, record) -> (the record with the costs so far and what there is to say, which is
    said, and the error that ends the run after it, if there is one); kept() -> what a checkpoint
    keeps of them: the records so far (None where they are over MOST_RECORDS) and, for a run that is
    stopped between two, what there is to say of the steps since the last; and the totals that
    `_shares` is of."""

    updated: Callable[[int, Sequence[Metrics]], None]
    completed: Callable[[int, dict[str, Any]], tuple[dict[str, Any], KdjaxError | None]]
    kept: Callable[[], dict[str, Any]]


def open_notes(
    parts: Parts,
    state: TrainState,
    records: list[dict[str, Any]],
    unsaid: Sequence[str] = (),
    by_tag: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Notes:
    """The notes of a run that has these records and this state, and was stopped with these lines
    unsaid and these totals by tag."""
    cost, limit = open_account(parts), parts.config.faults.skipped_in_a_row
    total = spent(cost, records)
    logged = records[-1]["step"] if records else 0
    before, held = list(unsaid), list[Update]()
    totals = {tag: [*by_tag.get(tag, (0.0, 0.0, 0.0))] for tag in parts.teachers}

    def updated(step: int, updates: Sequence[Metrics]) -> None:
        if step == 1:
            _add_first_step(Path(parts.config.run), updates[0])
        held.extend(
            Update(step, u["loss"], u["gradient_norm"], u[SKIPPED], u["response_tokens"])
            for u in updates
        )

    def completed(step: int, record: dict[str, Any]):
        nonlocal total, logged
        new = cost(logged, step, record)
        logged, total = step, {name: total[name] + new[name] for name in PARTS}
        record = record | total
        lines = before + skipped_lines(held)
        most = max(int(update.skipped_in_a_row) for update in held)
        said = [line for r in records for line in r.get(WARNINGS, ())] + lines
        fault = None
        if most >= limit:
            never = said if record["skipped"] == most else []  # no update was ever made
            fault = _diverged(parts.config, parts.table.at(0), lines[-1], never)
        if len(totals) > 1:
            totals.update(_counted(parts, totals, held))
            record |= _shares(totals)
        before.clear()
        held.clear()
        lines += warnings(records, {"step": step, **record})
        for line in lines:
            announce(f"{parts.config.run}: {line}")
        record |= {WARNINGS: lines} if lines else {}
        records.append({"step": step, **record})
        return record, fault

    def kept() -> dict[str, Any]:
        few = records if len(records) <= MOST_RECORDS else None
        return {
            "unsaid": before + skipped_lines(held),
            "records": few,
            "by_tag": _counted(parts, totals, held) if len(totals) > 1 else {},
        }

    return Notes(updated, completed, kept)


def _counted(
    parts: Parts, totals: Mapping[str, Sequence[float]], held: Sequence[Update]
) -> dict[str, list[float]]:
    """The (updates, response tokens, sum of losses) of each tag, with those of these updates.
    Reads arrays of a device."""
    found = {tag: [*numbers] for tag, numbers in totals.items()}
    for one in held:
        tag, loss = parts.problems.batch_at(one.step - 1)[0], float(one.loss)
        new = (1.0, float(one.tokens), loss if math.isfinite(loss) else 0.0)
        found[tag] = [a + b for a, b in zip(found[tag], new, strict=True)]
    return found


def _shares(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The share of each tag in the updates, the response tokens and the loss of a run so far.

    >>> _shares({"a": (3, 10, 0.5), "b": (1, 30, 0.5)})["tokens_of/b"]
    0.75
    """
    sums = [sum(numbers) or 1.0 for numbers in zip(*totals.values(), strict=True)]
    return {
        f"{name}_of/{tag}": number / whole
        for tag, numbers in totals.items()
        for name, number, whole in zip(("updates", "tokens", "loss"), numbers, sums, strict=True)
    }


def _diverged(
    config: Config, method: Method, last: str, never: Sequence[str] = ()
) -> DivergedError:
    """The error after too many skipped updates.

    Args:
        config, method: of the run and of its first step.
        last: the line of the last of them.
        never: where no update was ever made, all lines that were said: if step 1 was skipped, the
            learning rate is not to blame.
    """
    skipped = f"{config.faults.skipped_in_a_row} updates in a row were skipped"
    first = next((line for line in never if re.match("step 1: .* update was skipped", line)), None)
    if first is None:
        return DivergedError(
            f"{config.run}: {skipped} ({last}); the state is saved, without them: lower"
            " optimizer.learning_rate or optimizer.clip_norm in another --run"
        )
    losses = ("token_loss", method.token_loss), ("objective", method.objective)
    own = ", ".join(
        f"{field} {describe(function)}" + "".join(f", {place_of(one)}" for one in theirs(function))
        for field, function in losses
    )
    return DivergedError(
        f"{config.run}: {first}; no update was made before it, so this is the loss's own value"
        f" ({own}), or the weights or data are to blame, not the learning rate; {skipped} ({last})"
    )
