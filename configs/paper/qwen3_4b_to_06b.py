"""The paper's pair: Qwen3-4B into Qwen3-0.6B-Base, on-policy distillation at 4,096 tokens.

    kdjax plan configs/paper/qwen3_4b_to_06b.py --topology v5e:4x4
    kdjax train configs/paper/qwen3_4b_to_06b.py \\
        --data.file prompts.jsonl --evaluation.file test.jsonl

Settings of the nearest published recipe (arXiv 2606.17199, same authors): learning rate 5e-7,
constant after 5 % warm-up, 32 sequences a step, mean over sequences of token means, float32 weights
with bfloat16 compute, 1,500 steps, rollouts at temperature 1.0, top-p 0.95, top-k 20, evaluation at
temperature 0.6. Prompts: a JSONL file with columns prompt and answer (DeepScaleR there), the bare
question as the only user turn, thinking off.
No training figure of this config was measured yet; docs/plan.md has its plans.
"""

from kdjax import Config, Sampling, reverse_kl
from kdjax.config import Curriculum, Data, Evaluation, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/qwen3_4b_to_06b",
        student="Qwen/Qwen3-0.6B-Base",
        teacher="Qwen/Qwen3-4B",
        prefix="student",
        token_loss=reverse_kl,
        steps=1500,
        batch_size=32,
        data=Data(file="prompts.jsonl", max_prompt_tokens=1024),
        optimizer=Optimizer(learning_rate=5e-7, warmup_fraction=0.05, final_fraction=1.0, b2=0.999),
        curriculum=Curriculum(lengths=(4096,)),
        evaluation=Evaluation(
            file="test.jsonl",
            sampling=Sampling(temperature=0.6),
            max_new_tokens=4096,
            batch_size=32,
        ),
        sampling=Sampling(temperature=1.0, top_p=0.95, top_k=20),
        dtype="bfloat16",
        remat="full",
    )
