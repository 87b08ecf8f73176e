"""What is kept between two records of a run: what its steps cost, and what of them is worth a
word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kdjax import health
from kdjax.accounting import PARTS, open_account, spent
from kdjax.base import DivergedError, KdjaxError, TrainState
from kdjax.config import Config
from kdjax.optimizer import guard_state
from kdjax.parts import Parts
from kdjax.progress import announce
from kdjax.step import Metrics


class Notes(NamedTuple):
    """What is kept of steps between two records. updated(step, metrics of each update);
    completed(step, record) -> (the record with the costs so far and what there is to say, which is
    said, and the error that ends the run after it, if there is one); unsaid() -> what there is to
    say of the steps since the last record, for a run that is stopped between two."""

    updated: Callable[[int, Sequence[Metrics]], None]
    completed: Callable[[int, dict[str, Any]], tuple[dict[str, Any], KdjaxError | None]]
    unsaid: Callable[[], list[str]]


def open_notes(
    parts: Parts, state: TrainState, records: list[dict[str, Any]], unsaid: Sequence[str] = ()
) -> Notes:
    """The notes of a run that has these records and this state, and was stopped with these lines
    unsaid."""
    cost, limit = open_account(parts), parts.config.faults.skipped_in_a_row
    total = spent(cost, records)
    logged = records[-1]["step"] if records else 0
    in_a_row = int(guard_state(state.opt_state).in_a_row)
    before, held = list(unsaid), list[health.Update]()

    def updated(step: int, updates: Sequence[Metrics]) -> None:
        held.extend(health.Update(step, u["loss"], u["gradient_norm"]) for u in updates)

    def completed(step: int, record: dict[str, Any]):
        nonlocal total, logged, in_a_row
        new = cost(logged, step, record)
        logged, total = step, {name: total[name] + new[name] for name in PARTS}
        record = record | total
        lines, rows = health.skipped(held, in_a_row)
        lines, in_a_row = before + lines, rows[-1]
        fault = _diverged(parts.config, lines) if max(rows) >= limit else None
        before.clear()
        held.clear()
        lines += health.warnings(records, {"step": step, **record})
        for line in lines:
            announce(f"{parts.config.run}: {line}")
        record |= {health.WARNINGS: lines} if lines else {}
        records.append({"step": step, **record})
        return record, fault

    def unsaid_now() -> list[str]:
        return before + health.skipped(held, in_a_row)[0]

    return Notes(updated, completed, unsaid_now)


def _diverged(config: Config, lines: Sequence[str]) -> DivergedError:
    return DivergedError(
        f"{config.run}: {config.faults.skipped_in_a_row} updates in a row were skipped"
        f" ({lines[-1]}); the state is saved, without them: lower optimizer.learning_rate or"
        " optimizer.clip_norm in another --run"
    )
