"""Every argument of every method takes a hostile value for what it plainly is, or refuses it in one sentence."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch

import psgd_jax_backend
import psgd_torch_backend
from conformance.internal.hostile import VALUES, fault
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd_jax_backend._arguments import ADAPTER as OF_JAX
from psgd_torch_backend._arguments import ADAPTER as OF_TORCH
from psgd_torch_backend._groups import group_key

FIRST = next(iter(METHODS))  # whose adapter arguments stand for all


def found(argument: str, make: Any) -> list[str]:
    """The faults of all values of one argument."""
    faults = {name: fault(argument, make, value()) for name, value in VALUES.items()}
    return [f"{argument}={name} {wrong}" for name, wrong in faults.items() if wrong]


def record(method: type[Method], name: str, value: Any) -> None:
    """A record that can be used: it knows its recipe, its schedule and its scale."""
    made = method.of(**{name: value})
    made.recipe(), made.schedule(), made.initial_scale(), hash(made.recipe())


def optimizer(method: type[Method], name: str, value: Any) -> None:
    getattr(psgd_torch_backend, method.title)([torch.zeros(2, 2)], **{name: value})


def transformation(method: type[Method], name: str, value: Any) -> None:
    getattr(psgd_jax_backend, method.name)(**{name: value})


@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize("name", METHODS)
def test_of_a_record(name: str):
    method = METHODS[name]
    assert not [x for f in fields(method) for x in found(f.name, partial(record, method, f.name))]


@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize("name", METHODS)
def test_of_an_optimizer_of_torch(name: str):
    method = METHODS[name]
    arguments = [*map(group_key, fields(method)), *(OF_TORCH if name == FIRST else ())]
    assert not [x for argument in arguments for x in found(argument, partial(optimizer, method, argument))]


@pytest.mark.contract("input: numbers")
@pytest.mark.parametrize("name", METHODS)
def test_of_a_transformation_of_jax(name: str):
    method = METHODS[name]
    given = list(signature(getattr(psgd_jax_backend, name)).parameters)
    arguments = [x for x in given if name == FIRST or x not in OF_JAX]
    assert not [x for argument in arguments for x in found(argument, partial(transformation, method, argument))]
