"""Collectives of a compiled program: what devices send each other, read from its HLO text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


class Collective(NamedTuple):
    """A collective instruction: result shape, bytes of one execution on one device (the result of
    a gather, the operand of a scatter), devices in a group, and how often a program runs it."""

    kind: str
    shape: tuple[int, ...]
    payload_bytes: int
    group: int
    times: float

    @property
    def total_bytes(self) -> float:
        return self.payload_bytes * self.times


def collectives(text: str, unknown_trips: float = 1.0) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), loops counted.

    A loop whose trip count the compiler does not know counts as `unknown_trips` iterations. Groups
    of one device send nothing and are left out. Within fusions a channel counts once: TPU programs
    spread one collective over several of them.
    """
    computations, entry = _computations(text)
    found: list[Collective] = []
    channels: set[tuple[str, ...]] = set()

    def visit(name: str, factor: float, fused: bool = False) -> None:
        for line in computations.get(name, []):
            parsed = _INSTRUCTION.match(line)
            if parsed is None:
                continue
            op = parsed["op"].removesuffix("-start")
            channel = _CHANNEL.search(line) if op in KINDS and fused else None
            known = channel and (op, channel[1], parsed["type"].split("{")[0])
            if op in KINDS and not (known and known in channels):
                channels.update([known] if known else [])
                found.extend(_collective(op, parsed["type"], line, factor))
            trips = 1.0
            if op == "while":
                trips = _trip_count(line, computations, unknown_trips)
            for called in _CALLED.findall(line):
                visit(called, factor * trips, fused or op == "fusion")
            for branches in _BRANCHES.findall(line):
                for called in branches.split(","):
                    visit(called.strip().removeprefix("%"), factor)

    visit(entry, 1.0)
    return found


def widest_rows(text: str, columns: int) -> int:
    """The most rows of any array whose last axis has this many columns, 0 if there is none.

    >>> widest_rows("%a = f32[4,8,100]{2,1,0} add(...)", 100)
    32
    """
    most = 0
    for _, dims in _SHAPE.findall(text):
        shape = [int(d) for d in dims.split(",") if d]
        if len(shape) > 1 and shape[-1] == columns:
            most = max(most, math.prod(shape[:-1]))
    return most


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened and " = " not in line.split("(", 1)[0]:
            current = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # "}}," goes on with attributes
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _trip_count(line: str, computations: dict[str, list[str]], unknown: float) -> float:
    """The trip count of a while: the compiler's, or the constant that its condition compares to."""
    known = _TRIPS.search(line)
    if known:
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = "\n".join(computations.get(condition[1], [])) if condition else ""
    constants = re.findall(r"s32\[\][^=]*constant\((\d+)\)", body)
    return float(constants[0]) if len(constants) == 1 else unknown


def _collective(kind: str, result: str, line: str, times: float) -> list[Collective]:
    group = _group(line)
    if group == 1:
        return []
    shapes = [
        (tuple(int(d) for d in dims.split(",") if d), _width(dtype))
        for dtype, dims in _SHAPE.findall(result)
    ]
    if f"{kind}-start(" in line:  # (operands, results, scalars of the runtime): the results only
        arrays = [shape for shape in shapes if shape[0]]
        shapes = arrays[len(arrays) // 2 :]
    factor = group if kind == "reduce-scatter" else 1
    return [
        Collective(kind, shape, int(math.prod(shape) * width * factor), group, times)
        for shape, width in shapes
    ]


def _width(dtype: str) -> float:
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1


def _group(line: str) -> int:
    """The devices in a group of a collective; 2 where its notation is not known here."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if counted:
        return int(counted[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2
