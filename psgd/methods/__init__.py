"""The named methods, a module for each published package; importing this registers them all."""

from psgd.hyperparameters import METHODS, Method

# Tables list the packages in this order.
from psgd.methods import quad_torch  # isort: skip
from psgd.methods import psgd_torch  # isort: skip
from psgd.methods import psgd_jax  # isort: skip

__all__ = ["METHODS", "Method", "psgd_jax", "psgd_torch", "quad_torch"]
