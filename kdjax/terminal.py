"""Tables on a terminal; of several processes the first prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kdjax import processes
from kdjax.results import Row
from kdjax.tables import table

WIDEST_TABLE = 150  # columns


def print_table(rows: Sequence[Row]) -> None:
    """Results side by side, with what their errors are."""
    print_lines(*table(rows))
    if processes.is_first():
        print("± one standard error over problems; entropy and KL in nats a token of own responses")


def print_lines(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Lines of text in columns; the first is set left, the others right."""
    printed = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(header):
        printed.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        printed.add_row(*line)
    console = Console(quiet=not processes.is_first())
    console.width = max(console.width, WIDEST_TABLE)  # a narrow terminal wraps, nothing is cut
    console.print(printed)
