"""The shapes that the core's annotations tell are those of its arrays: they are checked while methods step.

The checks need a process of their own, of which this file is the program: there `psgd.arrays` names shapes at run time
too, which it does for type checkers alone, and every function looks at what it is given and what it returns.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial, wraps
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, install_import_hook

ROOT = Path(__file__).resolve().parents[2]
# Which are checked. No function of theirs may be left out.
MODULES = ("axes", "criterion", "geometry", "kron", "lra", "rotate", "spectral", "structured", "thin", "xmat")
SHAPES = {"a": (4, 3), "b": (5,), "c": (), "d": (2, 2, 3), "e": (17,)}  # the last so long that dense, it is thin

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # as for type checkers, an int is a float too
called: set[str] = set()  # functions by their full names


def test_annotated_shapes_are_those_of_the_arrays():
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the program ------------------------------------------------------------------------------
def checked(function: Callable) -> Callable:
    """A function that checks its annotations and tells that it was called."""
    checking, name = check(function), f"{function.__module__}.{function.__qualname__}"

    @wraps(checking)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return checking(*args, **kwargs)

    return wrapper


def load_checked() -> None:
    """Import the core, with the annotations of `MODULES` checked."""
    spec = importlib.util.spec_from_file_location("psgd.arrays", ROOT / "psgd" / "arrays.py")
    arrays = sys.modules["psgd.arrays"] = importlib.util.module_from_spec(spec)
    typing.TYPE_CHECKING = True  # what the module asks, and no other
    spec.loader.exec_module(arrays)
    typing.TYPE_CHECKING = False
    with install_import_hook([f"psgd.{module}" for module in MODULES], f"{__name__}.checked"):
        importlib.import_module("psgd")


def options(method: type) -> dict[str, Any]:
    """A rank that few numbers bear, and no dtype that NumPy lacks."""
    named = {f.name for f in fields(method)}
    ranks = {name: 2 for name in named if name.endswith("rank_of_approximation")}
    return ranks | ({"preconditioner_dtype": None} if "preconditioner_dtype" in named else {})


def normal(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    x = random.standard_normal(shape)
    return np.asarray(x + 1j * random.standard_normal(shape) if dtype == "complex128" else x, dtype)


def walk(method: Any, dtype: str = "float64") -> None:
    """Two steps on random gradients, with products of a Hessian of 0.3 where the method fits to them."""
    from conformance.reference import Reference, vectors

    random = np.random.default_rng(0)
    draw = partial(normal, random, dtype=dtype)
    reference = Reference(method, {name: draw(shape) for name, shape in SHAPES.items()})
    for step in range(2):
        gradients = {name: draw(shape) for name, shape in SHAPES.items()}
        v = vectors(method, step + 1, reference.params)
        reference.step(gradients, {name: (v[name], 0.3 * v[name]) for name in v} if method.recipe().newton else None)


def variants(method: type) -> Iterator[dict[str, Any]]:
    """Options that take a method by other ways through the core, one at a time."""
    from psgd import GEOMETRIES

    values = {"keep_p": [True], "dQ": GEOMETRIES, "step_normalizer_order": ["1st"]}
    yield {}
    for f in fields(method):
        chosen = [inf] if "max_skew" in f.name else values.get(f.name, ())
        yield from ({f.name: value} for value in chosen if value != f.default)


def walk_all() -> None:
    """Each method in its variants, and on complex numbers where it takes them."""
    from psgd import METHODS

    for method in METHODS.values():
        for variant in variants(method):
            walk(method(**options(method) | variant))
        if method.complex_parameters:
            walk(method(**options(method)), dtype="complex128")
        preconditioner = method(**options(method)).recipe().preconditioner
        assert preconditioner.equation and preconditioner.shapes((4, 3))


def functions(module: str) -> Iterator[str]:
    """The functions of a module of the core by their full names."""

    def inside(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                yield prefix + child.name
                yield from inside(child, f"{prefix}{child.name}.<locals>.")

    yield from inside(ast.parse((ROOT / "psgd" / f"{module}.py").read_text()), f"psgd.{module}.")


def main() -> None:
    load_checked()
    from psgd.rotate import symmetrised

    try:
        symmetrised(np.ones((2, 3)))
    except TypeCheckError:
        pass
    else:
        raise AssertionError("a matrix that is not square passed for one: annotations are not checked")
    walk_all()
    left_out = [name for module in MODULES for name in functions(module) if name not in called]
    assert not left_out, f"never called, so not checked: {left_out}"


if __name__ == "__main__":
    main()
