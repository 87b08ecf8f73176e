"""Claims, what a study is asked: each compares a metric of two sets of cells. Data, no JAX."""

from __future__ import annotations

from typing import Literal, NamedTuple

Metric = Literal["avg", "pass", "length", "entropy", "truncated"]
Reading = Literal["steps", "flops"]


class Claim(NamedTuple):
    """`metric` is larger in the mean over the cells `more` than in the mean over the cells `less`;
    at equal steps "start", what the study's first cell begins as, may stand among them.

    margin: by how much `more` may fall short and the claim still hold, in the metric's unit (shares
    in 0..1, tokens, nats); 0 asks for a plain difference. reading: at equal steps, the finished
    students on all test problems; or at equal FLOPs, Avg at the largest budget that both reached.
    """

    name: str
    statement: str
    metric: Metric
    more: tuple[str, ...]
    less: tuple[str, ...]
    margin: float = 0.0
    reading: Reading = "steps"


def paper_claims(
    *,
    teacher_forward: str,
    teacher_reverse: str,
    student_forward: str,
    student_reverse: str,
    forward_heavy: str,
    short: str,
    long: str,
    curriculum: str,
    margin: float = 0.03,
) -> tuple[Claim, ...]:
    """The claims of arXiv 2605.16826, of cells with these names: the 2x2, a forward-heavy mix on
    student prefixes, and reverse KL at a short, a long and a gated training length.

    margin: what the mix may lose of reverse KL's Avg@k and still be said to keep it, as a share.
    """
    forward, reverse = (teacher_forward, student_forward), (teacher_reverse, student_reverse)
    student, teacher = (student_forward, student_reverse), (teacher_forward, teacher_reverse)
    mix, fixed = (forward_heavy,), (long,)
    return (
        Claim("kl_avg", "Reverse KL has the higher Avg@k", "avg", reverse, forward),
        Claim("kl_entropy", "Forward KL keeps more entropy", "entropy", forward, reverse),
        Claim("kl_pass", "Forward KL has the higher Pass@k", "pass", forward, reverse),
        Claim(
            "prefix_steps", "At equal steps student prefixes have the higher Avg@k",
            "avg", student, teacher,
        ),
        Claim(
            "prefix_flops", "At equal FLOPs teacher prefixes have the higher Avg@k",
            "avg", teacher, student, reading="flops",
        ),
        Claim("length_avg", "Training on long responses raises Avg@k", "avg", fixed, (short,)),
        Claim(
            "length_entropy", "Reverse KL on long responses lowers entropy",
            "entropy", (short,), fixed,
        ),
        Claim(
            "length_growth", "Reverse KL on long responses makes them longer",
            "length", fixed, (short,),
        ),
        Claim(
            "mix_avg", "A forward-heavy mix keeps reverse KL's Avg@k, within"
            f" {100 * margin:g} points", "avg", mix, (student_reverse,), margin,
        ),
        Claim(
            "mix_entropy", "A forward-heavy mix keeps more entropy than reverse KL",
            "entropy", mix, (student_reverse,),
        ),
        Claim(
            "curriculum_avg", "The gated curriculum has a higher Avg@k than the fixed long length",
            "avg", (curriculum,), fixed,
        ),
        Claim(
            "curriculum_length", "The fixed long length ends with longer responses than the gated"
            " curriculum", "length", fixed, (curriculum,),
        ),
    )  # fmt: skip
