"""KL mixing on student prefixes, forward-heavy: 0.8 KL(teacher|student) + 0.2 KL(student|teacher).

kdjax train configs/student_mix.py
kdjax train configs/student_mix.py --run runs/half \\
    --token_loss "mix(forward_kl, reverse_kl, weight=0.5)"
"""

from kdjax import Config, forward_kl, mix, reverse_kl


def get_config() -> Config:
    token_loss = mix(forward_kl, reverse_kl, weight=0.8)
    return Config(run="runs/student_mix", prefix="student", token_loss=token_loss)
