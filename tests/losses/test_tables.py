"""Each loss is named once: in the table at the foot of its file."""

from __future__ import annotations

import importlib
import inspect
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import forward_kl, losses, mix
from kdjax.base import Objective, Reduction, Scores, TokenLoss
from kdjax.config import Config, Turn
from kdjax.config.as_json import as_dict, from_dict
from kdjax.config.names import names_others
from kdjax.errors import ConfigError
from kdjax.grading import rewards
from kdjax.losses import divergences
from kdjax.losses.combinators import F
from kdjax.losses.composition import Schedule, composed

FILES = sorted(p.stem for p in Path(losses.__file__).parent.glob("*.py") if p.stem != "__init__")
A = jax.Array
PLAIN = {
    ("student_logp", A, "teacher_logp", A, A): "TOKEN_LOSSES",
    ("scores", Scores, A): "OBJECTIVES",
    ("mask", A, "rollout", A): "REDUCTIONS",
    ("reward_gs", np.ndarray, np.ndarray): "GROUP_ADVANTAGES",
}
"""A function's arguments and what it gives -> the table that it belongs in."""
MADE = {
    TokenLoss: {"TOKEN_LOSS_MAKERS"},
    Objective: {"OBJECTIVE_MAKERS"},
    Reduction: {"REDUCTION_MAKERS"},
    F: {"TOKEN_LOSS_MAKERS", "OBJECTIVE_MAKERS"},
    Schedule: {"SCHEDULES"},
}
"""What a maker gives -> the tables that it belongs in."""


REWARD = ["prompt", "response", "answer"]


def belongs(function) -> set[str]:
    """The tables that a function of this signature belongs in."""
    hints = typing.get_type_hints(function)
    given = hints.pop("return", None)
    if given in MADE:
        return MADE[given]
    arguments = [x for name, kind in hints.items() for x in (name, kind) if name != "rollout"]
    signature = (*arguments, *(["rollout"] if "rollout" in hints else []), given)
    return {PLAIN[signature]} if signature in PLAIN else set()


def missing(module) -> set[str]:
    """'table: function' of each public function that is not where it belongs."""
    own = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
    own = [f for f in own if f.__module__ == module.__name__ and not f.__name__.startswith("_")]
    return {
        f"{table}: {f.__name__}"
        for f in own
        for table in losses.TABLES
        if (table in belongs(f)) != (f in getattr(module, table, ()))
    }


@pytest.mark.parametrize("file", FILES)
def test_every_loss_is_in_the_table_of_its_file(file):
    """And nothing else is; a file with tables is one that the front page and configs look into."""
    module = importlib.import_module(f"kdjax.losses.{file}")
    assert missing(module) == set()
    tables = [f for table in losses.TABLES for f in getattr(module, table, ())]
    assert bool(tables) == (file in losses.HOMES)
    assert {f.__module__ for f in tables} <= {module.__name__}


def test_a_loss_that_is_forgotten_is_found(monkeypatch):
    """The walk above sees a new function of each kind, and one that was taken out of its table."""

    def hellinger(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        raise NotImplementedError

    def renyi(order: float) -> TokenLoss:
        raise NotImplementedError

    for function in (hellinger, renyi):
        function.__module__ = divergences.__name__
        monkeypatch.setattr(divergences, function.__name__, function, raising=False)
    monkeypatch.setattr(divergences, "TOKEN_LOSSES", ())
    assert missing(divergences) == {
        "TOKEN_LOSSES: hellinger", "TOKEN_LOSS_MAKERS: renyi", "TOKEN_LOSSES: total_variation",
    }  # fmt: skip


def test_no_two_tables_share_a_name():
    """One name is one function, in configs and on the front page."""
    by_file = {
        (f.__name__, f)
        for file in losses.HOMES
        for table in losses.TABLES
        for f in getattr(importlib.import_module(f"kdjax.losses.{file}"), table, ())
    }
    assert len(by_file) == len({name for name, _ in by_file}) == len(losses.named(*losses.TABLES))


def test_every_reward_is_in_its_table():
    """Functions of (prompt, response, answer) -> a number."""
    found = [f for _, f in inspect.getmembers(rewards, inspect.isfunction)]
    found = [f for f in found if [*inspect.signature(f).parameters] == REWARD]
    assert {*found} == {*rewards.REWARDS}


def hellinger(student_logp, teacher_logp):
    """A loss that its author forgot to put in a table."""
    return forward_kl(student_logp, teacher_logp)


hellinger.__module__ = divergences.__name__


@pytest.mark.parametrize("loss", [hellinger, mix(forward_kl, hellinger, weight=0.5)])
def test_a_loss_in_no_table_is_refused_before_it_trains(loss):
    """Its run could not say what it was trained with; of a turn, too."""
    says = "hellinger is in no table of kdjax.losses.divergences"
    for config in (Config(token_loss=loss), Config(turns=(Turn(token_loss=loss),))):
        with pytest.raises(ConfigError, match=says):
            as_dict(config)


def test_a_loss_of_another_version_is_not_read_back_silently(capsys):
    """The run is read, and a line says that the default stands in for it; nothing is said of a loss
    of the user's own, nor of one that combines others."""
    fields = as_dict(Config(steps=3))
    for text in ("hellinger", "mix(forward_kl, hellinger, weight=0.5)", "mix(forward_kl)"):
        again = from_dict(fields | {"token_loss": text})
        assert (again.token_loss, again.steps) == (forward_kl, 3)
        said = capsys.readouterr().out
        assert text in said
        assert "token_loss" in said
        assert said.count("\n") == 1
    for text in ("<run_path>.own", "mine(forward_kl, 0.5)", "partial(own, 3)", "a.b.<lambda>"):
        assert from_dict(fields | {"token_loss": text}).token_loss is forward_kl
        assert capsys.readouterr().out == ""


def test_losses_of_the_users_own_are_written():
    """By itself, and within what the package composes or the user does."""

    def own(student_logp, teacher_logp):
        return forward_kl(student_logp, teacher_logp)

    def twice(loss):
        return composed(lambda *both: 2 * loss(*both), twice, loss)

    for loss in (own, mix(own, forward_kl, weight=0.5), twice(forward_kl)):
        assert names_others(as_dict(Config(token_loss=loss))["token_loss"])
