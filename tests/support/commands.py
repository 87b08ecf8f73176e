"""Commands as a user types them."""

from __future__ import annotations

from kdjax.__main__ import main

CONFIG = """
from kdjax import Config, reverse_kl
from kdjax.config import Curriculum, Data, Evaluation

def get_config():
    return Config(
        run={run!r}, student={student!r}, teacher={teacher!r}, cache={cache!r},
        token_loss=reverse_kl, steps=2, batch_size=8,
        data=Data(terms=(2,), problems=8, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(problems=4, samples=2, k=(1, 2), max_new_tokens=8, batch_size=8),
    )
"""


def fails(capsys, code: int, *arguments) -> str:
    """The single line that a failing command prints."""
    assert main([str(a) for a in arguments]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("kdjax: ")
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    return printed
