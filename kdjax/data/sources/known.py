"""Mappings of the datasets that kdjax knows by name."""

from __future__ import annotations

from kdjax.data.sources import cells
from kdjax.data.sources.mapping import Column, Mapping

GSM8K = Mapping(
    prompt=Column(("question",)),
    answer=Column(("answer",), cells.after_marks),
    solution=Column(("answer",), cells.worked),
    train="train",
    test="test",
    config="main",
    rows=(
        ("train", 7473),
        ("test", 1319),
    ),
)
MATH_500 = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    solution=Column((), cells.text, optional=("solution",)),
    test="test",
    rows=(("test", 500),),
)
AIME_2024 = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    solution=Column((), cells.text, optional=("solution",)),
    test="train",
    rows=(("train", 30),),
)
AIME_2024_CAPITALS = Mapping(
    prompt=Column(("Problem",)),
    answer=Column(("Answer",)),
    solution=Column((), cells.text, optional=("Solution",)),
    test="train",
    revision="8d88b2876a82a080e2f172cc9b25d0d9d2cb4792",
    rows=(("train", 30),),
    note="three problem texts were corrected after publication; the revision is pinned",
)
AIME_2024_BOXED = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("solution",), cells.unboxed),
    test="test",
    rows=(("test", 30),),
)
AIME_2025 = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    test="test",
    rows=(("test", 30),),
)
AMC_2023 = Mapping(
    prompt=Column((), cells.same, optional=("question", "problem")),
    answer=Column(("answer",)),
    test="test",
    rows=(("test", 40),),
)
AMC_2022_2023 = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    test="train",
    rows=(("train", 83),),
    note="83 problems of two years: not the 40 of AMC 2023 (math-ai/amc23)",
)
DAPO_MATH = Mapping(
    prompt=Column(("prompt",), cells.without_dapo_wrapper),
    answer=Column(("reward_model.ground_truth",)),
    train="train",
    rows=(("train", 1_791_700),),
    note="each problem stands about a hundred times in the file; DAPO's instruction around it is"
    " taken off (to keep it, give the file with --columns prompt=prompt"
    " answer=reward_model.ground_truth)",
)
DEEPSCALER = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    solution=Column((), cells.text, optional=("solution",)),
    train="train",
)
OPEN_R1_MATH = Mapping(
    prompt=Column(("problem",)),
    answer=Column(("answer",)),
    solution=Column(
        ("generations", "is_reasoning_complete", "correctness_math_verify", "correctness_llama"),
        cells.verified_trace,
    ),
    traces=Column(("generations",), cells.how_many),
    keeps=Column(("question_type",), lambda kind: str(kind).lower() not in ("proof", "mcq")),
    train="train",
    config="default",
    rows=(("train", 93_733),),
    note="proofs and multiple choice are left out; the worked response is the first trace that is"
    " complete and verified, by math-verify or else by the judge",
)
DEEPMATH = Mapping(
    prompt=Column(("question",)),
    answer=Column(("final_answer",)),
    solution=Column(
        ("final_answer", "r1_solution_1", "r1_solution_2", "r1_solution_3"),
        cells.trace_with_answer,
    ),
    traces=Column(("r1_solution_1", "r1_solution_2", "r1_solution_3"), cells.how_many),
    train="train",
    revision="5cf055d1fe3d7a2eb19719ac020211469736ae44",
    rows=(("train", 103_022),),
    note="48 questions leaked their answer and were edited; the revision is pinned. The worked"
    " response is the first of three whose box is the answer",
)

KNOWN: dict[str, Mapping] = {
    "openai/gsm8k": GSM8K,
    "HuggingFaceH4/MATH-500": MATH_500,
    "HuggingFaceH4/aime_2024": AIME_2024,
    "Maxwell-Jia/AIME_2024": AIME_2024_CAPITALS,
    "math-ai/aime24": AIME_2024_BOXED,
    "math-ai/aime25": AIME_2025,
    "math-ai/amc23": AMC_2023,
    "AI-MO/aimo-validation-amc": AMC_2022_2023,
    "BytedTsinghua-SIA/DAPO-Math-17k": DAPO_MATH,
    "agentica-org/DeepScaleR-Preview-Dataset": DEEPSCALER,
    "open-r1/OpenR1-Math-220k": OPEN_R1_MATH,
    "zwhe99/DeepMath-103K": DEEPMATH,
}
"""The datasets that data.name and evaluation.name can name without columns."""
