"""ResOPD (arXiv 2610.04882): reverse KL to a teacher's most probable tokens, and the sampled token
for the rest.

Buckets alone are a bound; where the sampled token is outside the top k, its log-ratio there makes
value and gradient those of the whole vocabulary, in expectation over the student's tokens. A
teacher whose weights are here leaves nothing out; an engine's, or a kept one's, does:

    kdjax train configs/methods/res_opd.py
    kdjax train configs/methods/res_opd.py --served.url http://teacher:8000 --served.model its-name
    kdjax rollouts configs/methods/res_opd.py --keep top_k=8 --out kept
"""

from kdjax import Config, add, reverse_divergence, tail_residual


def get_config() -> Config:
    return Config(
        run="runs/methods/res_opd",
        prefix="student",
        objective=add(reverse_divergence, tail_residual),
    )
