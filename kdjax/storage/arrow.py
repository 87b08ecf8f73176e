"""Responses as Arrow tables, a row a response as long as it is; what is read is checked."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kdjax.base import Array, Trajectories


def table_of(rows: np.ndarray, kept: Trajectories):
    """An Arrow table, a row a response: what is [B] is a number there, what is [B, T, ...] a list
    of the response's length."""
    import pyarrow

    fields: dict[str, Array | None] = {**kept.samples._asdict(), "states_btd": kept.states_btd}
    if kept.top_k_bt is not None:
        fields |= {f"top_k_{name}": value for name, value in kept.top_k_bt._asdict().items()}
    columns = {name: np.asarray(value) for name, value in fields.items() if value is not None}
    lengths = np.asarray(kept.samples.length_b)
    inside = np.arange(columns["tokens_bt"].shape[1])[None] < lengths[:, None]
    ends = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def column(values: np.ndarray):
        if values.ndim == 1:
            return pyarrow.array(values)
        inner = values[inside]
        bits = inner.view(np.uint16) if inner.dtype == jnp.bfloat16 else inner
        flat = pyarrow.array(bits.reshape(-1))
        if inner.ndim > 1:
            flat = pyarrow.FixedSizeListArray.from_arrays(flat, inner.shape[1])
        return pyarrow.LargeListArray.from_arrays(ends, flat)

    named = {name: column(values) for name, values in columns.items()}
    return pyarrow.table({"row": pyarrow.array(rows), **named})


def row_of(table) -> dict[str, np.ndarray]:
    """The fields of a table of one row."""
    fields = {}
    for name in table.column_names:
        values: Any = table.column(name).combine_chunks()
        shape: tuple[int, ...] = ()
        if "list" in str(values.type):
            values, shape = values.flatten(), (-1,)
        if "list" in str(values.type):
            shape = (len(values), values.type.list_size)
            values = values.flatten()
        found = values.to_numpy()
        found = found.view(jnp.bfloat16) if found.dtype == np.uint16 else found
        fields[name] = found.reshape(shape)
    return fields


def padded(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Numbers as [B]; arrays [t, ...] as [B, width, ...], zeros beyond t."""
    if rows[0].ndim == 0:
        return np.stack(rows)
    padded = np.zeros((len(rows), width, *rows[0].shape[1:]), rows[0].dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def check_table(table, rows: int, width: int) -> None:
    """ValueError unless a table holds so many rows of what `table_of` makes, none of them wider."""
    import pyarrow
    import pyarrow.compute

    table.validate(full=True)  # offsets that point elsewhere would be followed
    needed = {"tokens_bt", "length_b", "sampler_logp_bt", "stop_b"}
    if len(table) != rows or not needed <= {*table.column_names}:
        raise ValueError(f"{len(table)} rows of {', '.join(table.column_names)}")
    for name in {*table.column_names} - {"row"}:
        column = table.column(name)
        listed = pyarrow.types.is_large_list(column.type)
        inner = column.type.value_type if listed else column.type
        inner = inner.value_type if pyarrow.types.is_fixed_size_list(inner) else inner
        if listed is name.endswith("_b") or not inner.bit_width:
            raise ValueError(f"{name} holds {column.type}")
        if listed and not pyarrow.compute.list_value_length(column).equals(
            table.column("length_b").cast(pyarrow.int64())
        ):
            raise ValueError(f"{name} is not as long as its responses")
    longest = pyarrow.compute.max(table.column("length_b")).as_py() or 0
    if longest > width:
        raise ValueError(f"a response of {longest} tokens, over {width}")
