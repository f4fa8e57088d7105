"""What `help` says of every public name is what its signature says, and each example runs."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from inspect import Parameter
from types import ModuleType
from typing import Any

import pytest

import psgd
import psgd_jax_backend
import psgd_torch_backend
from psgd import METHODS

PACKAGES: tuple[ModuleType, ...] = (psgd, psgd_torch_backend, psgd_jax_backend)
SECTIONS = ("Args", "Returns", "Raises")
# A record of hyperparameters is made by its subclasses; what theirs takes is said of the backends' functions.
REGISTRIES = {"METHODS", "GEOMETRIES"}
# What only says that nothing, or itself, comes of it.
VAGUE = {"None", None, Parameter.empty}


def public() -> Iterator[Any]:
    """Every public name, and the methods of PyTorch's optimizer."""
    for package in PACKAGES:
        for name in package.__all__:
            if name not in REGISTRIES:
                yield pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for name, x in vars(psgd_torch_backend.PSGD).items():
        if inspect.isfunction(x) and not name.startswith("_"):
            yield pytest.param(x, id=f"PSGD.{name}")


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring by their title."""
    parts = re.split(r"^(\w+):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    bodies = [re.split(r"\n(?=\S)", body)[0] for body in parts[2::2]]
    return dict(zip(parts[1::2], bodies, strict=True))


def entries(body: str) -> list[str]:
    """The names of a section that are explained."""
    return re.findall(r"^    (\w+): \S", body, flags=re.MULTILINE)


def arguments(x: Any) -> tuple[list[str], bool]:
    """The names of the parameters, without those that take whatever is left; and are there such?"""
    parameters = [p for p in inspect.signature(x).parameters.values() if p.name != "self"]
    rest = [p for p in parameters if p.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]
    return [p.name for p in parameters if p not in rest], bool(rest)


everything = pytest.mark.parametrize("x", list(public()))


@everything
def test_every_argument_is_explained_and_none_that_is_not_there(x: Any):
    names, more = arguments(x)
    explained = entries(sections(x.__doc__).get("Args", ""))
    assert len(set(explained)) == len(explained)
    if more:
        assert set(names) <= set(explained)
    else:
        assert explained == names


@everything
def test_what_comes_back_and_what_is_raised_is_said(x: Any):
    said = sections(x.__doc__)
    if inspect.isfunction(x) and inspect.signature(x).return_annotation not in VAGUE:
        assert said["Returns"].strip()
    takes_values = bool(arguments(x)[0]) and not issubclass(x if inspect.isclass(x) else object, tuple)
    if takes_values and x is not psgd.Geometry:
        assert all(issubclass(eval(name), Exception) for name in entries(said["Raises"])) and entries(said["Raises"])


@everything
def test_every_default_that_is_told_is_the_real_one(x: Any):
    flat = " ".join(x.__doc__.split())
    for p in inspect.signature(x).parameters.values():
        told = re.search(rf" {p.name}: (?:(?! \w+: ).)*?\((?:[^()]*; )?default ", flat)
        if told and p.default is not Parameter.empty:
            assert flat[told.end() :].startswith(f"{p.default!r})"), p.name


@everything
def test_the_example_runs(x: Any):
    found = doctest.DocTestParser().get_doctest(x.__doc__, {}, getattr(x, "__name__", "x"), None, 0)
    assert doctest.DocTestRunner().run(found).failed == 0
    method = getattr(x, "method", None) or hasattr(x, "static_args")
    assert not method or (len(found.examples) > 4 and "\nEquation, " in x.__doc__ and "\nSource: " in x.__doc__)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_that_is_refused_is_explained(name: str):
    """A preconditioner of all parameters has no layers; a method of JAX no `lr`, and of PyTorch no mask."""
    method = METHODS[name]
    whole = method().recipe().joint
    ours, theirs = getattr(psgd_torch_backend, method.title), getattr(psgd_jax_backend, name)
    for x in (ours, theirs, getattr(psgd_jax_backend, f"scale_by_{name}")):
        assert ("scanned_layers" in arguments(x)[0]) is not whole
    assert "lr" in arguments(ours)[0] and "learning_rate" in arguments(theirs)[0] and "lr" not in arguments(theirs)[0]
    assert method.mask_name in arguments(theirs)[0] and method.mask_name not in arguments(ours)[0]
