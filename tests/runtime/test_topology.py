"""Programs compiled for devices that are not here: what they would hold and send."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from kdjax.bench.head import HeadBench, bench_head
from kdjax.errors import ConfigError
from kdjax.models import abstract_params, unstacked
from kdjax.models.decoder import build
from kdjax.models.known import KNOWN
from kdjax.models.layers.attention import attention
from kdjax.plan.hlo import collectives, widest_rows
from kdjax.plan.plan import plan
from kdjax.rollouts.decoding import decoder
from kdjax.runtime import topology
from kdjax.sharding import make_mesh, replicated

ROOT = Path(__file__).parents[2]
HERE = {"h100": "jax_plugins.xla_cuda13", "v5e:2x2": "libtpu"}
TPUS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
REASON = "its compiler is not installed: launch/aot.sh installs it and runs this"


def installed(target: str) -> bool:
    """Whether its compiler is; launch/aot.sh has just installed all, and leaves none out."""
    if os.environ.get("KDJAX_AOT") == "true":
        return True
    try:
        return importlib.util.find_spec(HERE.get(target, "libtpu")) is not None
    except ModuleNotFoundError:
        return False


PRESET = runpy.run_path(str(ROOT / "configs/paper/qwen3_4b_to_06b.py"))["get_config"]()
PAIRS = {
    "Qwen3": (PRESET.student, PRESET.teacher),
    "Qwen3.5": ("Qwen/Qwen3.5-0.8B-Base", "Qwen/Qwen3.5-4B"),
    "Gemma 3": ("google/gemma-3-1b-pt", "google/gemma-3-4b-it"),
}
PLANS = [("h100", "Qwen3"), *(("v5e:4x4", pair) for pair in PAIRS)]

compiled_for = pytest.mark.parametrize(
    "target",
    [
        pytest.param(t, marks=pytest.mark.skipif(not installed(t), reason=f"{t}: {REASON}"))
        for t in HERE
    ],
)


def test_here_are_the_devices():
    """`here` is this process's devices."""
    assert topology.devices("here") == jax.devices()


@pytest.mark.parametrize("target", ["v9z:2x2", "cray"])
def test_an_unknown_target(target):
    """A target that no compiler knows is one line that lists those there are."""
    with pytest.raises(
        ConfigError, match=rf"can't compile for {target}.*kdjax\[aot\].*h100"
    ) as caught:
        topology.devices(target)
    assert "\n" not in str(caught.value)


@compiled_for
def test_the_loss_head_fits(target):
    """0.6B student, 4B teacher, 16,384 tokens: temporaries of the pass are within reach."""
    sizes = HeadBench(skip=("exact", "precision", "time"), targets=(target,))
    ours, naive = bench_head(sizes)
    assert ours.met, ours
    assert naive.value is None or naive.value > 8 * ours.value


@compiled_for
def test_memory_grows_by_the_gradient_of_hidden_states_alone(target):
    """16,384 more tokens add their dH (twice: packed and in place) and numbers a token, no more."""
    small, large = (
        next(
            bench_head(
                HeadBench(
                    skip=("exact", "precision", "time"), targets=(target,), memory_tokens=tokens
                )
            )
        ).value
        for tokens in (16_384, 32_768)
    )
    hidden = 16_384 * 1024 * 2 / 2**30
    assert large - small < 3 * hidden + 0.01


def attention_gib(target: str, impl: str, window: int | None, heads=(16, 8, 128)) -> float:
    """GiB of temporaries of attention and its gradients: 2 rows of 4,096, bfloat16; heads: of
    queries, of keys, their dimension."""
    mesh = make_mesh(topology.devices(target)[:1])
    queries, keys, head_dim = heads
    shapes = [
        jax.ShapeDtypeStruct((2, 4096, count, head_dim), jnp.bfloat16, sharding=replicated(mesh))
        for count in (queries, keys, keys)
    ]

    def loss(q, k, v):
        return attention(q, k, v, impl=impl, window=window, mesh=mesh).astype(jnp.float32).sum()

    with topology.uncached():
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**30


@pytest.mark.parametrize(
    ("window", "heads"),
    [(None, (16, 8, 128)), (1024, (16, 8, 128)), (None, (8, 2, 256)), (512, (4, 1, 256))],
)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(t, marks=pytest.mark.skipif(not installed(t), reason=f"{t}: {REASON}"))
        for t in TPUS
    ],
)
def test_auto_is_splash_on_a_tpu_and_fits(target, window, heads):
    """The kernel and its gradients compile, in no more than the recomputed chunks would hold: heads
    of Qwen3, Qwen3.5-0.8B and Gemma 3 1B."""
    assert attention_gib(target, "auto", window, heads) < 0.40


@compiled_for
def test_chunked_attention_fits(target):
    """What runs anywhere compiles there, and holds a chunk of scores, not all (4 GiB)."""
    assert attention_gib(target, "chunked", None) < 1.0


@pytest.mark.skipif(not installed("h100"), reason=f"h100: {REASON}")
def test_cudnn_has_to_be_here_to_compile_for_it(monkeypatch):
    """jax asks this machine for cuDNN while it traces: without it, one line with the remedy."""
    from jax._src.cudnn import fused_attention_stablehlo

    def absent():
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", absent)
    with pytest.raises(ConfigError, match=r"needs cuDNN.*not found.*take impl 'chunked'"):
        attention_gib("h100", "auto", None)


@pytest.mark.parametrize(
    ("target", "kv_cache", "rows"),
    [
        pytest.param(*case, marks=pytest.mark.skipif(not installed(case[0]), reason=REASON))
        for case in (("h100", "compute", 128), ("h100", "int8", 128), ("v5e:2x2", "compute", 64))
    ],
)
def test_decoding_writes_its_cache_in_place(target, kv_cache, rows):
    """Qwen3-0.6B, a window of 1,024, the paper's cuts: temporaries at most 5 % of the cache, no
    copy of any of it, all of it given on."""
    here = SingleDeviceSharding(topology.devices(target)[0])
    config = KNOWN[PRESET.student].config
    model = build(config, jnp.bfloat16, impl="chunked", kv_cache=kv_cache)

    def there(shapes):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)

    params = there(jax.eval_shape(unstacked, abstract_params(config, jnp.bfloat16)))
    programs = decoder(model, PRESET.sampling, 151_669)
    state = there(jax.eval_shape(lambda p: programs.empty(p, rows, 1024), params))
    key, number = there(jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0))))
    with topology.uncached():
        compiled = programs.decode.lower(params, state, key, number, number, 64).compile()
    leaves = jax.tree.leaves(state.cache)
    cache = sum(x.size * x.dtype.itemsize for x in leaves)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * cache
    assert memory.alias_size_in_bytes >= cache
    size = ",".join(map(str, leaves[0].shape))
    assert not re.findall(rf"\[{size}\]\S* copy\(", compiled.as_text())


@pytest.mark.parametrize(
    ("target", "pair"),
    [
        pytest.param(
            *case,
            marks=[pytest.mark.skipif(not installed(case[0]), reason=REASON)]
            + [pytest.mark.release] * (case[1] != "Qwen3"),
        )
        for case in PLANS
    ],
)
def test_a_pair_at_the_paper_s_settings_fits(target, pair):
    """At 1,024 + 4,096 tokens it compiles and fits; no device holds its tokens times the
    vocabulary; what is gathered is a layer's weights, or a table's. Qwen3.5's and Gemma's compile
    for minutes of ten and more: with --all."""
    student, teacher = PAIRS[pair]
    config = dataclasses.replace(PRESET, student=student, teacher=teacher)
    if target != "h100":  # the step alone: the rollout's program takes as long to compile again
        config = dataclasses.replace(config, prefix="dataset")
    made = plan(config, target)
    assert made.fits, made.total_gib("step")
    tables = {KNOWN[name].config.vocab_size for name in (student, teacher)}
    tokens = min(KNOWN[name].tokens for name in (student, teacher))
    assert widest_rows(made.step_text, tokens) > 0
    for columns in {tokens, *tables}:
        most = max(made.head_chunk, 2560) if columns in tables else made.head_chunk
        assert widest_rows(made.step_text, columns) <= most  # a table, turned
    shapes = [
        leaf.shape
        for name in (student, teacher)
        for leaf in jax.tree.leaves(abstract_params(KNOWN[name].config, jnp.bfloat16))
    ]
    weights = {frozenset(shape[-2:]) for shape in shapes}
    for collective in collectives(made.step_text):
        if collective.kind == "all-gather" and collective.payload_bytes > 2**20:
            assert frozenset(collective.shape[-2:]) in weights, collective
