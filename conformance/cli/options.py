"""What several commands share: their options, and how these are read."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import import_module
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import typer

from conformance.frameworks import Framework
from conformance.terminal import refuse
from psgd.methods import METHODS

Steps = Annotated[int, typer.Option(min=1, help="How many steps to train.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the start and of the batches.")]
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the result to this file as JSON.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="A hyperparameter as NAME=VALUE; may be repeated.")
]


def settings(method: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Hyperparameters from NAME=VALUE; a value is a Python literal, or else a string."""
    values: dict[str, Any] = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign:
            refuse(f"--set {text} has no value; write it as NAME=VALUE")
        try:
            values[name] = inf if value == "inf" else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values[name] = value
    try:
        METHODS[method].of(**values)
    except ValueError as error:
        refuse(str(error))
    return values


def loaded(framework: Framework) -> Framework:
    """A framework that is installed; ImportError where it is not."""
    framework.array(np.zeros(1), "float32")
    return framework


def from_checkout(module: str, command: str, what: str) -> ModuleType:
    """A module that only a checkout has. command: that needs it; what: it needs."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
    refuse(
        f"{command} needs a checkout of the repository: {what} not part of the installed package; "
        "clone it and run `make venv` there"
    )
