"""PSGD for PyTorch: one `torch.optim.Optimizer` for each registered method, such as `Procrustes` and `QUAD`."""

from importlib.util import find_spec
from pathlib import Path

# The core is beside this package, unless something of its name comes first on the path.
_found = find_spec("psgd")
if _found is not None and Path(_found.origin or "").parent != Path(__file__).parents[1] / "psgd":
    raise ImportError(f"{_found.origin} hides the package psgd, of which {__name__} is made: give it another name")

from psgd.methods import METHODS
from psgd.schedule import precond_update_prob_schedule
from psgd_torch_backend._state import state_arrays
from psgd_torch_backend.hessian import hessian_helper
from psgd_torch_backend.named import named_class
from psgd_torch_backend.optimizer import PSGD

globals().update({method.title: named_class(method, __name__) for method in METHODS.values()})

__all__ = [
    "PSGD",
    "hessian_helper",
    "precond_update_prob_schedule",
    "state_arrays",
    *(method.title for method in METHODS.values()),
]
