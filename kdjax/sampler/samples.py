"""What samplers are asked for and what they give, whoever draws: this process or a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from kdjax.base import Array, Batch, ConfigError, Key, Params


class Samples(NamedTuple):
    """Responses, right-padded with zeros; length counts the stop token.

    logp_bt:          log-probability under the model's own distribution (temperature 1, nothing cut
                      off); None where an engine does not say it.
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


Sampler = Callable[[Params, Batch, Key, int], Samples]
"""(parameters, batch, key, max_new_tokens) -> Samples: draws one response a row.

What stands behind it (this process, an HTTP engine) holds its settings. A row's tokens depend on
the parameters, its prompt, the key and its row number alone. An engine with weights of its own
takes None as parameters, and refuses others."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), cut to the top_k
    most probable tokens (0: all), then to the fewest of them that hold top_p of their mass, then to
    those at least min_p times as probable as the best; greedy at temperature 0.

    Errors: ConfigError naming the value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not good:
                raise ConfigError(f"{name} must be {range_}, got {getattr(self, name)}")
