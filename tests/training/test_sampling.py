"""The parameters that samplers read."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models
from kdjax.base import random_key
from kdjax.rollouts import sampler
from kdjax.sharding import make_mesh, replicated
from kdjax.training import evaluation
from kdjax.training.parts import precompute
from kdjax.training.parts.build import asked_of, build
from kdjax.training.parts.precomputed import parse_keep
from kdjax.training.parts.problems import encode
from kdjax.training.parts.sampling import read_by_sampler, shares_memory


@pytest.fixture
def params(student):
    """On the first of eight devices."""
    placed = jax.device_put(student[1], replicated(make_mesh(1)))
    return jax.tree.map(jnp.copy, placed)


def addresses(tree) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_a_cpu_holds_the_weights_once(params):
    """The tables and the first layer of the stack are the memory that was there; a layer of the
    stack is never twice in memory, and the numbers are those of `unstacked`."""
    read = read_by_sampler(params, jnp.float32, make_mesh(1))(params)
    assert addresses(read["embed"]) == addresses(params["embed"])
    (stack,) = params["layers"].values()
    assert addresses(read["layers"][0]) == addresses(stack)
    chex.assert_trees_all_equal(read, models.unstacked(params))


def test_what_a_step_writes_is_not_read(params):
    """Parameters that are donated while the sampler's live: those keep their numbers."""
    wanted = jax.device_get(models.unstacked(params))
    read = read_by_sampler(params, jnp.float32, make_mesh(1))(params)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    moved = jax.block_until_ready(update(params))
    chex.assert_trees_all_equal(jax.device_get(read), wanted)
    assert not {*addresses(moved)} & {*addresses(read)}


def test_what_is_cast_or_sharded_is_copied(params):
    """Only what has the sampler's dtype, on one device, is shared."""
    assert shares_memory(params, jnp.float32, make_mesh(1))
    assert not shares_memory(params, jnp.bfloat16, make_mesh(1))
    assert not shares_memory(params, jnp.float32, make_mesh(2))
    read = read_by_sampler(params, jnp.bfloat16, make_mesh(1))(params)
    assert read["embed"].dtype == jnp.bfloat16


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The rows of every batch that a sampler decodes."""
    rows, made = [], sampler.decoder

    def counted(*args):
        programs = made(*args)

        def decode(params, state, *rest):
            rows.append(len(state.start_b))
            return programs.decode(params, state, *rest)

        return programs._replace(decode=decode)

    monkeypatch.setattr(sampler, "decoder", counted)
    return rows


def test_rows_cost_what_they_are(tiny, tmp_path, decoded):
    """Twenty-four rows on eight devices, three on each: a rollout, an evaluation and stored
    responses decode them as 24, where a power of two would be 32."""
    data = dataclasses.replace(tiny.data, problems=24)
    tested = dataclasses.replace(tiny.evaluation, problems=12, batch_size=32)
    config = dataclasses.replace(tiny, data=data, evaluation=tested, prefix="student")
    parts = build(dataclasses.replace(config, batch_size=24))
    params = parts.sampler_params(parts.student.trained)
    batch = encode(parts.problems.source, parts.tokenizer, np.arange(24), 24, 8)
    parts.responses.draw(params, batch, random_key(0), 8)
    assert decoded[0] == max(decoded) == 24
    decoded.clear()
    evaluation.evaluate_params(parts, parts.student.trained)
    assert decoded[0] == max(decoded) == 24
    decoded.clear()
    for asked in asked_of(parts, "teacher").values():
        precompute.fill(asked, str(tmp_path / "out"), parse_keep(None), (0, 1), False)
    assert decoded[0] == max(decoded) == 24
