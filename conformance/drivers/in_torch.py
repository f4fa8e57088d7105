"""Drivers of the PyTorch adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from conformance.drivers.base import Arrays, Driver, Snapshot
from conformance.frameworks import FRAMEWORKS
from psgd.methods import METHODS
from psgd.pipeline import host_plan


@cache
def torch_class(name: str) -> Any:
    """The PyTorch class of a registered method."""
    return import_module("psgd_torch_backend.named").named_class(METHODS[name], __name__)


class TorchEager(Driver):
    """PyTorch, one call for all parameters of a shape."""

    name = "torch"
    framework = FRAMEWORKS["torch"]
    flags: ClassVar[dict[str, Any]] = {}

    def begin(self, params: dict[str, Any]) -> None:
        self.torch = import_module("torch")
        self.tensors = {name: self.torch.nn.Parameter(p) for name, p in params.items()}
        hyperparameters = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
        layers = tuple(sorted(self.scanned))
        self.optimizer = torch_class(self.method.name)(
            self.tensors.items(), **hyperparameters, **self.flags, scanned_layers=layers or False
        )

    def gradient(self, data: Mapping[str, np.ndarray]) -> tuple[float, Arrays]:
        loss = self.problem.loss(self.tensors, self.batch(data))
        grads = self.torch.autograd.grad(loss, list(self.tensors.values()))
        return float(loss.detach()), {n: self.framework.numpy(g) for n, g in zip(self.tensors, grads, strict=True)}

    def products(self, data: Mapping[str, np.ndarray], step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        hessian, batch = import_module("psgd_torch_backend.hessian"), self.batch(data)
        key = host_plan(self.method.schedule(), step, since=step).key
        params = list(self.tensors.values())
        vs = [hessian.vector(key, name, p.detach()) for name, p in self.tensors.items()]
        hs = hessian.exact(lambda: self.problem.loss(self.tensors, batch), params, vs)[2]
        read = self.framework.numpy
        return {name: (read(v), read(h)) for name, v, h in zip(self.tensors, vs, hs, strict=True)}

    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        for name, p in self.tensors.items():
            p.grad = gradients[name]
        if not self.method.recipe().newton:
            self.optimizer.step()
            return
        zeros = {name: (self.torch.zeros_like(p), self.torch.zeros_like(p)) for name, p in self.tensors.items()}
        fitted = zeros if pairs is None else pairs
        vector, hvp = ({name: pair[k] for name, pair in fitted.items()} for k in (0, 1))
        self.optimizer.step(Hvp=hvp, vector=vector, update_preconditioner=pairs is not None)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p).copy() for name, p in self.tensors.items()}

    def state(self) -> Arrays:
        arrays = import_module("psgd_torch_backend").state_arrays(self.optimizer)
        return {name: self.framework.numpy(x).copy() for name, x in arrays.items()}

    def skipped(self) -> tuple[int, int]:
        (group,) = self.optimizer.param_groups
        return group["skipped"], group["skipped_in_a_row"]

    def load(self, snapshot: Snapshot) -> None:
        with self.torch.no_grad():
            for name, p in self.tensors.items():
                p.copy_(self.torch.as_tensor(snapshot.params[name]))
            for name, x in import_module("psgd_torch_backend").state_arrays(self.optimizer).items():
                x.copy_(self.torch.as_tensor(snapshot.state[name]).reshape(x.shape))


class TorchLoop(TorchEager):
    """PyTorch, one parameter after the other."""

    name = "torch-loop"
    flags: ClassVar[dict[str, Any]] = {"stack": False}


class TorchCompiled(TorchEager):
    """PyTorch, the step compiled."""

    name = "torch-compiled"
    flags: ClassVar[dict[str, Any]] = {"compile": "full"}
