"""Short names of JSON values: a setting that differs has another."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """The first 16 hex digits of the sha256 of a value's JSON with sorted keys.

    >>> digest({"seed": 0, "terms": (2, 3)}) == digest({"terms": [2, 3], "seed": 0})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
