"""`psgd plan`: what a method would keep of a model, and what a step would cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from conformance.cli.options import Assignments, Json, settings
from conformance.terminal import console, known, refuse, visible, writable, write_json
from psgd.cost import BYTES
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd.naming import shown
from psgd.summary import Parameter, counters, parameter_costs, summary

# Bytes of an adapter's counter of steps, whether it keeps one for each parameter, and bytes of its count of skips.
COUNTERS = {"torch": (8, True, 0), "jax": (4, False, 8)}
LONGEST = 2**40  # numbers along an axis
DTYPES = [name for name in BYTES if name.startswith(("float", "bfloat", "complex"))]


def read_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """Parameters from a JSON file: name to shape, or name to an object with "shape", "dtype" and "scanned"."""
    try:
        content = json.loads(path.read_text())
        parameters = {name: x if isinstance(x, dict) else {"shape": x} for name, x in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        refuse(f"{path} is not a JSON object of shapes ({error}); write {{'weight': [768, 3072], ...}}")
    parameters = {visible(name): x for name, x in parameters.items()}
    for name, x in parameters.items():
        sized = isinstance(x.get("shape"), list) and all(type(n) is int and 0 <= n <= LONGEST for n in x["shape"])
        typed = isinstance(x.get("dtype", ""), str) and isinstance(x.get("scanned", False), bool)
        if not (sized and typed) or x.keys() - {"shape", "dtype", "scanned"} or (x.get("scanned") and not x["shape"]):
            refuse(f"{path}: {name} is {shown(x)}; give a list of whole numbers, and of a stack of layers an axis")
        known("dtype", x.get("dtype", "float32"), DTYPES)
    return parameters


def refuse_complex(method: Method, parameters: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    """Refuse complex parameters where a method takes none."""
    for name, x in parameters.items():
        if x.get("dtype", dtype).startswith("complex") and not method.complex_parameters:
            refuse(f"{method.name} does not support complex parameters; {name} is {x.get('dtype', dtype)}")


def plan(
    shapes: Annotated[Path, typer.Argument(metavar="SHAPES.json", help="Names and shapes of the parameters.")],
    method: Annotated[str, typer.Option(help="A registered method; `psgd methods` lists them.")],
    dtype: Annotated[str, typer.Option(help="Of parameters whose dtype the file leaves open.")] = "float32",
    framework: Annotated[str, typer.Option(help="torch or jax: whose counters of steps are added.")] = "torch",
    assignments: Assignments = None,
    json_file: Json = None,
) -> None:
    """Show what a method would keep of a model and what a step would cost, from its shapes alone."""
    known("method", method, METHODS)
    known("dtype", dtype, DTYPES)
    known("framework", framework, COUNTERS)
    writable(json_file)
    configured = METHODS[method].of(**settings(method, assignments or []))
    size, each, skips = COUNTERS[framework]
    parameters = read_shapes(shapes)
    refuse_complex(configured, parameters, dtype)
    known_shapes = [
        Parameter(name, tuple(x["shape"]), x.get("dtype", dtype), x.get("scanned", False))
        for name, x in parameters.items()
    ]
    counted = counters(configured, known_shapes, size, each=each) + skips
    total = summary([(configured, r) for r in parameter_costs(configured, known_shapes)], counted)
    out = console()
    out.print(total.text(out.width), markup=False, highlight=False, soft_wrap=True)
    totals = {name: getattr(total, name) for name in ("bytes", "state", "apply", "fit", "counters")}
    write_json(json_file, totals | {"rows": [asdict(r) for r in total.rows]})
