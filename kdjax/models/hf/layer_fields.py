"""The keys of a config.json that differ from layer to layer: kinds, windows, rotary positions."""

from __future__ import annotations

from typing import Any

from kdjax.errors import DataError
from kdjax.models.hf.families import CONTEXT, Family
from kdjax.models.shape import FULL, SLIDING, RopeScaling

Fields = dict[str, Any]

SCALING_KEYS = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}
"""Kind of scaling -> the keys that it has beside its factor and the trained context."""
TRAINED_CONTEXT = "original_max_position_embeddings"

MAX_FACTOR = 2**20
"""Far more than any released model's; a context so stretched still is a number."""


def layers_of(family: Family, fields: Fields, where: str) -> Fields:
    """layer_types, sliding_window and no_rope_layers of a DecoderConfig, each empty where all
    layers are alike.

    Errors: DataError naming a kind that is not known, or that the family's class would not compute,
    and lists that don't fit the number of layers.
    """
    count, window = fields.get("num_hidden_layers", 0), _window(family, fields, where)
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = _default_kinds(family, fields, window)
    _check_list("layer_types", kinds, count, where)
    allowed = {FULL, SLIDING} if family.window != "none" else {FULL, *family.pattern}
    if family.window in ("always", "switched") and window is not None:
        allowed = {SLIDING}
    if odd := sorted({*kinds} - allowed):
        raise DataError(
            f"{where}: layer_types holds {odd[0]!r}; layers of {family.architecture} are"
            f" {' or '.join(sorted(allowed))}"
        )
    if window is None and SLIDING in kinds:
        switch = family.window.startswith("switched") and not fields.get("use_sliding_window")
        raise DataError(
            f"{where}: layer_types holds {SLIDING!r}, but there is no window:"
            f" {'use_sliding_window is false' if switch else 'sliding_window is missing'}"
        )
    if SLIDING not in kinds:
        window = None
    turned = _turned(family, fields, count, where)
    return {
        "layer_types": () if {*kinds} in ({FULL}, {SLIDING}, set()) else tuple(kinds),
        "sliding_window": window,
        "no_rope_layers": () if all(turned) else tuple(turned),
    }


def _window(family: Family, fields: Fields, where: str) -> int | None:
    """The window of sliding layers; None: none slides. Errors: DataError for one that sees nothing,
    not even its own position."""
    switched_off = family.window.startswith("switched") and not fields.get("use_sliding_window")
    if family.window == "none" or switched_off:
        return None
    if fields.get("sliding_window") == 0:
        raise DataError(f"{where}: sliding_window must be at least 1, or null: no window")
    return fields.get("sliding_window")


def _default_kinds(family: Family, fields: Fields, window: int | None) -> list[str]:
    """The kinds of all layers where layer_types does not say them."""
    count = fields.get("num_hidden_layers", 0)
    if family.pattern:
        every = fields.get(family.pattern_key) or len(family.pattern)
        return [
            family.pattern[-1] if (layer + 1) % every == 0 else family.pattern[0]
            for layer in range(count)
        ]
    if window is None:
        return [FULL] * count
    if family.window == "switched_by_type":  # SmolLM3: the layers without rotary positions
        return [FULL if has else SLIDING for has in _turned(family, fields, count, "")]
    first = fields["max_window_layers"] if family.window == "switched_from" else 0
    return [SLIDING if layer >= first else FULL for layer in range(count)]


def _turned(family: Family, fields: Fields, count: int, where: str) -> list[int]:
    """1 for a layer with rotary positions, 0 for one without."""
    if not family.no_rope_every:
        return [1] * count
    listed = fields.get("no_rope_layers")
    if listed is not None:
        _check_list("no_rope_layers", listed, count, where)
        return listed
    every = fields.get("no_rope_layer_interval") or family.no_rope_every
    return [int((layer + 1) % every != 0) for layer in range(count)]


def _check_list(name: str, listed: list, count: int, where: str) -> None:
    if len(listed) != count:
        raise DataError(
            f"{where}: {name} has {len(listed)} entries, but there are {count} hidden layers"
        )


def positions_of(family: Family, fields: Fields, where: str) -> Fields:
    """The rotary positions of a DecoderConfig: those of full layers, and the base of sliding ones.

    Errors: DataError naming a scaling that is not supported, or that lacks a number.
    """
    rope, local = _ropes(family, fields, where)
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    own = "partial_rotary_factor" in family.defaults
    _check_rope(rope, part == 1 or own, family, where)
    _check_rope(local, _rope_type(local) == "default", family, where)
    theta = _base(rope.get("rope_theta", fields.get("rope_theta", 1e4)), where)
    found = {
        "rope_theta": theta,
        "rope_scaling": _scaling(family, rope, fields, where),
        "partial_rotary_factor": part if own else 1.0,
        "local_rope_theta": None,
    }
    if family.local_rope_theta is not None:
        base = fields.get("rope_local_base_freq", family.local_rope_theta)
        found["local_rope_theta"] = _base(local.get("rope_theta", base), where)
    return found


def _ropes(family: Family, fields: Fields, where: str) -> tuple[Fields, Fields]:
    """The rotary positions of full layers and of sliding ones, where these are other: the older
    rope_scaling stands before rope_parameters, as in transformers, whose classes read the latter by
    kind of layer of some families alone."""
    scaling, given = (fields.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    by_kind = family.local_rope_theta is not None
    wrong = {"rope_scaling": _of_kinds(scaling)}
    wrong["rope_parameters"] = bool(given) and _of_kinds(given) != by_kind
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        form = "an object for each kind of layer" if by_kind else "the same for all layers"
        form = "that of all full layers" if by_kind and name == "rope_scaling" else form
        raise DataError(
            f"{where}: {name} of {family.architecture} must be {form}, got {fields[name]!r}"
        )
    if not by_kind:
        return scaling or given, {}
    return {**(given.get(FULL) or {}), **scaling}, given.get(SLIDING) or {}


def _of_kinds(rope: Fields) -> bool:
    return FULL in rope or SLIDING in rope


def _base(theta: Any, where: str) -> float:
    if theta <= 1:
        raise DataError(f"{where}: rope_theta must be above 1, got {theta}")
    return theta


def _check_rope(rope: Fields, good: bool, family: Family, where: str) -> None:
    unknown = _rope_type(rope) not in ("default", *SCALING_KEYS)
    unread = rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False
    if unknown or unread or not good:
        raise DataError(f"{where}: not supported for {family.architecture}: rope_scaling={rope!r}")


def _rope_type(rope: Fields) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(family: Family, rope: Fields, fields: Fields, where: str) -> RopeScaling | None:
    rope_type = _rope_type(rope)
    if rope_type == "default":
        return None
    beside = fields.get(TRAINED_CONTEXT) if family.local_rope_theta is None else None
    context = beside or rope.get(TRAINED_CONTEXT) or fields.get(CONTEXT)
    if rope_type == "dynamic":  # transformers looks at no other
        context = fields.get(CONTEXT)
    if not context and rope_type != "linear":
        raise DataError(
            f"{where}: rope_scaling of type {rope_type} needs {TRAINED_CONTEXT}, or {CONTEXT}"
            " beside it"
        )
    values = {k: rope[k] for k in SCALING_KEYS[rope_type] if rope.get(k) is not None}
    values = {k: v for k, v in values.items() if v or not k.startswith("beta_")}  # 0: the default
    factor = rope.get("factor")
    if rope_type == "longrope":
        if not values.get("short_factor"):
            raise DataError(f"{where}: rope_scaling of type longrope needs short_factor")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        factor = factor or fields.get(CONTEXT, context) / context  # type: ignore[operator]
    if not factor or factor > MAX_FACTOR:
        raise DataError(
            f"{where}: rope_scaling of type {rope_type} needs a factor of at most 2**20, got {rope}"
        )
    values |= {TRAINED_CONTEXT: context} if context else {}
    scaling = RopeScaling(rope_type, factor, **values)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise DataError(
            f"{where}: rope_scaling of type llama3 needs low_freq_factor below high_freq_factor"
        )
    return scaling


def scaling_fields(scaling: RopeScaling | None) -> Fields:
    """The keys of rope_scaling in a config.json; {} without one.

    >>> scaling_fields(RopeScaling("linear", 2.0, 4096))
    {'rope_type': 'linear', 'factor': 2.0, 'original_max_position_embeddings': 4096}
    """
    if scaling is None:
        return {}
    names = ("rope_type", "factor", TRAINED_CONTEXT, *SCALING_KEYS[scaling.rope_type])
    found = {name: getattr(scaling, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None}
