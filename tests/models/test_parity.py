"""Parity with transformers (and peft) in torch: logits, greedy generation, gradients of losses."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from float64 import float64_logits
from release import by_default
from runs import assert_bitwise_equal
from shapes import OF_EACH_FAMILY, SHAPES
from tiny import lively, random_rollout, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdjax import models
from kdjax.base import Batch, Sampling
from kdjax.config import Lora, Optimizer
from kdjax.export import export, export_adapter
from kdjax.losses.kl import forward_kl
from kdjax.losses.objectives import negative_log_likelihood
from kdjax.losses.reductions import token_mean
from kdjax.models.hf.tensors import tensors
from kdjax.models.shape import LINEAR, layer_kinds
from kdjax.numerics import project
from kdjax.rollouts.sampler import generate
from kdjax.step.score import scored_loss
from kdjax.training.loop import train

V = 279
PROMPTS, RESPONSES = [5, 9, 7], [11, 6, 8]


@pytest.fixture(scope="module", params=by_default(SHAPES, *OF_EACH_FAMILY))
def pair(request, tmp_path_factory, tokenizer_folder):
    """((Model, params) in JAX, the same folder in torch), weights random and large."""
    return load_pair(tmp_path_factory.mktemp("pair"), tokenizer_folder, SHAPES[request.param], 0)


def load_pair(folder, tokenizer_folder, changes, seed):
    config = tiny_config(V, **changes)
    models.create(folder / "fresh", config, tokenizer_folder, seed=seed)
    path = folder / "fresh" / "config.json"  # SmolLM3's own default is beyond the vocabulary
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 0}))
    _, params = models.load(folder / "fresh")
    params = lively(params, seed, config.unit_offset)
    models.write_folder(folder / "lively", params, folder / "fresh")
    return models.load(folder / "lively"), load_torch(folder / "lively")


def load_torch(folder):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def logits(model, params, tokens) -> jax.Array:
    return jax.jit(lambda p, ids: project(model.hidden(p, ids), model.head(p)))(params, tokens)


def torch_logp(model, rollout):
    """Log-probabilities of all entries at each response token, row after row, unpadded."""
    rows = []
    for tokens, prompt, response in zip(
        rollout.tokens_bs, rollout.prompt_length_b, rollout.response_length_b, strict=True
    ):
        ids = torch.tensor(tokens[None, : prompt + response].astype(np.int64))
        logits = model(ids, use_cache=False).logits[0]
        rows.append(torch.log_softmax(logits[prompt - 1 : prompt + response - 1], dim=-1))
    return torch.cat(rows)


def targets(rollout) -> torch.Tensor:
    """The response tokens, in the order of `torch_logp`."""
    rows = zip(rollout.tokens_bs, rollout.prompt_length_b, rollout.response_length_b, strict=True)
    return torch.tensor(np.concatenate([ids[p : p + r] for ids, p, r in rows]).astype(np.int64))


def assert_gradients_agree(gradients, config, model):
    """Every parameter's gradient, by its checkpoint name, within 1e-3 of its own norm.

    Where keys are not rotated, their bias shifts all scores of a query alike: its gradient is 0.
    """
    zeros = {
        f"model.layers.{layer}.self_attn.k_proj.bias"
        for layer, kind in enumerate(layer_kinds(config))
        if kind.mixer != LINEAR and kind.rope is None
    }
    ours = {name: at(gradients, place) for name, place in tensors(config).items()}
    theirs = dict(by_checkpoint_name(model))
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        size = np.linalg.norm(gradient)
        assert size > 0 or "experts" in name  # an expert that no token chose
        error = np.linalg.norm(ours[name] - gradient)
        assert error <= (1e-6 if name in zeros else 1e-3 * size), f"{name}: {error} of {size}"


def at(params, place) -> np.ndarray:
    """The tensor at a place of the parameters, as it lies in a checkpoint."""
    for key in place.path:
        params = params[key]
    weight = np.asarray(params[place.at] if place.at else params)
    return weight.T if place.turned else weight


def by_checkpoint_name(model):
    """(name, gradient) of torch parameters; transformers keeps experts stacked, files do not."""
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = np.split(both, 2)
                yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        else:
            yield name, gradient


def test_logits(pair):
    """float32 logits, spread over a few units, equal those of transformers' class within 1e-4."""
    (model, params), reference = pair
    tokens = np.random.default_rng(0).integers(0, V, (3, 24))
    found = logits(model, params, tokens)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    assert 1 < expected.std() < 10
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_float32_is_as_near_float64_as_torch(pair):
    """Where both float32 differ, neither is wrong: ours is at most 1.5 times as far from float64 as
    that of transformers, on average."""
    (model, params), reference = pair
    tokens = np.random.default_rng(0).integers(0, V, (3, 24))
    exact = float64_logits(reference, tokens)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    ours, allowed = (
        np.sqrt(np.mean((x - exact) ** 2))
        for x in (np.asarray(logits(model, params, tokens)), theirs)
    )
    assert exact.dtype == np.float64
    assert 0 < ours <= 1.5 * allowed


def test_bfloat16_logits(pair):
    """Weights and computation in bfloat16: no further from float32 than torch's own bfloat16."""
    (model, params), reference = pair
    tokens = np.random.default_rng(5).integers(0, V, (8, 32))
    narrow = models.build(model.config, jnp.bfloat16)
    halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    ours = jax.jit(lambda p, ids: project(narrow.hidden(p, ids), narrow.head(p)))(halves, tokens)
    with torch.no_grad():
        exact = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
        half = copy.deepcopy(reference).to(torch.bfloat16)
        theirs = half(torch.tensor(tokens), use_cache=False).logits.float().numpy()
    # the median token: with experts, rounding turns a few tokens' choice, there as here
    error, allowed = (
        np.median(np.sqrt(np.mean((x - exact) ** 2, axis=-1))) for x in (np.asarray(ours), theirs)
    )
    assert allowed > 1e-3
    assert error <= 1.1 * allowed


def test_greedy_generation(pair):
    """At temperature 0 the same tokens as transformers' generate: 72, or until the same stop id.

    Rows that continue are prefilled again after 64, the end of the sampler's first level. Prompts
    are of 4 to 9 tokens, windows of 4 to 6: within a prompt, or first crossed while decoding.
    """
    (model, params), reference = pair
    rng = np.random.default_rng(1)
    lengths, width = np.array([4, 9, 6, 9]), 9
    prompts = [rng.integers(0, V - 5, n) for n in lengths]
    right, left = np.zeros((4, width), np.int32), np.zeros((4, width), np.int64)
    for row, ids in enumerate(prompts):
        right[row, : len(ids)] = left[row, width - len(ids) :] = ids
    stop_ids, limit = [11, 200], 72
    none = np.zeros((4, 1), np.int32)
    batch = Batch(right, lengths.astype(np.int32), none, none[:, 0], none[:, 0] > 0, np.arange(4))
    samples = generate(
        model, params, batch, jax.random.key(0), max_new_tokens=limit, stop_ids=stop_ids,
        sampling=Sampling(0.0),
    )  # fmt: skip
    with torch.no_grad():
        whole = reference.generate(
            torch.tensor(left),
            attention_mask=torch.tensor(np.arange(width)[None] >= width - lengths[:, None]).long(),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=stop_ids,
            pad_token_id=0,
        ).numpy()
    for row, response in enumerate(whole[:, width:]):
        ends = np.flatnonzero(np.isin(response, stop_ids))
        length = ends[0] + 1 if len(ends) else limit
        assert samples.length_b[row] == length
        assert samples.tokens_bt[row, :length].tolist() == response[:length].tolist()
        assert bool(samples.truncated_b[row]) == (len(ends) == 0)
    assert len(np.unique(samples.tokens_bt)) > 3
    assert samples.truncated_b.any()


def test_gradient_of_the_negative_log_likelihood(pair):
    """The gradient of the mean -log q(token) over response tokens, every parameter within 1e-3."""
    (model, params), reference = pair
    rollout = random_rollout(2, V, PROMPTS, RESPONSES)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return scored_loss(
            model, params, None, None, rollout,
            objective=negative_log_likelihood, reduction=token_mean,
        )[0].mean()  # fmt: skip

    value, gradients = loss(params)
    reference.zero_grad()
    expected = torch.nn.functional.nll_loss(torch_logp(reference, rollout), targets(rollout))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_gradients_agree(gradients, model.config, reference)


def test_gradient_of_the_forward_kl(tmp_path, tokenizer_folder):
    """The token mean of KL(teacher || student) and its gradient equal those by torch's kl_div."""
    (student, params), student_torch = load_pair(tmp_path / "s", tokenizer_folder, {}, 1)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "tie_word_embeddings": False}
    (teacher, teacher_params), teacher_torch = load_pair(tmp_path / "t", tokenizer_folder, shape, 2)
    rollout = random_rollout(3, V, PROMPTS, RESPONSES)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return scored_loss(
            student, params, teacher, teacher_params, rollout,
            token_loss=forward_kl, reduction=token_mean,
        )[0].mean()  # fmt: skip

    value, gradients = loss(params)
    with torch.no_grad():
        teacher_logp = torch_logp(teacher_torch, rollout)
    student_logp = torch_logp(student_torch, rollout)
    expected = torch.nn.functional.kl_div(
        student_logp, teacher_logp, log_target=True, reduction="batchmean"
    )
    expected.backward()
    assert expected.item() > 1
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_gradients_agree(gradients, student.config, student_torch)


def test_shards_of_transformers_are_read(pair, tmp_path):
    """A folder that transformers saved in small shards holds our parameters, to the bit."""
    (model, params), reference = pair
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=12_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    again, loaded = models.load(tmp_path / "theirs")
    assert_bitwise_equal(loaded, params)
    tokens = np.random.default_rng(5).integers(0, V, (2, 16))
    np.testing.assert_array_equal(logits(again, loaded, tokens), logits(model, params, tokens))


def test_shards_are_read_by_transformers(pair, tmp_path):
    """Our export in small shards gives transformers the logits that the single file gave it."""
    (_, params), reference = pair
    reference.config.save_pretrained(tmp_path / "source")
    models.write_folder(tmp_path / "ours", params, tmp_path / "source", shard_bytes=12_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    tokens = torch.tensor(np.random.default_rng(6).integers(0, V, (2, 16)))
    with torch.no_grad():
        again = load_torch(tmp_path / "ours")(tokens, use_cache=False).logits
        assert torch.equal(again, reference(tokens, use_cache=False).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_by_transformers(tmp_path, pair_of_saved, tied):
    """A folder that transformers saved loads here, with the same logits."""
    folder, reference = pair_of_saved(tmp_path / "saved", tied)
    assert_same_logits(folder, reference)


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_without_optional_keys(tmp_path, pair_of_saved, tied):
    """Keys that config.json leaves out mean here what they mean to transformers."""
    folder, _ = pair_of_saved(tmp_path / "saved", tied)
    fields = json.loads((folder / "config.json").read_text())
    optional = ["rms_norm_eps", "rope_parameters", "max_position_embeddings", "hidden_act"]
    for name in [*optional, *([] if tied else ["tie_word_embeddings"])]:
        del fields[name]
    (folder / "config.json").write_text(json.dumps(fields))
    assert_same_logits(folder, load_torch(folder))


@pytest.fixture
def pair_of_saved():
    """save(folder, tied): a random Qwen3 of transformers' own making, written by transformers."""

    def save(folder, tied: bool):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
            initializer_range=0.4,
        )  # fmt: skip
        torch.manual_seed(0)
        reference = Qwen3ForCausalLM(config).eval()
        reference.save_pretrained(folder)
        return folder, reference

    return save


def assert_same_logits(folder, reference):
    model, params = models.load(folder)
    tokens = np.random.default_rng(4).integers(0, V, (2, 16))
    found = logits(model, params, tokens)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


def test_an_exported_run_is_the_trained_student(tiny, tmp_path):
    """Trained, exported, loaded by transformers: the trained logits, and kdjax's greedy tokens."""
    train(dataclasses.replace(tiny, optimizer=Optimizer(learning_rate=0.05), steps=2))
    export(tiny.run, tmp_path / "out")
    (model, params), reference = models.load(tmp_path / "out"), load_torch(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "7+5="}]
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = np.array([tokenizer.encode(text)], np.int32)
    none = np.zeros((1, 1), np.int32)
    length = np.array([ids.shape[1]], np.int32)
    batch = Batch(ids, length, none, none[:, 0], none[:, 0] > 0, none[:, 0])
    stop_ids = reference.generation_config.eos_token_id
    drawn = generate(
        model, params, batch, jax.random.key(0), max_new_tokens=16, stop_ids=stop_ids,
        sampling=Sampling(0.0),
    )  # fmt: skip
    with torch.no_grad():
        start = load_torch(tiny.student)(torch.tensor(ids)).logits
        assert (reference(torch.tensor(ids)).logits - start).abs().max() > 1e-2
        whole = reference.generate(torch.tensor(ids), max_new_tokens=16, do_sample=False)
    response = whole[0, ids.shape[1] :].numpy()
    assert drawn.tokens_bt[0, : len(response)].tolist() == response.tolist()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft itself
def test_an_exported_adapter_is_the_trained_student(tiny, tmp_path):
    """peft on the base with the adapter's folder, and transformers on the merged one, have the
    logits of kdjax, far from the base's."""
    from peft import AutoPeftModelForCausalLM

    lora = Lora(rank=2, alpha=4.0, targets=("q_proj", "o_proj", "down_proj"))
    train(dataclasses.replace(tiny, lora=lora, optimizer=Optimizer(learning_rate=0.1)))
    export(tiny.run, tmp_path / "merged")
    export_adapter(tiny.run, tmp_path / "adapter")
    model, params = models.load(tmp_path / "merged")
    tokens = np.random.default_rng(4).integers(0, V, (2, 16))
    logits = jax.jit(lambda p, ids: project(model.hidden(p, ids), model.head(p)))(params, tokens)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    with torch.no_grad():
        of_peft, of_merged, of_base = (
            reference(torch.tensor(tokens), use_cache=False).logits.numpy()
            for reference in (
                adapted.eval(),
                load_torch(tmp_path / "merged"),
                load_torch(tiny.student),
            )
        )
    assert np.abs(of_base - of_merged).max() > 0.05
    np.testing.assert_allclose(logits, of_merged, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(logits, of_peft, atol=1e-4, rtol=1e-5)
