"""Chat templates that a user names, for tokenizers that have none (base models) or another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.runtime.files import read_text

PLAIN, SUFFIX = "plain", ".jinja"

_BEGIN = "{{ bos_token }}"
_TURNS = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def named_template(name: str, hf: Any) -> str:
    """The text of a chat template by its name.

    `plain`: the text of each turn on lines of its own, an answer with the end-of-sequence token
    behind it; at the front the begin-of-sequence token where the tokenizer puts it before texts.

    Args:
        name: plain, or the path of a jinja file.
        hf: the library's tokenizer.

    Errors: DataError for a file that is not there, or is no text.
    """
    if name != PLAIN:
        if not Path(name).exists():
            raise DataError(f"data.chat_template {name}: there is no such file; give {PLAIN}")
        return read_text(Path(name))
    first = hf.backend_tokenizer.encode("?", add_special_tokens=True).ids[:1]
    begins = hf.bos_token_id is not None and first == [hf.bos_token_id]
    return _BEGIN + _TURNS if begins else _TURNS
