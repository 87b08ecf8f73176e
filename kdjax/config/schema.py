"""The fields of an experiment: small frozen dataclasses, complete and printable."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from kdjax.base import PLAIN, Objective, Reduction, Sampling, TokenLoss
from kdjax.config.claims import Claim
from kdjax.config.engines import Rollouts, Served
from kdjax.config.names import (
    GROUP_ADVANTAGES,
    OBJECTIVES,
    REDUCTIONS,
    REWARDS,
    TOKEN_LOSSES,
    Names,
    parse,
)
from kdjax.grading.rewards import Reward, accuracy
from kdjax.losses.composition import describe
from kdjax.losses.grpo import GroupAdvantage, standardized
from kdjax.losses.kl import forward_kl
from kdjax.losses.objectives import divergence
from kdjax.losses.reductions import sequence_mean

FUNCTIONS: dict[Any, Names] = {
    TokenLoss: TOKEN_LOSSES,
    Objective: OBJECTIVES,
    Reduction: REDUCTIONS,
    TokenLoss | None: TOKEN_LOSSES,
    Objective | None: OBJECTIVES,
    Reward: REWARDS,
    GroupAdvantage: GROUP_ADVANTAGES,
}
"""The names that a function-valued field can be written with, by its type."""


Prefix = Literal["dataset", "teacher", "student"]
"""Whose responses are trained on."""

Best = Literal[
    "highest test_avg", "highest test_entropy", "lowest test_entropy", "lowest test_truncated"
]
"""Which checkpoint is the best, by the tests during training."""


def _written(names: Names) -> tyro.constructors.PrimitiveConstructorSpec:
    """How the command line reads a function: by name, or as a combinator call."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(names.functions),
        instance_from_str=lambda texts: parse(texts[0], names),
        is_instance=callable,
        str_from_instance=lambda function: [describe(function)],
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Which problems are trained on: those of the embedded task, of a dataset by its `name`
    (docs/data.md), or of a `file` (JSONL, CSV, Parquet, Arrow, or a folder of them).

    columns: which columns of the file are what, each "field=column"; they count for
    curriculum's held-out problems too.
    overlong_prompts: where a prompt, of training, gate or test, has more than max_prompt_tokens, a
    run is refused at its start, or such problems are left out and counted.
    prompt_template, system_prompt and thinking (Qwen3's switch in the chat template) are how every
    prompt is put, in training, gate and evaluation, to student and teacher; {prompt} stands for the
    problem, and other braces are text. chat_template: `plain` or a jinja file, in place of the
    models' own; a base model often has none.
    teacher_prompt_template: another text in the place of the problem for the teacher alone, in
    training: {prompt}, {answer}, {solution} and {teacher_prompt} stand for the row's; problems that
    lack one of those it names are left out. max_teacher_prompt_tokens: the limit of its prompts, by
    default max_prompt_tokens.
    """

    task: str = "calc"
    terms: tuple[int, ...] = (3, 4, 5, 6)
    problems: int = 6144
    name: str | None = None
    file: str | None = None
    columns: tuple[str, ...] = ()
    max_prompt_tokens: int = 28
    overlong_prompts: Literal["refuse", "leave_out"] = "refuse"
    prompt_template: str = "{prompt}"
    system_prompt: str | None = None
    thinking: bool = False
    chat_template: str | None = None
    teacher_prompt_template: str | None = None
    max_teacher_prompt_tokens: int | None = None

    @property
    def teacher_prompt_tokens(self) -> int:
        """The most tokens of a prompt that a teacher reads."""
        own = self.max_teacher_prompt_tokens
        return self.max_prompt_tokens if own is None else own


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with clipping; the rate warms up, then goes by cosine to final_fraction of its peak."""

    learning_rate: float = 3e-3
    warmup_fraction: float = 0.05
    final_fraction: float = 0.02
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    b2: float = 0.95


@dataclasses.dataclass(frozen=True)
class Lora:
    """Train a low-rank adapter beside the frozen student (arXiv 2106.09685); rank 0 trains the
    student itself. Updates count alpha / rank times; no targets: every projection outside experts.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Response length limits in tokens and the gate between them; one is a fixed horizon.

    Several need one threshold of the held-out entropy: in nats, or as a share of what is measured
    before step 0. policy: what happens under it (`kdjax.step.gate`): stop for good, hold until a
    later measurement passes, or fall_back to the last stable length and parameters (a copy of
    which is kept). heldout_responses: whose tokens are measured, of all or of those that a stop
    token ended.
    """

    lengths: tuple[int, ...] = (64,)
    entropy_threshold_nats: float | None = None
    entropy_threshold_share: float | None = None
    policy: Literal["stop", "hold", "fall_back"] = "stop"
    measure_every_steps: int = 50
    heldout_responses: Literal["all", "finished"] = "all"
    heldout_problems: int = 64
    heldout_file: str | None = None
    heldout_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The report at the end of a run: test problems, samples a problem, and the k of Pass@k.

    name, file and columns say which problems, as those of `Data`; `problems` is of the task.
    temperatures: the report is made at each of these too, sampled otherwise as `sampling` says; the
    report at `sampling` itself is the one that tables, claims and comparisons read.
    batch_size: rows that are scored at a time; how many are drawn at a time is of `Rollouts`.
    every_steps: also during training, with samples_during_training a problem, into the metrics as
    test_avg, test_length, test_entropy and test_truncated; 0: only at the end.
    grader: exact, a boxed answer by exact rationals and text; exact_flexible, else what follows
    ####, else the last number; math, exact and else by math-verify (extra math); math_lenient,
    math-verify's defaults (docs/verifier.md).
    """

    problems: int = 100
    file: str | None = None
    samples: int = 8
    k: tuple[int, ...] = (1, 4, 8)
    sampling: Sampling = PLAIN
    max_new_tokens: int = 64
    batch_size: int = 128
    every_steps: int = 0
    samples_during_training: int = 2
    name: str | None = None
    columns: tuple[str, ...] = ()
    grader: Literal["exact", "exact_flexible", "math", "math_lenient"] = "exact"
    temperatures: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices by mesh axis; the rest go to data. fsdp shards parameters, optimizer state and batch
    (by default 1, or all devices where the state would fill 40 % of one), tensor heads, MLP and
    vocabulary.

    teacher_devices: the last so many devices hold the teachers, sharded over all of them (fsdp),
    and the rest the student; by default all hold both.
    """

    fsdp: int | None = None
    tensor: int = 1
    teacher_devices: int = 0


@dataclasses.dataclass(frozen=True)
class RL:
    """What the student's responses are rewarded for, and how an objective sees it.

    group_size: samples of each problem in a batch (1: nothing is rewarded); a step takes the first
    batch_size / group_size problems of its batch. reward: a function of (prompt, response, answer);
    by name accuracy, or math, which takes symbolic answers too (extra math, docs/verifier.md).
    advantage: of rewards within a group (kdjax/losses/grpo.py). epochs: updates over one rollout.
    redraws: times that a group without signal, all of whose rewards are equal, is replaced by one
    of another problem. overlong_buffer_tokens: over so many tokens before the limit
    the reward falls by overlong_penalty, in groups with signal. Methods of a run that read no
    reward are not drawn in groups.
    """

    group_size: int = 1
    reward: Annotated[Reward, _written(REWARDS)] = accuracy
    advantage: Annotated[GroupAdvantage, _written(GROUP_ADVANTAGES)] = standardized
    epochs: int = 1
    redraws: int = 0
    overlong_buffer_tokens: int = 0
    overlong_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Which of the checkpoints, one every save_every_steps, stay: the `last` ones, those of every
    so many steps (0: none for that), and the best by a test during training, which then needs
    evaluation.every_steps. failed_save: what a run does whose checkpoint can't be written, where a
    disk is full or gone: stop, or say so and go on from the last good one.
    """

    last: int = 2
    every_steps: int = 0
    best: Best | None = None
    failed_save: Literal["stop", "go_on"] = "stop"


@dataclasses.dataclass(frozen=True)
class Faults:
    """What ends a run that goes wrong (docs/reliability.md).

    skipped_in_a_row: an update is skipped where loss or gradient is not finite; after so many in a
    row the run is saved and stops (exit code 86). step_limit_seconds: a process in which no step
    ends for so long writes where it stands, and ends (exit code 124); it must be over the longest
    compilation. None: it is only reported.
    """

    skipped_in_a_row: int = 5
    step_limit_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """Another method that takes steps of a run: this share of them, evenly spread, from a step on.
    What is None is the config's own.

    Data of two sources in one run are a turn of a share, one method after the other is a turn of
    share 1 from a later step on.
    """

    share: float = 1.0
    from_step: int = 0
    prefix: Prefix | None = None
    token_loss: TokenLoss | None = None
    objective: Objective | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. A method is two choices: `prefix` (whose trajectories) and `token_loss` (which
    comparison).

    dtype is of the computation and of the teacher's weights; the student's are float32.
    teacher_weights: int8 holds the kernels of the teacher's layers in int8 with a scale an output
    channel (extra int8), which halves its memory and changes its distribution a little. attention:
    how whole sequences attend (auto: by device and length). remat: what a layer keeps for its
    backward pass (all, its products, its input alone). head_memory_mib: what the loss head may
    spend on a chunk's logits, a device; by default 8 % of an accelerator's memory or 128 MiB on a
    CPU, and at most 1,024 tokens. The last three change rounding only.
    trajectories: a folder that `kdjax rollouts` wrote, of this prefix: responses are read from it,
    not drawn. Where it keeps the teacher's outputs, no teacher is loaded (of its states, its head
    alone), and the evaluation has no KLs; with its top-k, teacher may be None.
    stops: what loss and statistics make of stop tokens, where student and teacher end differently
    (`kdjax.step.stops`): raw, like any other token; mask, left out; merge, all of them one event,
    which also ends what the student draws, in training and evaluation.
    turns: other methods that take some of the steps, each its share of all of them; an earlier
    turn, and the config's own method, keep their shares of what a later one leaves.
    reference: a model whose log-probabilities of the sampled tokens objectives may use.
    served: an engine that scores as the teacher, whose weights are then not loaded.
    least_aligned: None, and the teacher must have the student's tokenizer; a share in (0, 1], and
    it may have another: trained on are tokens that both cut alike (`kdjax.data.alignment`), and a
    run is refused where fewer of the first responses' are.
    teachers: several in place of `teacher`, each "tag=model": a problem is taught by that of its
    tag (column `tag` of data.file), and every batch holds problems of one tag. teacher_shares: a
    tag has steps in proportion to its problems, or as many as any other (equal).
    teacher self: the student itself, without gradient, as self_decay says: 0, as it is; 1, as it
    was at the start; between, the exponential average of its parameters, which keeps so much of
    itself at each update (docs/methods.md).
    """

    run: str = "runs/default"
    student: str = "kdjax:student"
    teacher: str | None = "kdjax:teacher"
    teachers: tuple[str, ...] = ()
    self_decay: float = 0.0
    reference: str | None = None
    prefix: Prefix = "student"
    trajectories: str | None = None
    token_loss: Annotated[TokenLoss, _written(TOKEN_LOSSES)] = forward_kl
    objective: Annotated[Objective, _written(OBJECTIVES)] = divergence
    reduction: Annotated[Reduction, _written(REDUCTIONS)] = sequence_mean
    turns: Annotated[tuple[Turn, ...], tyro.conf.Suppress] = ()
    stops: Literal["raw", "mask", "merge"] = "raw"
    least_aligned: float | None = None
    steps: int = 120
    batch_size: int = 48
    micro_batches: int = 1
    sampling: Sampling = PLAIN
    rollouts: Rollouts = Rollouts()
    served: Served = Served()
    seed: int = 0
    data: Data = Data()
    rl: RL = RL()
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    curriculum: Curriculum = Curriculum()
    evaluation: Evaluation = Evaluation()
    save_every_steps: int = 50
    checkpoints: Checkpointing = Checkpointing()
    log_every_steps: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_weights: Literal["compute", "int8"] = "compute"
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    layout: Layout = Layout()
    faults: Faults = Faults()
    head_memory_mib: int | None = None
    cache: str = "runs/cache"
    teacher_shares: Literal["problems", "equal"] = "problems"
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """Configs to compare, by name, each trained once a seed, in folder/NAME/seed_S; the start and
    the teacher of the first are references. claims: what the report gives a verdict on. starts:
    cells that begin as another cell's trained student of the same seed, in place of their own."""

    folder: str
    cells: dict[str, Config]
    seeds: tuple[int, ...] = (0,)
    claims: tuple[Claim, ...] = ()
    starts: dict[str, str] = dataclasses.field(default_factory=dict)


WHERE_IT_RUNS = (
    "run", "cache", "trajectories", "wandb_project", "log_every_steps", "save_every_steps",
    "checkpoints", "evaluation", "layout", "faults",
)  # fmt: skip
"""Fields that may differ when a run is resumed: they don't change what is trained. (A folder of
trajectories may have moved; what is in it is checked by its identity.)"""
