"""Every form of attention against float64 NumPy; its memory, its sharding, what `auto` takes."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from release import by_default

from kdjax.errors import ConfigError
from kdjax.models.layers import attention as module
from kdjax.models.layers.attention import QUERY_CHUNK, attention, choose
from kdjax.sharding import BATCH, HEADS, KV_HEADS, make_mesh, spec

HEADS_OF = [(4, 4), (4, 2), (6, 1)]
MIB = 2**20


def random_qkv(length: int, heads=(4, 2), head_dim: int = 16, batch: int = 2, dtype=jnp.float32):
    """(q, k, v), scores of a few units: the softmax has a shape."""
    rng = np.random.default_rng(length)
    sizes = (heads[0], heads[1], heads[1])
    return [jnp.array(1.5 * rng.normal(size=(batch, length, n, head_dim)), dtype) for n in sizes]


def random_segments(length: int, batch: int = 2):
    """Three packed segments a row, of any lengths; ids that come back in no order."""
    cuts = np.sort(np.random.default_rng(length + 1).integers(0, length, (batch, 2)), axis=1)
    slots = np.arange(length)
    return jnp.int32(7 - 3 * (slots >= cuts[:, :1]) + 5 * (slots >= cuts[:, 1:]))


def oracle(q, k, v, segment_ids=None, window=None):
    """A row and a head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, length, heads, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    slots, out = np.arange(length), np.zeros_like(q)
    for b in range(batch):
        seen = slots[None] <= slots[:, None]
        if window is not None:
            seen &= slots[None] > slots[:, None] - window
        if segment_ids is not None:
            own = np.asarray(segment_ids[b])
            seen &= own[None] == own[:, None]
        for h in range(heads):
            scores = q[b, :, h] @ k[b, :, h // group].T / np.sqrt(head_dim)
            weights = np.where(seen, np.exp(scores), 0.0)
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, :, h // group]
    return out


def value_and_gradients(impl: str, q, k, v, segment_ids=None, **options):
    """(attended, gradients of a curved function of it), jitted."""

    @jax.jit
    def run(*qkv):
        def loss(*qkv):
            out = attention(*qkv, segment_ids, impl=impl, **options)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)

    (_, out), gradients = run(q, k, v)
    return out, gradients


@pytest.fixture
def small_chunks(monkeypatch):
    """`chunked` at lengths that a test can afford."""
    monkeypatch.setattr(module, "QUERY_CHUNK", 16)


@pytest.mark.parametrize(
    ("impl", "length"),
    by_default(
        [("xla", 21), ("chunked", 16), ("chunked", 33), ("chunked", 97)],
        *[("xla", 21), ("chunked", 33)],
    ),
)
@pytest.mark.parametrize("window", [None, 1, 10])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("heads", HEADS_OF, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_the_portable_forms_equal_numpy(impl, length, window, segmented, heads):
    """Grouped heads, windows, segments, lengths that are no multiple of a chunk."""
    q, k, v = random_qkv(length, heads, head_dim=8)
    segments = random_segments(length) if segmented else None
    run = jax.jit(functools.partial(attention, impl=impl, window=window))
    expected = oracle(q, k, v, segments, window)
    np.testing.assert_allclose(run(q, k, v, segments), expected, atol=5e-6)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("segmented", [False, True])
def test_splash_equals_numpy(window, segmented):
    """The TPU's kernel, interpreted, over three blocks of 128; its gradients are those of `xla`."""
    q, k, v = random_qkv(384, head_dim=8, batch=1)
    segments = random_segments(384, batch=1) if segmented else None
    out, gradients = value_and_gradients("splash", q, k, v, segments, window=window)
    np.testing.assert_allclose(out, oracle(q, k, v, segments, window), atol=5e-6)
    _, expected = value_and_gradients("xla", q, k, v, segments, window=window)
    chex.assert_trees_all_close(gradients, expected, atol=2e-5)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_of_chunked_are_those_of_xla(window, segmented):
    """A chunk that is recomputed backward, the padded one included, changes no gradient."""
    q, k, v = random_qkv(77)
    segments = random_segments(77) if segmented else None
    _, ours = value_and_gradients("chunked", q, k, v, segments, window=window)
    _, expected = value_and_gradients("xla", q, k, v, segments, window=window)
    chex.assert_trees_all_close(ours, expected, atol=2e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_what_cudnn_is_asked_for(monkeypatch, window):
    """The call that cuDNN gets, answered by jax's own XLA form, equals NumPy in bfloat16."""
    real = jax.nn.dot_product_attention

    def answered(*qkv, implementation, **options):
        assert implementation == "cudnn"
        return real(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)
    q, k, v = random_qkv(24, dtype=jnp.bfloat16)
    ours = attention(q, k, v, impl="cudnn", window=window, platform="gpu")
    np.testing.assert_allclose(
        ours.astype(jnp.float32), oracle(q, k, v, window=window), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize(("impl", "length"), [("xla", 40), ("chunked", 40), ("splash", 128)])
@pytest.mark.usefixtures("small_chunks")
def test_bfloat16_is_near_float64(impl, length):
    """Inputs in bfloat16: the softmax stays float32, so errors are those of rounding (torch's
    tolerance for the type), and so are gradients'."""
    q, k, v = random_qkv(length, dtype=jnp.bfloat16)
    out, gradients = value_and_gradients(impl, q, k, v)
    assert out.dtype == jnp.bfloat16
    near = functools.partial(np.testing.assert_allclose, atol=0.03, rtol=0.016)
    near(out.astype(jnp.float32), oracle(q, k, v))
    _, expected = value_and_gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    for ours, exact in zip(gradients, expected, strict=True):
        scale = jnp.abs(exact).max()
        near(ours.astype(jnp.float32) / scale, exact / scale)


@pytest.mark.parametrize(("impl", "length"), [("xla", 40), ("chunked", 40), ("splash", 256)])
@pytest.mark.usefixtures("small_chunks")
def test_the_future_is_not_seen(impl, length):
    """Other keys and values from half on change no output before, to the bit, and all after."""
    q, k, v = random_qkv(length)
    half = length // 2
    run = jax.jit(functools.partial(attention, impl=impl))
    before, after = run(q, k, v), run(q, k.at[:, half:].add(1.0), v.at[:, half:].add(1.0))
    np.testing.assert_array_equal(before[:, :half], after[:, :half])
    assert (jnp.abs(before[:, half:] - after[:, half:]).max((-2, -1)) > 1e-2).all()


def temporaries(impl: str, length: int) -> float:
    """MiB of temporaries of forward and backward at 4/2 heads of 32; nothing is run."""
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.bfloat16) for heads in (4, 2, 2)]
    program = jax.jit(
        jax.grad(lambda q, k, v: attention(q, k, v, impl=impl).astype(jnp.float32).sum(), (0, 1, 2))
    )
    return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / MIB


def test_chunked_holds_a_chunk_of_scores():
    """At T = 4096 its temporaries are under a quarter of `xla`'s; a prime length costs no more
    than its padding; twice the length, about twice the memory."""
    ours = temporaries("chunked", 4096)
    assert ours < temporaries("xla", 4096) / 4
    assert temporaries("chunked", 4099) < 1.15 * ours
    assert temporaries("chunked", 8192) < 2.2 * ours


MESHES = {"data": (1, 1), "fsdp": (2, 1), "all": (2, 2), "tensor": (1, 4)}
CASES = [("chunked", mesh, heads) for mesh in MESHES for heads in ((8, 4), (8, 2), (3, 1))] + [
    ("splash", mesh, heads) for mesh, heads in (("all", (4, 2)), ("tensor", (8, 2)))
]


def dealt(mesh, q, k, v, segments):
    """The arrays, dealt as the decoder deals them."""
    axes = [(BATCH, None, h, None) for h in (HEADS, KV_HEADS, KV_HEADS)] + [(BATCH, None)]
    return [
        jax.device_put(x, NamedSharding(mesh, spec(mesh, x.shape, a)))
        for x, a in zip((q, k, v, segments), axes, strict=True)
    ]


ENOUGH = [
    ("chunked", "data", (8, 2)), ("chunked", "fsdp", (8, 4)), ("chunked", "all", (8, 2)),
    ("chunked", "tensor", (8, 2)), ("chunked", "tensor", (3, 1)), ("splash", "all", (4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("impl", "mesh", "heads"), by_default(CASES, *ENOUGH), ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_a_mesh_changes_nothing(impl, mesh, heads):
    """Values and gradients on 8 devices are those on one, where key heads are fewer than devices
    too (and where heads can't be dealt at all); where they can, nothing is gathered."""
    fsdp, tensor = MESHES[mesh]
    mesh = make_mesh(8, fsdp=fsdp, tensor=tensor)
    length = 128 if impl == "splash" else 40
    q, k, v = random_qkv(length, heads, head_dim=8, batch=8)
    segments = random_segments(length, batch=8)

    def loss(q, k, v, segments, mesh):
        return jnp.sum(jnp.sin(attention(q, k, v, segments, impl=impl, mesh=mesh)))

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    program = jax.jit(functools.partial(gradient, mesh=mesh)).lower(*dealt(mesh, q, k, v, segments))
    compiled = program.compile()
    chex.assert_trees_all_close(
        compiled(*dealt(mesh, q, k, v, segments)),
        jax.jit(functools.partial(gradient, mesh=None))(q, k, v, segments),
        rtol=1e-5,
        atol=2e-5,
    )
    if heads[1] % tensor == 0:
        assert "all-gather" not in compiled.as_text()


def test_one_trace_a_shape():
    """Other values of the same shapes are the same program."""
    q, k, v = random_qkv(20)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(q, k, v):
        return attention(q, k, v, impl="auto")

    for scale in (1.0, 2.0):
        run(scale * q, k, v)


LONG = QUERY_CHUNK * 8
BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        (("cpu", 128, 128, F32, False), "xla"),
        (("gpu", QUERY_CHUNK, 128, BF16, False), "xla"),
        (("tpu", QUERY_CHUNK, 128, BF16, False), "xla"),
        (("cpu", LONG, 128, F32, False), "chunked"),
        (("gpu", LONG, 128, BF16, False), "cudnn"),
        (("cuda", LONG, 64, jnp.float16, False), "cudnn"),
        (("gpu", LONG, 128, BF16, True), "chunked"),
        (("gpu", LONG, 128, F32, False), "chunked"),
        (("gpu", LONG, 100, BF16, False), "chunked"),
        (("gpu", LONG, 256, BF16, False), "chunked"),
        (("tpu", LONG, 128, BF16, False), "splash"),
        (("tpu", LONG, 64, F32, True), "splash"),
        (("tpu", LONG + 1, 128, BF16, False), "chunked"),
        (("elsewhere", LONG, 128, BF16, False), "chunked"),
    ],
    ids=str,
)
def test_choices(row, chosen):
    """What `auto` takes by platform, length, head, type and segments."""
    assert choose(*row) == chosen


def test_auto_takes_what_is_chosen_and_says_it_once(monkeypatch, capsys):
    """The platform that is given decides, whatever runs here; each choice is announced once."""
    taken = []
    monkeypatch.setattr(module, "sharded_kernel", lambda name, q, *rest: taken.append(name) or q)
    module.announce.cache_clear()
    q, k, v = random_qkv(1024, head_dim=8, batch=1, dtype=BF16)
    for platform in ("tpu", "gpu", "tpu"):
        attention(q, k, v, impl="auto", platform=platform)
    assert taken == ["splash", "cudnn", "splash"]
    attention(q[:, :8], k[:, :8], v[:, :8], impl="auto")
    said = capsys.readouterr().out.splitlines()
    assert said == ["attention: splash on tpu", "attention: cudnn on gpu", "attention: xla on cpu"]


@pytest.mark.parametrize(
    ("impl", "platform", "changes", "says"),
    [
        ("flash", "cpu", {}, r"unknown impl 'flash'; there are \['auto', 'xla', 'chunked'"),
        ("cudnn", "cpu", {}, "'cudnn' runs on NVIDIA GPUs, not on cpu; take impl 'chunked'"),
        ("cudnn", "gpu", {"segmented": True}, "takes no segment ids"),
        ("cudnn", "gpu", {"dtype": F32}, "bfloat16 or float16, not in float32"),
        ("cudnn", "gpu", {"head_dim": 12}, "a multiple of 8 up to 128, not of 12"),
        ("cudnn", "gpu", {"head_dim": 136}, "a multiple of 8 up to 128, not of 136"),
        ("cudnn", "gpu", {}, "needs cuDNN on this machine.*take impl 'chunked'"),
        ("splash", "gpu", {}, "runs on TPUs .*, not on gpu"),
        ("splash", "tpu", {"length": 200}, "lengths of a multiple of 128, not 200"),
        ("splash", "tpu", {"dtype": jnp.float16}, "bfloat16 or float32, not in float16"),
    ],
)
def test_what_a_kernel_refuses(impl, platform, changes, says):
    """A ConfigError of one line with the reason and the remedy, before jax raises its own."""
    segmented = changes.pop("segmented", False)
    changes = {"length": 128, "head_dim": 16, "dtype": BF16} | changes
    q, k, v = random_qkv(**changes)
    segments = random_segments(changes["length"]) if segmented else None
    with pytest.raises(ConfigError, match=says) as caught:
        attention(q, k, v, segments, impl=impl, platform=platform)
    assert "\n" not in str(caught.value)
