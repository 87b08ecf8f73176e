"""The nouns of the project, and the types of the functions that connect them.

Axes, wherever a name carries them:

    b  sequences of a batch        t  response positions (t = 0 is the first response token)
    s  all positions of a row      v  vocabulary entries
    d  hidden width                p  prompt positions

The flow of one step:

    Batch -> Rollout -> Scores [B, T] -> objective [B, T] -> reduce (total, weight) -> TrainState
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.errors import ConfigError
from kdjax.numerics import LMHead

Array = jax.Array | np.ndarray  # on a device, or still on the host
Params = Any  # a nested dict of arrays
Key = jax.Array


KEYS = "threefry2x32"
"""The kind of every random key. JAX's default is set by JAX_DEFAULT_PRNG_IMPL; under vmap, the
numbers of another kind (rbg) depend on the first key of the batch alone."""


def random_key(seed: int) -> Key:
    """A key of the kind that rows are drawn with, whatever JAX's default is.

    >>> str(jax.random.key_impl(random_key(0)))
    'threefry2x32'
    """
    return jax.random.key(seed, impl=KEYS)


def check_key(key: Key) -> None:
    """Errors: ConfigError for a key of another kind, with which a row's draw would depend on its
    batch."""
    if (kind := str(jax.random.key_impl(key))) != KEYS:
        raise ConfigError(
            f"a key is of kind {kind}, with which a row's draw depends on its batch; make it by"
            f" kdjax.base.random_key(seed), or jax.random.key(seed, impl={KEYS!r})"
        )


class Problem(NamedTuple):
    """One question with its gold answer; `solution` is a worked response, if the source has one.

    tag is that of its teacher, where there are several. teacher_prompt: what only a teacher is
    told (feedback, documents, another wording), if the source has it.
    """

    id: str
    prompt: str
    answer: str
    solution: str | None = None
    tag: str = ""
    teacher_prompt: str | None = None


class Batch(NamedTuple):
    """The prompts of one step, and their worked responses where the dataset has them.

    prompt_bp:        int32, right-padded token ids of the rendered prompt.
    prompt_length_b:  int32, tokens of each prompt.
    response_bt:      int32, right-padded worked response with its stop token, if there is one.
    response_length_b:     int32, 0 where there is none.
    response_truncated_b:  bool, the worked response was longer than response_bt and cut.
    row_b:            int32, the row's number, of its problem or sample; it seeds the row's draw.
    teacher_prompts:  (prompt_bp, prompt_length_b) of the prompts that the teacher reads, where
                      these are others.
    """

    prompt_bp: Array
    prompt_length_b: Array
    response_bt: Array
    response_length_b: Array
    response_truncated_b: Array
    row_b: Array
    teacher_prompts: tuple[Array, Array] | None = None

    def of_teacher(self) -> Batch:
        """The batch with the prompts that the teacher reads in place of the student's."""
        prompts, lengths = self.teacher_prompts or (self.prompt_bp, self.prompt_length_b)
        return self._replace(prompt_bp=prompts, prompt_length_b=lengths)


class TopK(NamedTuple):
    """A teacher's distribution by its k most probable tokens (kdjax/losses/topk.py).

    ids:        int [..., k], distinct.
    logp:       [..., k], their log-probabilities over the full vocabulary.
    tail_logp:  [...], the log-probability of all other tokens together.
    sampled_logp:  [...], that of the response token, where it is known.

    The tail is stored, since 1 - sum exp(logp) is only rounding where a teacher is sure. Merging
    tokens never raises a divergence: KLs between the k + 1 buckets are at most those over the
    vocabulary, and equal at k = V.
    """

    ids: jax.Array
    logp: jax.Array
    tail_logp: jax.Array
    sampled_logp: jax.Array | None = None


class TeacherRows(NamedTuple):
    """What the teacher reads where that is not the student's row: another prompt before the same
    response, or the response in tokens of its own.

    tokens_bs:  int32 [B, S'], right-padded.
    slot_bt:    int32 [B, T], the slot in its row whose next token it must predict where the student
                predicts response token t; -1 where there is none, and t is then not trained on.
    """

    tokens_bs: Array
    slot_bt: Array


class Rollout(NamedTuple):
    """Prefixes to train on: each row of `tokens_bs` is prompt, response, padding, without a gap.

    sampler_logp_bt:  log-probability of each response token under the distribution that it was
                      drawn from (temperature and truncation included); 0 where the response came
                      from a dataset.
    truncated_b:      True where no stop token came before the length limit.
    teacher_states_btd:  the teacher's last hidden state before each response token, where it was
                      computed elsewhere; None where the teacher still has to read the rows.
    teacher_top_k_bt:    its most probable tokens at each response token, instead of its states.
    teacher_rows:     the rows that the teacher reads, where they are not `tokens_bs`.
    own_logp_bt:      log-probability of each response token under the student's own distribution
                      (temperature 1, not truncated), by its sampler, where the student drew
                      the rows.
    entropy_bt:       predictive entropy of that distribution in nats, likewise.
    staleness_b:      int32, updates of the student between the weights that drew a row and those
                      that it trains, where rollouts are drawn ahead.
    reference_logp_bt:  log-probability of each response token under a reference model, if there is
                      one.
    old_logp_bt:      the same under the student's weights that drew the rows, where they have been
                      updated since.
    advantage_bt:     of each response token, where responses were rewarded.
    reward_b, pass_rate_b:  the row's reward, and the share of its problem's group that has a
                      reward over 0.
    draws_b:          int32, how often the row was drawn: until the rewards of its group differed,
                      or no redraw was left.
    not_scored_b:     bool, the reward is 0 because the verifier could not judge the row; where it
                      tells that.
    signal_b:         bool, the rewards of the row's group differ (`have_signal`).

    The last response token of a finished row is its stop token: it is trained on like any other.
    """

    tokens_bs: jax.Array
    prompt_length_b: jax.Array
    response_length_b: jax.Array
    sampler_logp_bt: jax.Array
    truncated_b: jax.Array
    teacher_states_btd: jax.Array | None = None
    teacher_top_k_bt: TopK | None = None
    teacher_rows: TeacherRows | None = None
    own_logp_bt: jax.Array | None = None
    entropy_bt: jax.Array | None = None
    staleness_b: jax.Array | None = None
    reference_logp_bt: jax.Array | None = None
    old_logp_bt: jax.Array | None = None
    advantage_bt: jax.Array | None = None
    reward_b: jax.Array | None = None
    pass_rate_b: jax.Array | None = None
    draws_b: jax.Array | None = None
    not_scored_b: jax.Array | None = None
    signal_b: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), truncated and
    renormalised; greedy at temperature 0.

    It is truncated to the top_k most probable tokens (0: all); of those, to the fewest that hold
    top_p of the mass; of those, to the ones at least min_p times as probable as the best.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __str__(self) -> str:
        """The settings in words, as logs and reports show them.

        >>> str(Sampling(0.6, top_p=0.95))
        'temperature 0.6, top-p 0.95'
        """
        cuts = {"top-p": self.top_p, "top-k": self.top_k, "min-p": self.min_p}
        said = (f", {name} {value}" for name, value in cuts.items() if value not in (0, 1))
        return f"temperature {self.temperature}{''.join(said)}"


PLAIN = Sampling()
"""The model's own distribution."""


class Samples(NamedTuple):
    """Responses, right-padded with zeros; length counts the stop token.

    logp_bt:          log-probability under the model's own distribution (temperature 1, not
                      truncated); None where an engine does not return it.
    sampler_logp_bt:  the same under the distribution that the token was drawn from.
    entropy_bt:       predictive entropy of the model's own distribution, in nats, or None.
    stop_b:           int32, the stop id that ended the row; -1 where the limit did (truncated).
    """

    tokens_bt: Array
    length_b: Array
    logp_bt: Array | None
    sampler_logp_bt: Array
    entropy_bt: Array | None
    stop_b: Array

    @property
    def truncated_b(self) -> Array:
        """True where no stop token came before the limit."""
        return self.stop_b < 0


class Trajectories(NamedTuple):
    """Stored responses, with a stored teacher output or none: its last hidden state before each
    response token (`Rollout.teacher_states_btd`), or its most probable tokens there."""

    samples: Samples
    states_btd: Array | None = None
    top_k_bt: TopK | None = None


class Scores(NamedTuple):
    """The results of both models at each response token, [B, T] or packed; log-probabilities in
    nats.

    divergence is the token loss in use; top1_agreement says where the models' most probable tokens
    are one, teacher_top1 where the response's token is the teacher's; parts are the terms of a
    token loss or objective that is a sum, by their text, where no other field holds them. Inside an
    objective, the student's log-probability and entropy, both KLs and the divergence carry a
    gradient to the student (write jax.lax.stop_gradient around what is only a weight); Scores that
    a function returns carry none.
    Fields that need a teacher are None without one (plain SFT); teacher_shared is its probability
    of tokens that the student's vocabulary has, where its own is another.
    residual is of a `TopK` teacher: log q - log p of the sampled token, each among the tokens
    outside the top k alone, and 0 of a token inside it.
    """

    student_logp: jax.Array
    student_entropy: jax.Array
    sampler_logp: jax.Array
    mask: jax.Array
    divergence: jax.Array | None = None
    teacher_logp: jax.Array | None = None
    teacher_entropy: jax.Array | None = None
    forward_kl: jax.Array | None = None
    reverse_kl: jax.Array | None = None
    top1_agreement: jax.Array | None = None
    teacher_top1: jax.Array | None = None
    teacher_shared: jax.Array | None = None
    reference_logp: jax.Array | None = None
    old_logp: jax.Array | None = None
    advantage: jax.Array | None = None
    residual: jax.Array | None = None
    parts: dict[str, jax.Array] | None = None

    def known(self, name: str) -> jax.Array:
        """A field that a loss needs. Errors: ConfigError where it is None, with the remedy."""
        value = getattr(self, name)
        if value is None:
            remedy = BROUGHT_BY.get(name, BROUGHT_BY["teacher"])
            raise ConfigError(f"the objective needs {name}, which is not known here: {remedy}")
        return value


BROUGHT_BY = {
    "teacher": "set teacher (a kept top-k knows no entropy, and an old one no log-probability)",
    "divergence": "set teacher, or use another objective",
    "reference_logp": "set reference",
    "old_logp": "set rl.epochs over 1, or rollouts.ahead",
    "advantage": "set rl.group_size over 1, and prefix student",
}
"""The remedy where one of the `Scores` is None; of those not listed, a teacher."""


class WeightedSum(NamedTuple):
    """A mean before its division: totals and weights are added over micro-batches and devices, and
    divided once."""

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """total / weight, and exactly 0 where the weight is 0."""
        safe = jax.numpy.where(self.weight == 0, 1.0, self.weight)
        return jax.numpy.where(self.weight == 0, 0.0, self.total / safe)


class TrainState(NamedTuple):
    """Everything that a training step changes. Random keys are derived from `step`, so there is no
    generator state."""

    step: jax.Array
    params: Params
    opt_state: Any


class Model(NamedTuple):
    """A decoder as pure functions of its parameters.

    - hidden(params, tokens_bs, segment_ids=None) -> [B, S, D]: final hidden states, causal, for
      right-padded rows.
    - head(params) -> LMHead: its weight [V, D] is the embedding table itself where tied.
    - init_cache(batch, slots) -> cache: a list of what decoding keeps of each layer
      (models/layers/cache.py).
    - prefill(params, tokens_bs, length_b) -> (hidden [B, S, D], what is kept of each layer, of S
      slots), for right-padded rows of so many tokens.
    - extend(params, token_b, cache, pointer, start_b) -> (hidden [B, D], cache): write a token at
      slot `pointer`; row b's first real slot is start_b (left padding).

    hidden takes parameters with layers stacked on axis 0, prefill and extend a list of layers
    (`models.unstacked`).
    """

    config: Any
    hidden: Callable[..., jax.Array]
    head: Callable[[Params], LMHead]
    init_cache: Callable[[int, int], Any]
    prefill: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, Any]]
    extend: Callable[..., tuple[jax.Array, Any]]


TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]
"""(student_logp [..., V], teacher_logp [..., V]) -> [...]: compares two distributions, in nats."""

Objective = Callable[[Scores], jax.Array]
"""Scores -> the quantity to minimise at each token, from that token's scores alone."""

Reduction = Callable[..., jax.Array]
"""(mask [B, T], Rollout) -> weights [B, T] of the tokens; totals are divided by the total weight.
One that weighs by what both models say of the tokens takes their `Scores` too, as `scores`."""

PrefixSource = Callable[[Batch, Params, Key, int], Rollout]
"""(batch, student parameters as its sampler reads them, key, max_new_tokens) -> Rollout: the prefix
axis of the design space."""


Sampler = Callable[[Params, Batch, Key, int], Samples]
"""(parameters, batch, key, max_new_tokens) -> Samples: draws one response a row.

Its settings are those it was opened with (in this process, or for an HTTP engine). A row's tokens
depend on the parameters, its prompt, the key and its row number alone. An engine with weights of
its own takes None as parameters, and refuses others."""
