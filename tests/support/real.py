"""The real model of the tests in tests/real: where it is, if it was made."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
FOLDER = FOLDER / "kdjax" / "smollm2-135m-instruct"
HAS_REAL = importlib.util.find_spec("torch") is not None and (FOLDER / "config.json").is_file()
NO_REAL = f"LEFT OUT: the tests on SmolLM2 (no {FOLDER}; python launch/smollm2.py makes it)"
