"""What depth and remat cost: programs don't grow with layers, and remat trades memory alone."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest
from release import by_default
from shapes import SHAPES
from tiny import lively, tiny_config

from kdjax.models.decoder import REMAT, build
from kdjax.models.parameters import init_params
from kdjax.models.shape import FULL, LINEAR, SLIDING, runs

V = 40


def gradient_program(config, remat: str, impl: str = "xla"):
    """(jitted gradient of a function of all hidden states, shapes of the parameters)."""
    model = build(config, remat=remat, impl=impl)

    def loss(params, tokens):
        return jnp.sum(jnp.sin(model.hidden(params, tokens)))

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.jit(jax.grad(loss)), shapes


def compiled(config, remat: str, rows: int, length: int, impl: str = "xla"):
    program, shapes = gradient_program(config, remat, impl)
    return program.lower(shapes, jax.ShapeDtypeStruct((rows, length), jnp.int32)).compile()


def instructions(config, remat: str) -> int:
    """Of the compiled gradient."""
    return compiled(config, remat, rows=2, length=8).as_text().count(" = ")


@pytest.mark.parametrize("remat", REMAT)
def test_programs_do_not_grow_with_depth(remat):
    """28 layers make a program of at most 1.3 times the instructions of 8, backward pass too.

    Not of 4: without remat those are one round, whose loop XLA takes away (28 then make 1.57 times
    as many instructions).
    """
    few, many = (
        instructions(tiny_config(V, num_hidden_layers=layers), remat) for layers in (8, 28)
    )
    assert 0.5 * few < many < 1.3 * few


BLOCKS = {  # (a family's shape, what repeats, layers of a few blocks and of many)
    "smollm3": ("smollm3, every fourth without rope, biases", (FULL,) * 4, 8, 36),
    "olmo3": ("olmo3, three windows and a full layer, yarn", (SLIDING,) * 3 + (FULL,), 8, 28),
    "gemma3_text": ("gemma3, five windows and a full layer", (SLIDING,) * 5 + (FULL,), 18, 36),
    "qwen3_5_text": (
        "qwen3_5, three delta-nets and a gated full layer", (LINEAR,) * 3 + (FULL,), 8, 28,
    ),
}  # fmt: skip


@pytest.mark.parametrize("remat", by_default(REMAT, "full"))
@pytest.mark.parametrize("family", by_default(BLOCKS, "gemma3_text", "qwen3_5_text"))
def test_blocks_do_not_grow_with_depth(family, remat):
    """28 or 36 layers make a program of at most 1.3 times the instructions of two or three
    blocks: the layers of one block are compiled, however many there are."""
    name, block, *depths = BLOCKS[family]
    sizes = []
    for layers in depths:
        changes = {"num_hidden_layers": layers, "layer_types": block * (layers // len(block))}
        if family == "smollm3":
            changes["no_rope_layers"] = (1, 1, 1, 0) * (layers // 4)
        config = tiny_config(V, **{**SHAPES[name], **changes})
        assert [(len(run.block), run.repeats) for run in runs(config)] == [
            (len(block), layers // len(block))
        ]
        sizes.append(instructions(config, remat))
    assert 0.5 * sizes[0] < sizes[1] < 1.3 * sizes[0]


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_remat_saves_memory(impl):
    """Temporaries of the gradient: the layer's input alone < its products < everything."""
    config = tiny_config(V, num_hidden_layers=8, hidden_size=32, intermediate_size=128)
    full, dots, none = (
        compiled(config, remat, rows=2, length=1024, impl=impl).memory_analysis().temp_size_in_bytes
        for remat in ("full", "dots", "none")
    )
    assert full < 0.9 * dots
    assert dots < 0.9 * none


def test_no_depth_copies_the_weights():
    """A forward pass of 28, 29 or 30 layers keeps beside them a quarter of what they weigh, at
    most: no part of a stack is cut off first."""

    def temporaries(layers: int) -> tuple[int, int]:
        config = tiny_config(V, num_hidden_layers=layers, hidden_size=64, intermediate_size=256)
        shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        program = jax.jit(build(config).hidden).lower(
            shapes, jax.ShapeDtypeStruct((1, 4), jnp.int32)
        )
        memory = program.compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.argument_size_in_bytes

    for layers in (28, 30, 29):
        beside, weights = temporaries(layers)
        assert beside < 0.25 * weights, layers


def test_remat_changes_no_gradient():
    """What is computed again is computed the same."""
    config = tiny_config(V, num_hidden_layers=3)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, V)
    gradients = []
    for remat in REMAT:
        program, shapes = gradient_program(config, remat)
        gradients.append(program(lively(shapes), tokens))
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients[0]))
    for other in gradients[1:]:
        chex.assert_trees_all_close(gradients[0], other, rtol=1e-5, atol=1e-6 * scale)
