"""PSGD for PyTorch: one `torch.optim.Optimizer` for each registered method, such as `Procrustes` and `QUAD`."""

from psgd.methods import METHODS
from psgd.schedule import precond_update_prob_schedule
from psgd_torch_backend.hessian import hessian_helper
from psgd_torch_backend.optimizer import PSGD, face

globals().update({method.title: face(method, __name__) for method in METHODS.values()})

__all__ = ["PSGD", "hessian_helper", "precond_update_prob_schedule", *(method.title for method in METHODS.values())]
