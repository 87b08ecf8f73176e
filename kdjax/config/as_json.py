"""A config as JSON values and back, and what differs between two."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from kdjax.config.names import parse
from kdjax.config.schema import FUNCTIONS, Config, Turn
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe


def as_dict(config: Any) -> dict[str, Any]:
    """JSON values of a config; functions by the text they are written as."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(fields: dict[str, Any]) -> Config:
    """The inverse of `as_dict`, of a run's config.json.

    A loss of the user's own is only known to the file that made it: the default stands in for it,
    which evaluation and export don't look at. Errors: ConfigError for what no config says.
    """
    return _build(Config, fields)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return describe(value) if callable(value) else value


def _build(kind: Any, fields: Any) -> Any:
    if not isinstance(fields, dict):
        raise ConfigError(f"a {kind.__name__} must be a JSON object, got {fields!r}")
    values = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name not in fields:
            continue
        value = fields[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        elif hint == tuple[Turn, ...] and isinstance(value, list):
            value = [_build(Turn, one) for one in value]
        elif hint in FUNCTIONS and isinstance(value, str):
            try:
                value = parse(value, FUNCTIONS[hint])
            except ConfigError:
                continue
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
