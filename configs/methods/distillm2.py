"""DistiLLM-2: skew KL where the teacher wrote, skew reverse KL where the student did (arXiv
2503.07067).

The contrast of the two sources is in the two losses; its adaptive skew is not here. The gradient
flows through the student's share of the mixture, as in DistiLLM; DistiLLM-2's code stops it there.

    kdjax train configs/methods/distillm2.py
"""

from kdjax import Config, Turn, skew_forward_kl, skew_reverse_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/distillm2",
        prefix="student",
        token_loss=skew_reverse_kl(0.1),
        turns=(Turn(share=0.5, prefix="teacher", token_loss=skew_forward_kl(0.1)),),
    )
