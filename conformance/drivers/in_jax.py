"""Drivers of the JAX adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from conformance.drivers.base import Arrays, Driver, Snapshot, state_of_snapshot
from conformance.frameworks import FRAMEWORKS
from conformance.problems import Problem
from psgd.arrays import Factors
from psgd.hyperparameters import Method
from psgd.joint import join_states, split_state
from psgd.methods import METHODS
from psgd.pipeline import host_plan
from psgd.recipe import Recipe, State


@cache
def jax_alias(name: str) -> Any:
    """The optax function of a registered method."""
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
    hyperparameters = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "lr"}
    layers = {name: name in scanned for name in names}
    transform = jax_alias(method.name)(method.lr, **hyperparameters, scanned_layers=layers)
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
            fitted = zeros if pairs is None else pairs
            vector, hvp = ({name: pair[k] for name, pair in fitted.items()} for k in (0, 1))
            flag = import_module("jax.numpy").asarray(pairs is not None)
            extra = {"Hvp": hvp, "vector": vector, "update_preconditioner": flag}
        updates, self.inner = self.update(gradients, self.inner, self.tree, **extra)
        self.tree = self.optax.apply_updates(self.tree, updates)

    def params(self) -> Arrays:
        return {name: self.framework.numpy(p) for name, p in self.tree.items()}

    def _states(self) -> tuple[Any, dict[str, State]]:
        kept = self._own()
        momentum = dict.fromkeys(self.tree) if kept.momentum is None else kept.momentum
        if not self.method.recipe().joint:
            p = dict.fromkeys(self.tree, ()) if kept.P is None else kept.P
            return kept, {n: State(momentum[n], Factors(kept.Q[n], kept.L[n], p[n])) for n in self.tree}
        names = sorted(self.tree)
        rows = split_state(State(None, Factors(kept.Q, kept.L)), [tuple(self.tree[n].shape) for n in names])
        return kept, {n: State(momentum[n], state.factors) for n, state in zip(names, rows, strict=True)}

    def _own(self) -> Any:
        """The optimizer's own state among those of the transformations it is chained with."""
        return next(part for part in self.inner if hasattr(part, "Q"))

    def state(self) -> Arrays:
        arrays = import_module("psgd_jax_backend").state_arrays(self.inner, self.tree)
        return {name: self.framework.numpy(x) for name, x in arrays.items()} if int(self._own().count) else {}

    def skipped(self) -> tuple[int, int]:
        total, row = self._own().skipped
        return int(total), int(row)

    def load(self, snapshot: Snapshot) -> None:
        kept, states = self._states()
        jnp = import_module("jax.numpy")

        def cast(x: np.ndarray, like: Any) -> Any:
            return jnp.asarray(x, dtype=like.dtype)

        filled = {name: state_of_snapshot(name, state, snapshot, cast) for name, state in states.items()}
        self.tree = {name: self.array(snapshot.params[name]) for name in self.tree}
        momentum = None if kept.momentum is None else {name: s.momentum for name, s in filled.items()}
        first = next(iter(self.tree))
        count, since = (
            None if old is None else jnp.asarray(int(snapshot.state[f"{first}/{name}"]), old.dtype)
            for name, old in (("step", kept.count), ("since", kept.since))
        )
        kinds: Any = [kind for kind in Factors._fields if getattr(kept, kind) is not None]
        if self.method.recipe().joint:
            whole = join_states([filled[name] for name in sorted(filled)]).factors
            factors = {kind: getattr(whole, kind) for kind in kinds}
        else:
            factors = {kind: {name: getattr(s.factors, kind) for name, s in filled.items()} for kind in kinds}
        new = kept._replace(count=count, since=since, momentum=momentum, **factors)
        self.inner = tuple(new if part is kept else part for part in self.inner)


class JaxEager(JaxJit):
    """JAX, operation by operation."""

    name = "jax-eager"
    jitted = False
