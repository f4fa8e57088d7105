"""The mathematics of preconditioned SGD, stated once over the Python Array API.

`psgd_torch_backend` and `psgd_jax_backend` make optimizers of it. Start reading at `psgd.geometry`.
"""

from psgd.geometry import GEOMETRIES, Geometry
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd.schedule import precond_update_prob_schedule

__all__ = ["GEOMETRIES", "METHODS", "Geometry", "Method", "precond_update_prob_schedule"]
__version__ = "0.1.0"
