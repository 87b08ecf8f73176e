"""Plans and their phases, and the figures that are read off a compiled program."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from kdjax.errors import ConfigError
from kdjax.plan import hlo
from kdjax.sharding import device_bytes
from kdjax.training.parts.programs import Programs, TeacherPrograms

GIB = 2**30


class Phase(NamedTuple):
    """One program on one device: what it holds beyond the training state and the teacher, its
    FLOPs, the bytes it sends by kind, and seconds that it can't fall below (the larger of
    arithmetic and memory traffic, None for a chip without published figures)."""

    extra_gib: dict[str, float]
    flops: float
    sent_gib: dict[str, float]
    floor_seconds: float | None
    compile_seconds: float


class Plan(NamedTuple):
    """The plan of a config on a target, per device; held_gib is in memory in every phase."""

    target: str
    kind: str
    mesh: dict[str, int]
    memory_gib: float | None
    held_gib: dict[str, float]
    phases: dict[str, Phase]
    head_chunk: int
    attention: str
    advice: list[str]
    remarks: list[str]
    step_text: str

    def total_gib(self, phase: str) -> float:
        """GiB of a device's memory in a phase."""
        return sum(self.held_gib.values()) + sum(self.phases[phase].extra_gib.values())

    @property
    def fits(self) -> bool:
        """Whether every phase fits; True where the memory is not known."""
        return self.memory_gib is None or all(
            self.total_gib(phase) <= self.memory_gib for phase in self.phases
        )


def device_gib(tree: Any) -> float:
    """GiB of one device's shards of a tree of arrays or of shapes with shardings."""
    return device_bytes(tree) / GIB


def compiled_program(lowered: Any) -> Any:
    """A lowered program, compiled. Errors: ConfigError where the compiler refuses it."""
    try:
        return lowered.compile()
    except Exception as error:
        first = str(error).splitlines()[0][:300]
        raise ConfigError(f"the compiler refuses this program: {first}") from error


def sent_gib(text: str, unknown_trips: float) -> dict[str, float]:
    """GiB that a device sends in a program, by kind of collective (`hlo.collectives`)."""
    sent: dict[str, float] = defaultdict(float)
    for collective in hlo.collectives(text, max(1.0, unknown_trips)):
        sent[collective.kind] += collective.total_bytes / GIB
    return dict(sent)


def largest_teacher(programs: Programs) -> TeacherPrograms:
    """The teacher with the largest parameters on a device."""
    return max(programs.teachers.values(), key=lambda teacher: device_gib(teacher.params))
