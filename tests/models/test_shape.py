"""Layers as repeating blocks: every layer once, in order; stacks that are taken apart and made."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from kdjax.models.parameters import init_params, layer_places, restacked, unstacked
from kdjax.models.shape import FULL, LINEAR, LONGEST_BLOCK, SLIDING, layer_kinds, runs

KINDS = st.tuples(st.sampled_from([FULL, SLIDING, LINEAR]), st.sampled_from([0, 1]))


def of_kinds(kinds):
    """A config of layers (mixer, whether it has rotary positions)."""
    mixers, turned = zip(*kinds, strict=True)
    return tiny_config(
        40, num_hidden_layers=len(mixers), layer_types=tuple(mixers),
        no_rope_layers=tuple(turned), sliding_window=5,
    )  # fmt: skip


@st.composite
def repeating(draw):
    """Kinds of any order, or a block of some that repeats, whole or broken off, between others."""
    block, before = draw(st.lists(KINDS, min_size=1, max_size=9)), draw(st.lists(KINDS, max_size=4))
    length = draw(st.integers(1, 30))
    return (before + block * length)[: len(before) + length] + draw(st.lists(KINDS, max_size=4))


@settings(max_examples=150, deadline=None)
@given(repeating())
def test_runs_are_all_layers_in_order(kinds):
    """The blocks, repeated and laid end to end, are the kinds; each run begins where one ended."""
    config = of_kinds(kinds)
    laid = [kind for run in runs(config) for kind in run.block * run.repeats]
    assert tuple(laid) == layer_kinds(config)
    first = 0
    for run in runs(config):
        assert run.first == first
        assert 1 <= len(run.block) <= LONGEST_BLOCK
        first += run.layers
    assert first == len(kinds)


@settings(max_examples=150, deadline=None)
@given(repeating())
def test_no_split_into_equal_neighbours_compiles_less(kinds):
    """At most a layer for each stretch of equal neighbours."""
    config = of_kinds(kinds)
    found = layer_kinds(config)
    stretches = 1 + sum(one != other for one, other in itertools.pairwise(found))
    assert sum(len(run.block) for run in runs(config)) <= stretches


@pytest.mark.parametrize("size", range(1, LONGEST_BLOCK + 1))
def test_a_repeated_block_is_compiled_once(size):
    """As Gemma 3's, Olmo 3's and Qwen3.5's patterns are, with what is left over behind them."""
    block = [(LINEAR, 1)] * (size - 1) + [(FULL, 1)]
    left = block[: size // 2]
    found = runs(of_kinds(block * 5 + left))
    compiled = sum(len(run.block) for run in found)
    assert compiled <= size + min(1, len(left))
    assert len(found) <= 3


@settings(max_examples=30, deadline=None)
@given(repeating())
def test_places_are_the_layers_in_order(kinds):
    """unstacked gives layer n's parameters as the n-th, restacked makes the stacks again, and both
    agree with layer_places: every place of every stack once."""
    config = of_kinds(kinds)
    layers = [{"own": np.array([n, 0.5])} for n in range(len(kinds))]
    stacks = restacked(layers, config)
    again = unstacked({"layers": stacks})["layers"]
    assert [int(layer["own"][0]) for layer in again] == list(range(len(kinds)))
    places = layer_places(config)
    assert len({*places}) == len(kinds)
    for n, (stack, repeat) in enumerate(places):
        assert stacks[stack]["own"][repeat, 0] == n
    assert sum(stack["own"].shape[0] for stack in stacks.values()) == len(kinds)


def test_fresh_parameters_are_of_each_layers_own_kind():
    """The stacks that `init_params` makes are those of `layer_places`, every layer with the
    parameters of its kind."""
    kinds = [(LINEAR, 1), (SLIDING, 1)] * 2 + [(FULL, 0)]
    config = dataclasses.replace(
        of_kinds(kinds), linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4,
        linear_value_head_dim=4, linear_conv_kernel_dim=2,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))["layers"]
    assert {name: shapes[name]["attention_norm"]["scale"].shape[0] for name in shapes} == {
        "0": 2, "1": 2, "4": 1,
    }  # fmt: skip
    for (mixer, _), place in zip(kinds, layer_places(config), strict=True):
        assert ("conv" in shapes[place.stack]["mixer"]) == (mixer == LINEAR)
