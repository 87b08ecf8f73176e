"""The table of a plan, its JSON, and advice where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdjax.config.schema import Config
from kdjax.config.timetable import Timetable
from kdjax.plan.phase import Plan


def to_json(made: Plan) -> dict[str, Any]:
    """A plan as JSON values, without the program's text."""
    fields = made._asdict()
    del fields["step_text"]
    fields["phases"] = {name: phase._asdict() for name, phase in made.phases.items()}
    fields["total_gib"] = {name: made.total_gib(name) for name in made.phases}
    return fields


def show(made: Plan) -> None:
    """Print a plan: one column a phase, GiB of one device."""
    from rich.console import Console
    from rich.table import Table

    shape = " x ".join(f"{name} {size}" for name, size in made.mesh.items())
    memory = "not known" if made.memory_gib is None else f"{made.memory_gib:.2f} GiB"
    table = Table(title=f"{made.target}: {made.kind}, {shape}; memory of a device {memory}")
    table.add_column("a device")
    for name in made.phases:
        table.add_column(name, justify="right")
    for name, gib in made.held_gib.items():
        if gib == 0:
            continue
        table.add_row(f"{name} GiB", *(f"{gib:.2f}" for _ in made.phases))
    extras = dict.fromkeys(n for phase in made.phases.values() for n in phase.extra_gib)
    for name in extras:
        values = [phase.extra_gib.get(name) for phase in made.phases.values()]
        table.add_row(f"{name} GiB", *("" if v is None else f"{v:.2f}" for v in values))
    totals = [made.total_gib(name) for name in made.phases]
    over = [made.memory_gib is not None and total > made.memory_gib for total in totals]
    table.add_row(
        "total GiB",
        *(f"{t:.2f}{' DOES NOT FIT' if o else ''}" for t, o in zip(totals, over, strict=True)),
        end_section=True,
    )
    phases = made.phases.values()
    table.add_row("TFLOP", *(f"{phase.flops / 1e12:.1f}" for phase in phases))
    for kind in dict.fromkeys(k for phase in phases for k in phase.sent_gib):
        table.add_row(f"{kind} GiB", *(f"{p.sent_gib.get(kind, 0.0):.2f}" for p in phases))
    floors = [phase.floor_seconds for phase in phases]
    table.add_row("floor, s", *("" if f is None else f"{f:.2f}" for f in floors))
    table.add_row("compiled in, s", *(f"{phase.compile_seconds:.0f}" for phase in phases))
    console = Console(markup=False, emoji=False)
    console.width = max(console.width, 100)
    console.print(table)
    print(
        "Rows at their full length. Floor: arithmetic at the published bfloat16 rate (rollout: or"
        " weights and KV cache read at the published bandwidth); a real step takes longer."
    )
    print(f"attention {made.attention}; {made.head_chunk} tokens a chunk of the loss head")
    for line in made.remarks:
        print(line)
    for line in made.advice:
        print(f"to make it fit: {line}")


def advice(config: Config, made: Plan) -> Iterator[str]:
    """Changes to the config, most useful first, where a phase does not fit."""
    if made.fits:
        return
    devices = made.mesh["data"] * made.mesh["fsdp"] * made.mesh["tensor"]
    held, memory = sum(made.held_gib.values()), made.memory_gib or 0.0
    over = [p.extra_gib for name, p in made.phases.items() if made.total_gib(name) > memory]
    trained = [extra for extra in over if "activations" in extra]
    drawn = [extra for extra in over if "KV cache" in extra]
    if held > 0.5 * memory and made.mesh["fsdp"] < devices:
        yield f"--layout.fsdp {devices}: shard the {held:.1f} GiB of states over all devices"
    if trained:
        extra = max(trained, key=lambda extra: extra["activations"])
        if config.remat != "full":
            yield f"--remat full: {extra['activations']:.1f} GiB are kept for the backward pass"
        if config.batch_size // config.micro_batches > devices // made.mesh["tensor"]:
            yield f"--micro_batches {config.micro_batches * 2}: half the rows at a time"
        if extra["temporaries"] > 2:
            yield "--head_memory_mib: a smaller chunk of the loss head"
    if drawn:
        cache = max(extra["KV cache"] for extra in drawn)
        yield f"--layout.tensor 2: shard heads and the KV cache ({cache:.1f} GiB) over more devices"
        yield f"--rollouts.cache_gib {cache / 2:.1f}: fewer rows decoded at a time"
    if held > 0.8 * memory and made.mesh["fsdp"] == devices:
        yield "more devices, or smaller models: the states alone fill them"


def remarks(config: Config, table: Timetable) -> Iterator[str]:
    """Remarks on a step that its phases don't show."""
    rewarded = any(method.rewarded for method in table.methods)
    if rewarded and config.rl.epochs > 1:
        yield f"rl.epochs {config.rl.epochs}: a rewarded step makes so many updates, a phase each"
    if rewarded and config.rl.redraws:
        yield (
            f"rl.redraws {config.rl.redraws}: groups that are drawn anew are left out; they take up"
            " to as many rollouts more"
        )
    if len(config.teachers) > 1:
        yield f"of {len(config.teachers)} teachers all are held, and the largest's steps planned"
