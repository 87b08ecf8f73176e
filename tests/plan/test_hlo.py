"""Collectives read from compiled programs: kinds, bytes, and the turns of the loops they are in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.plan.hlo import collectives, widest_rows
from kdjax.sharding import make_mesh

MESH = make_mesh(8)
ROWS = PartitionSpec("data")


def text_of(function, shape, out=ROWS):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, ROWS))
    mapped = jax.shard_map(function, mesh=MESH, in_specs=ROWS, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


@pytest.mark.parametrize(
    ("function", "kind", "payload"),
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 2 * 16 * 4),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), "all-gather", 16 * 16 * 4),
        (lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True), "all-to-all", 2 * 16 * 4),
        (
            lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
            "reduce-scatter",
            2 * 16 * 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
            "collective-permute",
            2 * 16 * 4,
        ),
    ],
)
def test_kinds_and_bytes(function, kind, payload):
    """Each collective is found once, with its payload of [16, 16] float32 over 8 devices."""
    found = collectives(text_of(function, (16, 16)))
    assert {c.kind for c in found} == {kind}
    assert sum(c.total_bytes for c in found) == payload


def test_turns_of_loops_multiply():
    """A psum in a scan of 5 within a scan of 7 runs 35 times."""

    def body(carry, _):
        return jax.lax.psum(jnp.sin(carry), "data"), None

    def inner(carry, _):
        return jax.lax.scan(body, carry, length=5)[0], None

    text = text_of(lambda x: jax.lax.scan(inner, x, length=7)[0], (8, 16))
    found = [c for c in collectives(text) if c.kind == "all-reduce"]
    assert sum(c.times for c in found) == 35


def test_a_loop_of_unknown_turns():
    """A while on a value that only the device knows counts as often as it is told to."""

    def loop(x):
        return jax.lax.while_loop(
            lambda c: c.sum() < 100.0, lambda c: jax.lax.psum(jnp.abs(c) + 1, "data"), x
        )

    text = text_of(loop, (8, 16))
    assert sum(c.times for c in collectives(text)) == 1
    assert sum(c.times for c in collectives(text, unknown_trips=9)) == 9


AS_A_TPU_WRITES = """\
%part.1 (p: f32[64,32]) -> f32[64,32] {
  %first = f32[64,32]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}
}
%part.2 (p: f32[64,32]) -> f32[64,32] {
  %second = f32[64,32]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}
}
ENTRY %main.1 (x: bf16[256,1024]) -> bf16[256,1024] {
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={
}}, metadata={op_name="jit(step)"}
  %start = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=39, source_target_pairs={{0,1},{1,0}}
  %done = bf16[256,1024]{1,0} collective-permute-done(%start)
  %began = f32[64,32]{1,0} fusion(%y), kind=kCustom, calls=%part.1
  %went_on = f32[64,32]{1,0} fusion(%began), kind=kCustom, calls=%part.2
  %scattered = f32[64,32]{1,0} reduce-scatter(%y), channel_id=1, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, dimensions={1}
  %alone = f32[8]{0} all-reduce(%z), replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_0'}
}
"""


def test_what_a_tpu_writes():
    """A permute's result without the runtime's scalars; groups by the names of mesh axes; an
    instruction may go on in a line that begins with braces; fusions of
    one channel are one collective."""
    permute, fused, scatter = collectives(AS_A_TPU_WRITES)
    assert (fused.kind, fused.group) == ("reduce-scatter", 4)
    assert (permute.kind, permute.shape) == ("collective-permute", (256, 1024))
    assert permute.total_bytes == 256 * 1024 * 2
    assert (scatter.kind, scatter.group) == ("reduce-scatter", 4)
    assert scatter.total_bytes == 4 * 64 * 32 * 4


def test_nothing_is_sent_by_one_device():
    """A program of one device has no collective."""
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(4)).compile().as_text()) == []


def test_widest_rows():
    """Rows are counted over all leading axes; a vector has none."""
    assert widest_rows("f32[7,3,50]{2,1,0} bf16[20,50] f32[50] f32[50,900]", 50) == 21
    assert widest_rows("f32[7,3,51]", 50) == 0
