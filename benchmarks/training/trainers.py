"""Who takes part in a training, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.runs import ADAMW, Optimizers, Trainer, of_method
from psgd.hyperparameters import Method
from psgd.kron import Kronecker
from psgd.methods import METHODS
from psgd.schedule import Annealed
from psgd.summary import Parameter, parameter_costs

LARGEST = 2e9  # bytes of state that an optimizer may have

# What is chosen of the hyperparameters, of each method that has one of that name. A function is of the number of steps.
CHOSEN: Mapping[str, Any] = {
    "momentum": 0.9,
    "whiten_grad": False,
    "lr_preconditioner": 0.5,
    "preconditioner_lr": 0.7,
    "exact_hessian_vector_product": False,
    "preconditioner_update_probability": lambda steps: Annealed(1.0, 0.1, decay=7 / steps, flat_start=steps // 3),
}
# Where each factor would get all of the automatic scale: matrices run away.
UNSPLIT = {"preconditioner_init_scale": 1.0}


# ---- who takes part --------------------------------------------------------------------
def chosen(method: type[Method], steps: int) -> dict[str, Any]:
    """What is chosen of a method's hyperparameters, for a run of so many steps."""
    takes = {f.name: f.metadata["scheduled"] for f in fields(method)}
    kind = method().recipe().preconditioner
    unsplit = isinstance(kind, Kronecker) and not kind.split
    values = {name: x for name, x in CHOSEN.items() if name in takes and (takes[name] or not callable(x))}
    return {name: x(steps) if callable(x) else x for name, x in values.items()} | (UNSPLIT if unsplit else {})


def too_large(method: type[Method], model: nn.Module) -> str | None:
    """Why a method is not for a model, by the bytes of its state."""
    shapes = [Parameter(name, tuple(p.shape), "float32", False) for name, p in model.named_parameters()]
    state = sum(row.state for row in parameter_costs(method(), shapes))
    count = sum(p.numel() for p in model.parameters())
    return None if state <= LARGEST else f"its state of {count:,} parameters would be {state / 1e9:,.0f} GB"


def ours(method: type[Method]) -> Trainer:
    """A registered method, with what is chosen of its hyperparameters."""
    return of_method(method, partial(chosen, method), chosen(method, 300), partial(too_large, method))


def adamw(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The best of four pairs of betas, in one kernel."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)


def hidden(model: nn.Module) -> list[Tensor]:
    """Matrices between what comes in and what goes out: neither tables nor the head."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m.weight for m in layers[:-1]]


def muon(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
    """Muon for hidden matrices, at a rate as AdamW's, and AdamW for the rest."""
    matrices = hidden(model)
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    first = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [first, adamw(rest, lr, weight_decay)]


def soap(model: nn.Module, lr: float, weight_decay: float, steps: int) -> Optimizers:
    """Of heavyball, if it is there."""
    return [import_module("heavyball").SOAP(model.parameters(), lr=lr, weight_decay=weight_decay)]


def trainers() -> list[Trainer]:
    """AdamW first."""
    plain = Trainer(ADAMW, lambda model, *rates: [adamw(model.parameters(), *rates[:2])], {"betas": (0.9, 0.95)})
    others = Trainer("Muon", muon), Trainer("SOAP", soap, foreign=True)
    return [plain, *others, *map(ours, METHODS.values())]
