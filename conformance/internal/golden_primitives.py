"""Replays of functions that keep nothing: each step is a call of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from conformance.internal.golden_player import Compared, Player, Recording, family
from psgd import rotate, schedule, shapes
from psgd._xp import namespace
from psgd.spectral import NormBound, general_bound

PRIMITIVES: dict[str, Callable[[Player, int], Any]] = {}


def primitive(name: str) -> Callable[[Callable[[Player, int], Any]], Callable[[Player, int], Any]]:
    """Register the call of a primitive."""

    def register(call: Callable[[Player, int], Any]) -> Callable[[Player, int], Any]:
        PRIMITIVES[name] = call
        return call

    return register


def _bound(player: Player, t: int, positive: bool, bound: NormBound) -> Any:
    draws = Recording(player, t)
    value = bound(player.read(f"in/{t}/0"), draws, "bound", positive=positive)
    draws.spent()
    return value


@primitive("_norm_lower_bound (kron.py, affine.py)")
def general_norm_bound(player: Player, t: int) -> Any:
    return general_bound(player.read(f"in/{t}/0"))


@primitive("precond_update_prob_schedule()")
def update_probability(player: Player, t: int) -> Any:
    return np.asarray(schedule.precond_update_prob_schedule()(player.data[f"in/{t}/0"]))


@family("primitive", kinds=None)
def replay_primitive(player: Player) -> Iterator[Compared]:
    """Functions: each step is a call of its own."""
    if player.case["function"] == "hessian_helper":
        yield from replay_hessian_helper(player)
        return
    call = PRIMITIVES[player.case["function"]]
    for t in player.steps:
        got = call(player, t)
        got = got if isinstance(got, np.ndarray) else player.framework.numpy(got)
        yield f"out/{t}/0", got, player.data[f"out/{t}/0"]


def replay_hessian_helper(player: Player) -> Iterator[Compared]:
    """psgd_jax's `hessian_helper` on its recorded loss, mean log(1 + exp z) + 0.1 sum W^4, z = X W + b.

    The coin and the vector are the recorded ones; the products are the adapters' own where there is one, and by formula
    in namespaces that do not differentiate.
    """
    x = player.array(player.data["data/X"])
    probability = player.case["hyperparameters"]["preconditioner_update_probability"]
    name = player.framework.name
    products = import_module(f"psgd_{name}_backend.hessian") if name in HELPERS else None
    for t in player.steps:
        draws = Recording(player, t)
        w, b = (player.read(f"param/{t}/{i}") for i in (0, 1))
        flag = draws.toss("fit") < probability or t - 1 < 2
        yield f"flag/{t}", np.asarray(float(flag)), player.data[f"flag/{t}"].astype(float)
        v = [draws.normal(f"v/{i}", y.shape, y) if flag else 0 * y for i, y in enumerate((w, b))]
        loss, grads, hvp = HELPERS.get(player.framework.name, _by_formula)(products, x, [w, b], v)
        draws.spent()
        yield f"loss/{t}", player.framework.numpy(loss), player.data[f"loss/{t}"]
        yield from player.state(t, "grad", grads)
        yield from player.state(t, "v", v)
        yield from player.state(t, "h", hvp)


def _helper_loss(x: Any, params: Sequence[Any]) -> Any:
    xp, (w, b) = namespace(x), params
    z = x @ w + b
    return xp.mean(xp.log1p(xp.exp(z))) + 0.1 * xp.sum(w**4)


def _by_formula(_: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    xp, (w, b), (vw, vb) = namespace(x), params, v
    z, dz = x @ w + b, x @ vw + vb
    s = 1 / (1 + xp.exp(-z))
    n = prod(z.shape)
    grads = x.T @ s / n + 0.4 * w**3, xp.sum(s, axis=0) / n
    ds = s * (1 - s) * dz
    hvp = x.T @ ds / n + 1.2 * w**2 * vw, xp.sum(ds, axis=0) / n
    return _helper_loss(x, params), grads, hvp


def _by_torch(hessian: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    leaves = [p.clone().requires_grad_() for p in params]
    loss, grads, hvp = hessian.exact(lambda: _helper_loss(x, leaves), leaves, v)
    return loss.detach(), grads, hvp


def _by_jax(hessian: Any, x: Any, params: Sequence[Any], v: Sequence[Any]) -> tuple[Any, ...]:
    return hessian.product(lambda p: _helper_loss(x, p), list(params), list(v))


HELPERS: dict[str, Callable[..., tuple[Any, ...]]] = {"torch": _by_torch, "jax": _by_jax}

QUAD_BOUND = NormBound(probes=4, products=6, offset=1e-9)
PRIMITIVES |= {
    "norm_lower_bound_spd": partial(_bound, positive=True, bound=NormBound()),
    "norm_lower_bound_skh": partial(_bound, positive=False, bound=NormBound()),
    "_norm_lower_bound": partial(_bound, positive=True, bound=QUAD_BOUND),
    "_norm_lower_bound (skh)": partial(_bound, positive=False, bound=QUAD_BOUND),
}


def _turned(player: Player, t: int, turn: Callable[..., Any], bound: NormBound) -> Any:
    draws = Recording(player, t)

    def skew_norm(r: Any, **ignored: Any) -> Any:
        return bound(r, draws, "turn", positive=False)

    value = turn(player.read(f"in/{t}/0"), skew_norm)
    draws.spent()
    return value


PRIMITIVES |= {
    "procrustes_step2": partial(_turned, turn=rotate.procrustes2, bound=NormBound()),
    "procrustes_step3": partial(_turned, turn=rotate.procrustes3, bound=NormBound()),
    "_procrustes_step": partial(_turned, turn=rotate.procrustes2, bound=QUAD_BOUND),
}


@primitive("_merge_dims")
def merged(player: Player, t: int) -> Any:
    return np.array(shapes.merge(tuple(int(n) for n in player.data[f"in/{t}/0"])))


@primitive("get_precond_lr")
def preconditioner_lr(player: Player, t: int) -> Any:
    peak, step = player.data[f"in/{t}/0"]
    return np.asarray(schedule.inverse_root(np, peak, step, 10_000, 0.3))
