"""A config as JSON values and back, and what differs between two."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from kdjax.config.names import names_others, parse, require_named
from kdjax.config.schema import FUNCTIONS, WHERE_IT_RUNS, Config, Turn
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe
from kdjax.runtime.console import announce


def as_dict(config: Any) -> dict[str, Any]:
    """JSON values of a config; functions by the text they are written as. Errors: ConfigError for a
    function of this package that no table has, as it could not be read back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(fields: dict[str, Any]) -> Config:
    """The inverse of `as_dict`, of a run's config.json.

    A loss of the user's own is only known to the file that made it: the default stands in for it,
    which evaluation and export don't look at. So it does for one that this version of the package
    does not have, which is said. Errors: ConfigError for what no config says.
    """
    return _build(Config, fields)


def trained_by(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config as JSON that decide what is trained; among them, with rollouts drawn
    ahead, the steps of checkpoints. A field that is not there is a younger version's, and has its
    default: the run was trained so."""
    fields = _completed(fields, as_dict(Config()))
    decisive = {name: value for name, value in fields.items() if name not in WHERE_IT_RUNS}
    rollouts = dict(fields.get("rollouts", {}))
    if rollouts.get("ahead"):
        decisive["save_every_steps"] = fields.get("save_every_steps")
    decisive["rollouts"] = {
        name: rollouts.get(name) for name in ("kv_cache", "ahead", "engine_every")
    }
    served = fields["served"]  # its engine may have moved
    return decisive | {"served": {"top_k": served["top_k"] if served["url"] else None}}


def _completed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields, and the defaults of those that are missing, in sections too.

    >>> _completed({"data": {"file": "a"}}, {"data": {"file": None, "terms": 3}, "seed": 0})
    {'data': {'file': 'a', 'terms': 3}, 'seed': 0}
    """
    found = {**defaults, **fields}
    for name, default in defaults.items():
        if isinstance(default, dict) and isinstance(found[name], dict):
            found[name] = _completed(found[name], default)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if not callable(value):
        return value
    require_named(value)
    return describe(value)


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
            except ConfigError as error:
                if not names_others(value):
                    announce(f"config: {name}: {error}; the default stands in for it")
                continue
        elif hint in (float, float | None) and value in ("inf", "-inf", "nan"):
            value = float(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
