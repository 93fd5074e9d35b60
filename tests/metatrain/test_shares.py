"""How a generation is shared among groups of workers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metatrain.ray.shares import Shares


def test_shares_are_in_proportion_to_speeds_and_alike() -> None:
    costs = np.concatenate([np.full(500, 10.0), np.full(500, 1.0)])
    shares, speeds = Shares(costs), {"a": 3.0, "b": 1.0, "c": 1.0}
    taken = {group: shares.take(group, speeds) for group in speeds}
    assert shares.pending == 0
    assert sorted(np.concatenate(list(taken.values()))) == list(range(1000))
    for group, calls in taken.items():
        assert shares.cost(calls) == pytest.approx(5500 * speeds[group] / 5, rel=0.02)
        assert np.mean(calls < 500) == pytest.approx(0.5, abs=0.02)  # long and short ones
        assert (np.diff(calls) > 0).all()


def test_what_a_lost_group_leaves_is_shared_by_those_that_are_done() -> None:
    shares, speeds = Shares(np.ones(90)), dict.fromkeys("abc", 1.0)
    taken = {group: shares.take(group, speeds) for group in speeds}
    shares.lose("c")
    assert shares.pending == 30
    speeds = dict.fromkeys("ab", 1.0)
    assert shares.answer("a", np.ones(30, bool)).all()
    assert len(shares.take("a", speeds)) == 15
    assert shares.answer("b", np.ones(30, bool)).all()
    assert len(shares.take("b", speeds)) == 8
    assert not set(shares.holds("a")) & set(shares.holds("b"))
    assert set(shares.holds("a")) | set(shares.holds("b")) < set(taken["c"])


def test_calls_without_an_answer_are_shared_again() -> None:
    shares = Shares(np.ones(4))
    assert len(shares.take("a", {"a": 1.0})) == 4
    assert shares.answer("a", np.array([True, False, True, False])).sum() == 2
    assert not shares.finished
    assert list(shares.take("b", {"b": 1.0})) == [1, 3]
    assert shares.answer("b", np.ones(2, bool)).all()
    assert shares.finished


@given(calls=st.integers(1, 60), groups=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_every_call_gets_exactly_one_first_answer_whatever_happens(calls: int, groups: int, seed: int) -> None:
    rng = random.Random(seed)
    shares, firsts, losses = Shares(np.array([rng.uniform(1, 9) for _ in range(calls)])), np.zeros(calls), 10
    speeds = {group: rng.uniform(0.1, 5) for group in range(groups)}
    for _ in range(2000):
        if shares.finished:
            break
        group, event = rng.randrange(groups), rng.random()
        own = shares.holds(group)
        if losses and event < 0.1:
            losses -= 1
            shares.lose(group)
        elif len(own):
            given_up = losses > 0 and event < 0.3
            losses -= given_up
            answered = np.array([not given_up or rng.random() < 0.5 for _ in own])
            firsts[own[shares.answer(group, answered)]] += 1
        elif shares.pending:
            shares.take(group, speeds)
    assert shares.finished
    assert (firsts == 1).all()
