"""Proof that both frameworks walk one trajectory: problems, drivers, comparisons, recorded runs, the command."""

from importlib.util import find_spec
from pathlib import Path

# The core is beside this package, unless something of its name comes first on the path.
_found = find_spec("psgd")
if _found is not None and Path(_found.origin or "").parent != Path(__file__).parents[1] / "psgd":
    raise ImportError(f"{_found.origin} hides the package psgd, of which {__name__} is made: give it another name")
