"""DistiLLM: skew KL on the student's and the teacher's responses in turn (arXiv 2402.03898, skew
0.1).

Its replay buffer of older responses is not here: each response is drawn anew, or read from the
teacher's trajectories.

    kdjax train configs/methods/distillm.py
"""

from kdjax import Config, Turn, skew_forward_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/distillm",
        prefix="student",
        token_loss=skew_forward_kl(0.1),
        turns=(Turn(share=0.5, prefix="teacher"),),
    )
