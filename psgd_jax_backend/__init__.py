"""PSGD for JAX: an optax transformation for each registered method, such as `procrustes` and `scale_by_procrustes`."""

from importlib.util import find_spec
from pathlib import Path

# The core is beside this package, unless something of its name comes first on the path.
_found = find_spec("psgd")
if _found is not None and Path(_found.origin or "").parent != Path(__file__).parents[1] / "psgd":
    raise ImportError(f"{_found.origin} hides the package psgd, of which {__name__} is made: give it another name")

from psgd.methods import METHODS
from psgd.schedule import precond_update_prob_schedule
from psgd_jax_backend._nonfinite import check_skips
from psgd_jax_backend._sharding import state_sharding
from psgd_jax_backend._state import PSGDState, state_arrays
from psgd_jax_backend._summary import summary
from psgd_jax_backend.hessian import hessian_helper
from psgd_jax_backend.named import named_function, scaling
from psgd_jax_backend.transform import scale_by_psgd

globals().update({name: named_function(method, __name__) for name, method in METHODS.items()})
globals().update(
    {method.also: named_function(method, __name__, method.also) for method in METHODS.values() if method.also}
)
globals().update({f"scale_by_{name}": scaling(method, __name__) for name, method in METHODS.items()})
globals().update({f"scale_by_{m.also}": scaling(m, __name__, m.also) for m in METHODS.values() if m.also})

__all__ = [
    "PSGDState",
    "check_skips",
    "hessian_helper",
    "precond_update_prob_schedule",
    "scale_by_psgd",
    "state_arrays",
    "state_sharding",
    "summary",
    *METHODS,
    *(method.also for method in METHODS.values() if method.also),
    *(f"scale_by_{name}" for name in METHODS),
    *(f"scale_by_{method.also}" for method in METHODS.values() if method.also),
]
