"""Schedules of Python numbers and of arrays."""

from __future__ import annotations

from math import nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psgd.schedule import (
    Annealed,
    StepInfo,
    always,
    at,
    coin,
    early,
    evenly,
    inverse_root,
    never,
    periodic,
    precond_update_prob_schedule,
)


def test_periodic():
    due = periodic(100)
    assert [t for t in range(1, 301) if due(StepInfo(t, None))] == [100, 200, 300]
    assert jax.jit(lambda t: due(StepInfo(t, None)))(jnp.arange(1, 301)).nonzero()[0].tolist() == [99, 199, 299]


# ---- first steps, and even distances -------------------------------------------------------
def test_early_asks_the_other_rule_at_every_step():
    asked = []

    def other(info: StepInfo) -> bool:
        asked.append(info.step)
        return info.step == 4

    assert [early(2, other)(StepInfo(t, None)) for t in range(1, 6)] == [True, True, False, True, False]
    assert asked == [1, 2, 3, 4, 5]
    assert early(2, always)(StepInfo(9, None)) is True and early(2, never)(StepInfo(3, None)) is False


def test_early_tosses_its_coin_from_the_first_step():
    tossed, due = [], early(2, coin("fit", 0.5))
    assert [bool(due(StepInfo(t, lambda role: tossed.append(role) or 0.7))) for t in (1, 2, 3)] == [True, True, False]
    assert tossed == ["fit"] * 3


def test_early_of_arrays():
    due = early(2, periodic(5))
    traced = jax.jit(jax.vmap(lambda t: due(StepInfo(t, None))))(jnp.arange(1, 11))
    assert (np.flatnonzero(traced) + 1).tolist() == [1, 2, 5, 10]


def steps_of(probability, last: int, number=int) -> list[int]:
    """The steps, up to the last, at which `evenly` says yes; its counter is kept as a kind of number."""
    due, found, since = evenly(probability), [], 0
    for t in range(1, last + 1):
        since += 1
        if due(StepInfo(t, None, number(since))):
            found.append(t)
            since = 0
    return found


def test_evenly_waits_until_one_over_the_probability():
    assert steps_of(0.3, 20) == [4, 8, 12, 16, 20]
    assert steps_of(1.0, 5) == [1, 2, 3, 4, 5]
    assert steps_of(0.9, 6) == [2, 4, 6]
    assert steps_of(lambda step: 1.0 if step <= 3.0 else 0.5, 9) == [1, 2, 3, 5, 7, 9]
    assert steps_of(np.float64(0.25), 9) == [4, 8]


@pytest.mark.parametrize("number", [float, np.float32])
def test_evenly_of_a_whole_fraction_is_exactly_periodic(number):
    for k in range(1, 101):
        assert steps_of(number(1 / k), 3 * k + 1, number) == [*range(k, 3 * k + 2, k)], k


def test_the_slack_of_evenly_is_no_step():
    """A probability a little below 1 / k waits for one step more."""
    for k in range(1, 101):
        assert steps_of((1 - 1e-5) / k, k + 1) == [k + 1], k


# ---- the probability that falls ------------------------------------------------------------
ANNEALED = [
    (1.0, 0.03, 0.001, 500),
    (0.8, 0.1, 0.05, 0),
    (0.5, 0.5, 0.01, 20),
    (1.0, 1e-3, 0.0, 7),
    (0.9, 0.2, 0.3, 9.5),
]


def by_formula(n: int, max_prob: float, min_prob: float, decay: float, flat_start: float) -> float:
    with np.errstate(over="ignore"):
        return min(max(max_prob * float(np.exp(-decay * (n - flat_start))), min_prob), max_prob)


@pytest.mark.parametrize("numbers", ANNEALED)
def test_annealed(numbers: tuple[float, ...]):
    schedule = precond_update_prob_schedule(*numbers)
    steps = [1, 7, 19, 20, 21, 30, 499, 500, 501, 1500, 4006, 4007, 10**6]
    wanted = [by_formula(n, *numbers) for n in steps]
    assert [float(schedule(n)) for n in steps] == pytest.approx(wanted, rel=1e-14)
    assert [float(schedule(np.float64(n))) for n in steps] == pytest.approx(wanted, rel=1e-14)
    for kind in (jnp.int32, jnp.float32):
        assert np.asarray(jax.jit(lambda t: schedule(t))(jnp.asarray(steps, kind))) == pytest.approx(wanted, rel=2e-6)
    assert schedule == Annealed(*numbers) == numbers


def test_annealed_by_default():
    assert precond_update_prob_schedule() == Annealed() == (1.0, 0.03, 0.001, 500)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_prob": 1.5}, "min_prob=0.03 and max_prob=1.5 "),
        ({"max_prob": 0.01}, "min_prob=0.03 and max_prob=0.01 "),
        ({"min_prob": 0.0}, "min_prob=0.0 and max_prob=1.0 "),
        ({"min_prob": -0.1}, "min_prob=-0.1 and max_prob=1.0 "),
        ({"max_prob": nan}, "min_prob=0.03 and max_prob=nan "),
        ({"min_prob": nan}, "min_prob=nan and max_prob=1.0 "),
        ({"decay": -0.001}, "decay=-0.001 must lie in "),
        ({"decay": nan}, "decay=nan must lie in "),
        ({"decay": float("inf")}, "decay=inf must lie in "),
        ({"flat_start": -1}, "flat_start=-1 must not be negative"),
    ],
)
def test_a_wrong_schedule_says_what_is_wrong(wrong: dict[str, float], said: str):
    with pytest.raises(ValueError, match=said):
        precond_update_prob_schedule(**wrong)


def test_at():
    assert at(0.5, 3) == 0.5 and at(lambda step: step / 2, 3) == 1.5


# ---- how large a step of the factors is ----------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.7), (10_000, 0.7 / 2**0.5), (40_000, 0.7 / 5**0.5), (50_000, 0.3), (10**6, 0.3)]
)
def test_inverse_root(step: int, rate: float):
    assert float(inverse_root(np, 0.7, step, 10_000, 0.3)) == pytest.approx(rate, rel=1e-15)
    assert float(inverse_root(jnp, 0.7, jnp.int32(step), 10_000, 0.3)) == pytest.approx(rate, rel=1e-6)


def test_the_floor_wins_over_the_peak():
    assert float(inverse_root(np, 0.1, 1, 10_000, 0.3)) == 0.3
