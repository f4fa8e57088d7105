"""PSGD for JAX: an optax transformation for each registered method, such as `procrustes` and `scale_by_procrustes`."""

from psgd.methods import METHODS
from psgd.schedule import precond_update_prob_schedule
from psgd_jax_backend.transform import PSGDState, alias, scale_by_psgd, scaling, summary

globals().update({name: alias(method, __name__) for name, method in METHODS.items()})
globals().update({f"scale_by_{name}": scaling(method, __name__) for name, method in METHODS.items()})

__all__ = [
    "PSGDState",
    "precond_update_prob_schedule",
    "scale_by_psgd",
    "summary",
    *METHODS,
    *(f"scale_by_{name}" for name in METHODS),
]
