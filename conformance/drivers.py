"""Drivers: one training run each, in one framework and mode, all with the same four verbs.

A driver starts from NumPy arrays, computes its own gradients where its framework differentiates, steps, and shows
everything it holds as a `Snapshot` of float64 arrays; it can also be put into the state of another's snapshot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np

from conformance.frameworks import FRAMEWORKS, Framework
from conformance.problems import Problem
from conformance.reference import Reference
from psgd.arrays import Factors
from psgd.hyperparameters import Method
from psgd.joint import join_states, split_state
from psgd.methods import METHODS
from psgd.pipeline import host_plan
from psgd.recipe import Recipe, State

Arrays = dict[str, np.ndarray]


class Snapshot(NamedTuple):
    """All that a run holds after a step, by name: params, the updates of that step, every leaf of state."""

    params: Arrays
    updates: Arrays
    state: Arrays


def flat_state(name: str, state: State, step: int, since: Any, read: Callable[[Any], np.ndarray]) -> Arrays:
    """The state of one parameter as flat names. since: where the method counts it."""
    leaves = {f"{name}/step": np.asarray(float(step))}
    if since is not None:
        leaves[f"{name}/since"] = np.asarray(float(since))
    if state.momentum is not None:
        leaves[f"{name}/momentum"] = read(state.momentum)
    for kind, tensors in state.factors._asdict().items():
        leaves |= {f"{name}/{kind}/{i}": read(x) for i, x in enumerate(tensors)}
    return leaves


class Driver(ABC):
    """Base: start with a method, a problem, a start and a dtype."""

    name: ClassVar[str]
    framework: ClassVar[Framework]
    differentiates: ClassVar[bool] = True

    def __init__(self, method: Method, problem: Problem, start: Mapping[str, np.ndarray], dtype: str) -> None:
        self.method, self.problem, self.dtype = method, problem, self.own_dtype(dtype)
        # One preconditioner of all parameters knows no layers.
        self.scanned = frozenset[str]() if method.recipe().joint else problem.scanned
        self.before: Arrays = {}
        self.begin({name: self.array(x) for name, x in start.items()})

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        """The dtype in which this driver runs when asked for one."""
        return dtype

    def array(self, x: np.ndarray) -> Any:
        return self.framework.array(x, self.dtype)

    def batch(self, data: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self.array(x) for name, x in data.items()}

    def step(
        self, gradients: Mapping[str, np.ndarray], pairs: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None
    ) -> Snapshot:
        """Step on given gradients, and on (v, H v) of each parameter where a method fits to them at this step."""
        self.before = self.params()
        own = None if pairs is None else {name: (self.array(v), self.array(h)) for name, (v, h) in pairs.items()}
        self.advance({name: self.array(g) for name, g in gradients.items()}, own)
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        params = self.params()
        updates = {name: x - self.before[name] for name, x in params.items()} if self.before else {}
        return Snapshot(params, updates, self.state())

    @abstractmethod
    def begin(self, params: dict[str, Any]) -> None:
        """Make the optimizer."""

    @abstractmethod
    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        """One optimizer step."""

    @abstractmethod
    def params(self) -> Arrays:
        """Parameters as float64."""

    @abstractmethod
    def state(self) -> Arrays:
        """State leaves as float64; empty before the first step."""

    @abstractmethod
    def skipped(self) -> tuple[int, int]:
        """Steps that were skipped because a gradient was not finite, in all and in a row."""

    @abstractmethod
    def load(self, snapshot: Snapshot) -> None:
        """Continue from another's snapshot, taken after at least one step of both."""

    def gradient(self, data: Mapping[str, np.ndarray]) -> tuple[float, Arrays]:
        """Loss and gradient at the present parameters, by the framework's own autodiff."""
        raise NotImplementedError(f"{self.name} does not differentiate; give it another's gradients")

    def products(self, data: Mapping[str, np.ndarray], step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(v, H v) of each parameter at the present parameters, by the adapter's own functions."""
        raise NotImplementedError(f"{self.name} does not differentiate; give it another's gradients")


# ---- the core alone ---------------------------------------------------------------------
class NumpyOracle(Driver):
    """The core in NumPy, always in float64: how far rounding takes the others."""

    name = "numpy"
    framework = FRAMEWORKS["numpy"]
    differentiates = False

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        return "float64"

    def begin(self, params: dict[str, Any]) -> None:
        self.run = Reference(self.method, params, self.scanned)

    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        self.run.step(gradients, pairs)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p) for name, p in self.run.params.items()}

    def state(self) -> Arrays:
        flat: Arrays = {}
        since = self.run.since if self.method.schedule().counts else None
        for name, state in self.run.states.items():
            flat |= flat_state(name, state, self.run.count, since, self.framework.numpy)
        return flat

    def skipped(self) -> tuple[int, int]:
        return self.run.skipped, self.run.skipped_in_a_row

    def load(self, snapshot: Snapshot) -> None:
        for name, old in self.run.states.items():
            self.run.params[name] = self.array(snapshot.params[name])
            self.run.states[name] = _filled(
                name, old, snapshot, lambda x, like: self.framework.array(x.reshape(like.shape), _name(like))
            )
            self.run.count = int(snapshot.state[f"{name}/step"])
            self.run.since = int(snapshot.state.get(f"{name}/since", 0))


def _name(x: Any) -> str:
    return str(x.dtype).rsplit(".", maxsplit=1)[-1]


def _filled(name: str, old: State, snapshot: Snapshot, make: Callable[[np.ndarray, Any], Any]) -> State:
    """A state of the structure of `old` with the values of a snapshot."""
    momentum = old.momentum
    if momentum is not None:
        momentum = make(snapshot.state[f"{name}/momentum"], momentum)
    factors = {
        kind: tuple(make(snapshot.state[f"{name}/{kind}/{i}"], x) for i, x in enumerate(tensors))
        for kind, tensors in old.factors._asdict().items()
    }
    return State(momentum, Factors(**factors))


class StrictCore(NumpyOracle):
    """The core in array-api-strict, which has nothing but the standard."""

    name = "strict"
    framework = FRAMEWORKS["strict"]

    @classmethod
    def own_dtype(cls, dtype: str) -> str:
        return FRAMEWORKS["strict"].nearest(dtype)


# ---- PyTorch ----------------------------------------------------------------------------
@cache
def torch_class(name: str) -> Any:
    """The PyTorch face of a registered method."""
    return import_module("psgd_torch_backend.named").named_class(METHODS[name], __name__)


class TorchEager(Driver):
    """PyTorch, one call for all parameters of a shape."""

    name = "torch"
    framework = FRAMEWORKS["torch"]
    flags: ClassVar[dict[str, Any]] = {}

    def begin(self, params: dict[str, Any]) -> None:
        self.torch = import_module("torch")
        self.tensors = {name: self.torch.nn.Parameter(p) for name, p in params.items()}
        made = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
        layers = tuple(sorted(self.scanned))
        self.optimizer = torch_class(self.method.name)(
            self.tensors.items(), **made, **self.flags, scanned_layers=layers or False
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
        given = zeros if pairs is None else pairs
        vector, hvp = ({name: pair[k] for name, pair in given.items()} for k in (0, 1))
        self.optimizer.step(Hvp=hvp, vector=vector, update_preconditioner=pairs is not None)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p).copy() for name, p in self.tensors.items()}

    def state(self) -> Arrays:
        to_state = import_module("psgd_torch_backend._state").to_state
        flat: Arrays = {}
        for name, p in self.tensors.items():
            entry = self.optimizer.state.get(p)
            if entry:
                flat |= flat_state(
                    name,
                    to_state(entry),
                    int(entry["step"]),
                    entry.get("since"),
                    lambda x: self.framework.numpy(x).copy(),
                )
        return flat

    def skipped(self) -> tuple[int, int]:
        (group,) = self.optimizer.param_groups
        return group["skipped"], group["skipped_in_a_row"]

    def load(self, snapshot: Snapshot) -> None:
        to_state = import_module("psgd_torch_backend._state").to_state

        def overwritten(x: np.ndarray, like: Any) -> Any:
            return like.copy_(self.torch.as_tensor(x.reshape(tuple(like.shape))))

        with self.torch.no_grad():
            for name, p in self.tensors.items():
                p.copy_(self.torch.as_tensor(snapshot.params[name]))
                entry = self.optimizer.state[p]
                _filled(name, to_state(entry), snapshot, overwritten)
                for counter in ("step", "since"):
                    if counter in entry:
                        entry[counter].fill_(int(snapshot.state[f"{name}/{counter}"]))


class TorchLoop(TorchEager):
    """PyTorch, one parameter after the other."""

    name = "torch-loop"
    flags: ClassVar[dict[str, Any]] = {"stack": False}


class TorchCompiled(TorchEager):
    """PyTorch, the step compiled."""

    name = "torch-compiled"
    flags: ClassVar[dict[str, Any]] = {"compile": "full"}


# ---- JAX --------------------------------------------------------------------------------
@cache
def jax_alias(name: str) -> Any:
    """The optax face of a registered method."""
    return import_module("psgd_jax_backend.named").named_function(METHODS[name], __name__)


# What runs call is made once for all of them: compiling it takes longer than a short run.
Jit = Callable[[Callable[..., Any]], Callable[..., Any]]


@lru_cache(maxsize=32)
def jax_optimizer(
    method: Method, recipe: Recipe, names: tuple[str, ...], scanned: frozenset[str], jit: Jit
) -> tuple[Any, Any]:
    """The functions of a method for parameters of some names: init, and update compiled by `jit`.

    recipe: the method's, for one whose geometry was replaced in the registry is another.
    """
    made = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "lr"}
    layers = {name: name in scanned for name in names}
    transform = jax_alias(method.name)(method.lr, **made, scanned_layers=layers)
    return transform.init, jit(transform.update)


@lru_cache(maxsize=32)
def jax_derivatives(problem: Problem, jit: Jit) -> tuple[Any, Any]:
    """The functions of a problem, compiled by `jit`: loss with gradients, and (v, H v)."""

    def product(params: Any, batch: Any, key: Any) -> Any:
        hessian = import_module("psgd_jax_backend.hessian")
        v = hessian.vector(key, params)
        return v, hessian.product(problem.loss, params, v, (batch,))[2]

    return jit(import_module("jax").value_and_grad(problem.loss)), jit(product)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """In place of `jax.jit`."""
    return function


class JaxJit(Driver):
    """JAX, the update under `jax.jit`."""

    name = "jax"
    framework = FRAMEWORKS["jax"]
    jitted: ClassVar[bool] = True

    def begin(self, params: dict[str, Any]) -> None:
        self.jax, self.optax = import_module("jax"), import_module("optax")
        jit = self.jax.jit if self.jitted else _uncompiled
        init, self.update = jax_optimizer(self.method, self.method.recipe(), tuple(params), self.scanned, jit)
        self.differentiated, self.product = jax_derivatives(self.problem, jit)
        self.tree, self.inner = params, init(params)

    def gradient(self, data: Mapping[str, np.ndarray]) -> tuple[float, Arrays]:
        loss, grads = self.differentiated(self.tree, self.batch(data))
        return float(loss), {name: self.framework.numpy(grads[name]) for name in self.tree}

    def products(self, data: Mapping[str, np.ndarray], step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        key = host_plan(self.method.schedule(), step, since=step).key
        key = import_module("jax.numpy").full((1,), key, "int32")
        v, h = self.product(self.tree, self.batch(data), key)
        return {name: (self.framework.numpy(v[name]), self.framework.numpy(h[name])) for name in self.tree}

    def advance(self, gradients: dict[str, Any], pairs: dict[str, tuple[Any, Any]] | None) -> None:
        extra: dict[str, Any] = {}
        if self.method.recipe().newton:
            zeros = {name: (0 * p, 0 * p) for name, p in self.tree.items()}
            given = zeros if pairs is None else pairs
            vector, hvp = ({name: pair[k] for name, pair in given.items()} for k in (0, 1))
            flag = import_module("jax.numpy").asarray(pairs is not None)
            extra = {"Hvp": hvp, "vector": vector, "update_preconditioner": flag}
        updates, self.inner = self.update(gradients, self.inner, self.tree, **extra)
        self.tree = self.optax.apply_updates(self.tree, updates)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p) for name, p in self.tree.items()}

    def _states(self) -> tuple[Any, dict[str, State]]:
        own = self._own()
        momentum = dict.fromkeys(self.tree) if own.momentum is None else own.momentum
        if not self.method.recipe().joint:
            p = dict.fromkeys(self.tree, ()) if own.P is None else own.P
            return own, {n: State(momentum[n], Factors(own.Q[n], own.L[n], p[n])) for n in self.tree}
        names = sorted(self.tree)
        rows = split_state(State(None, Factors(own.Q, own.L)), [tuple(self.tree[n].shape) for n in names])
        return own, {n: State(momentum[n], state.factors) for n, state in zip(names, rows, strict=True)}

    def _own(self) -> Any:
        """The optimizer's own state among those of the transformations it is chained with."""
        return next(part for part in self.inner if hasattr(part, "Q"))

    def state(self) -> Arrays:
        own, states = self._states()
        flat: Arrays = {}
        for name, state in states.items():
            flat |= flat_state(name, state, int(own.count), own.since, self.framework.numpy)
        return flat if int(own.count) else {}

    def skipped(self) -> tuple[int, int]:
        total, row = self._own().skipped
        return int(total), int(row)

    def load(self, snapshot: Snapshot) -> None:
        own, states = self._states()
        jnp = import_module("jax.numpy")

        def cast(x: np.ndarray, like: Any) -> Any:
            return jnp.asarray(x, dtype=like.dtype)

        filled = {name: _filled(name, state, snapshot, cast) for name, state in states.items()}
        self.tree = {name: self.array(snapshot.params[name]) for name in self.tree}
        momentum = None if own.momentum is None else {name: s.momentum for name, s in filled.items()}
        first = next(iter(self.tree))
        count, since = (
            None if old is None else jnp.asarray(int(snapshot.state[f"{first}/{name}"]), old.dtype)
            for name, old in (("step", own.count), ("since", own.since))
        )
        kinds: Any = [kind for kind in Factors._fields if getattr(own, kind) is not None]
        if self.method.recipe().joint:
            whole = join_states([filled[name] for name in sorted(filled)]).factors
            factors = {kind: getattr(whole, kind) for kind in kinds}
        else:
            factors = {kind: {name: getattr(s.factors, kind) for name, s in filled.items()} for kind in kinds}
        new = own._replace(count=count, since=since, momentum=momentum, **factors)
        self.inner = tuple(new if part is own else part for part in self.inner)


class JaxEager(JaxJit):
    """JAX, operation by operation."""

    name = "jax-eager"
    jitted = False


DRIVERS: dict[str, type[Driver]] = {
    d.name: d for d in (TorchEager, TorchLoop, TorchCompiled, JaxJit, JaxEager, NumpyOracle, StrictCore)
}
