"""What a study is asked: a claim compares a metric of two sets of cells. Data only, no JAX."""

from __future__ import annotations

from typing import Literal, NamedTuple

Metric = Literal["avg", "pass", "length", "entropy", "truncated"]
Reading = Literal["steps", "flops"]


class Claim(NamedTuple):
    """`metric` is larger in the mean over the cells `more` than in the mean over the cells `less`.

    margin: by how much `more` may fall short and the claim still hold (in the metric's unit; 0 asks
    for a plain difference). reading: at equal steps, the finished students on all test problems; or
    at equal FLOPs, Avg during training at the largest budget that both sides reached.
    """

    name: str
    statement: str
    metric: Metric
    more: tuple[str, ...]
    less: tuple[str, ...]
    margin: float = 0.0
    reading: Reading = "steps"
