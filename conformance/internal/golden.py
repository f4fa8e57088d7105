"""Replays recorded runs of the published implementations through the core, with their recorded random draws.

A folder holds `index.json` and one `.npz` a case; the README of `conformance/internal/golden` describes the schema.
Each family of cases has a function here that yields what the core computed beside what was recorded. What the schema
demands of a family has to be there: a case from which something is missing is none, and does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from conformance.frameworks import Framework, double_precision
from conformance.internal import golden_cases
from conformance.internal.golden_cases import Case, Data
from conformance.internal.golden_optimizers import replay_optimizer
from conformance.internal.golden_player import (
    FAMILIES,
    OF_FUNCTIONS,
    OF_JAX,
    OF_OPTIMIZERS,
    RESULTS,
    Compared,
    Player,
    Recording,
    all_but_q,
    all_but_the_diagonal,
    family,
    if_scaled,
    never,
    number,
)
from conformance.internal.golden_primitives import PRIMITIVES, primitive
from psgd import criterion, kron, pipeline, rotate
from psgd.lra import LRA
from psgd.methods import METHODS
from psgd.spectral import NormBound, TraceBound


@dataclass(frozen=True)
class Result:
    """error: max |x - y| / max|y| over all arrays of a case, less the slack `atol`. where: the array of that error."""

    case: str
    family: str
    error: float
    rtol: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.rtol


# ---- functions: one tensor, one fit a step ----------------------------------------------
@family("kron_newton", kinds=OF_FUNCTIONS, newton=True)
@family("kron_whiten", kinds=OF_FUNCTIONS)
def replay_kron(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_kron_*` and `precond_grad_kron`."""
    options = {k: number(v) for k, v in player.case["hyperparameters"].items()}
    dense = kron.DenseRule(options["max_size"], options["max_skew"])(tuple(player.case["shapes"][0]))
    yield from replay_function(player, options, dense, options["Scale"], NormBound(), coin=True)


@family("dense_newton", kinds=OF_FUNCTIONS, newton=True)
def replay_dense(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_dense_*`: the Kronecker update of a vector with one dense factor."""
    options = player.case["hyperparameters"]
    yield from replay_function(player, options, (True,), options["init_scale"], TraceBound(), coin=False)


def replay_function(
    player: Player,
    options: Mapping[str, Any],
    dense: Sequence[bool],
    scale: float,
    bound: NormBound,
    *,
    coin: bool,
) -> Iterator[Compared]:
    """One tensor: fit it to each recorded pair, and compare factors, bounds and P g."""
    geometry = player.geometry
    shape = (-1,) if bound == TraceBound() else tuple(player.case["shapes"][0])
    first = player.array(player.data["grad/1/0"].reshape(shape))
    factors = kron.rescaled(geometry, kron.init(dense, first), scale)
    yield from player.state(0, "Q", factors.Q)
    yield from player.state(0, "L", factors.L)
    for t in player.steps:
        draws = Recording(player, t)
        g, *newton_pair = player.observed(t, shape)
        e = draws.normal("damping", g.shape, g)
        if newton_pair:
            v, h = newton_pair
            pair = criterion.newton(v, h, e, options["damping"])
        else:
            pair = criterion.whitening(geometry.probed(factors.Q), g, e, options["damping"])
        factors = kron.fit(geometry, bound, factors, pair, options["lr"], options["betaL"], draws)
        if coin and not geometry.balance_first:
            factors = factors._replace(Q=rotate.balanced(factors.Q, draws.toss("balance") < 0.01))
        draws.spent()
        yield from player.state(t, "Q", factors.Q)
        yield from player.state(t, "L", factors.L)
        yield from player.state(t, "out", [geometry.precondition(factors.Q, g)])


@family("lra_newton", kinds=OF_FUNCTIONS, newton=True)
@family("lra_whiten", kinds=OF_FUNCTIONS)
def replay_lra(player: Player) -> Iterator[Compared]:
    """psgd_torch's `update_precond_lra*`: the low-rank update of one vector."""
    options = player.case["hyperparameters"]
    kind, begun = LRA(options["rank"]), Recording(player, 0)
    first = player.array(player.data["grad/1/0"].reshape(-1))
    factors = kind.rescaled(kind.init(first, begun), options["init_scale"])
    begun.spent()
    yield from player.state(0, "Q", factors.Q)
    yield from player.state(0, "L", factors.L)
    for t in player.steps:
        draws = Recording(player, t)
        g, *newton_pair = player.observed(t, (-1,))
        e = draws.normal("damping", first.shape, first)
        if newton_pair:
            v, h = newton_pair
            pair = criterion.newton(v, h, e, options["damping"])
        else:
            pair = criterion.whitening(True, g, e, options["damping"])
        side = draws.toss("side") < 0.5
        factors = kind.fit(factors, pair, options["lr"], options["betaL"], draws, side)
        draws.spent()
        yield from player.state(t, "Q", factors.Q)
        yield from player.state(t, "L", factors.L)
        yield from player.state(t, "out", [kind.precondition(factors, g)])


@primitive("_shape_as_matrix")
def matricised(player: Player, t: int) -> Any:
    return pipeline.laid_out(METHODS["affine"]().recipe(), player.read(f"in/{t}/0"))


# ---- optimizers: several tensors, whole steps --------------------------------------------
@family("quad_torch_procrustes", "quad_torch_quad", kinds=OF_OPTIMIZERS, before=never)
def replay_quad_torch(player: Player) -> Iterator[Compared]:
    """quad_torch's optimizers."""
    method = METHODS[player.case["hyperparameters"]["psgd_type"]]
    return replay_optimizer(player, method, {"psgd_type": None})


@family("class_KronWhiten", kinds=OF_OPTIMIZERS, before=if_scaled)
def replay_kron_whiten(player: Player) -> Iterator[Compared]:
    """psgd_torch's `KronWhiten`."""
    return replay_optimizer(player, METHODS["kron_whiten"], {"lr_params": "lr"})


# Arguments that say nothing of the mathematics.
MAPPED = dict.fromkeys(("mask", "weight_decay_mask", "scanned_layers", "lax_map_scanned_layers", "lax_map_batch_size"))


@family("jax_kron", kinds=OF_JAX)
def replay_jax_kron(player: Player) -> Iterator[Compared]:
    """psgd_jax's `kron`: one balancing coin for all tensors."""
    renamed = MAPPED | {"learning_rate": "lr"}
    return replay_optimizer(player, METHODS["kron"], renamed, common=("fit", "balance"))


@family("jax_affine_hessian", kinds=OF_JAX, flagged=True)
@family("jax_affine", kinds=OF_JAX)
def replay_jax_affine(player: Player) -> Iterator[Compared]:
    """psgd_jax's `affine`."""
    return replay_optimizer(player, METHODS["affine"], MAPPED | {"learning_rate": "lr"}, late=True)


@family("class_KWNS4", kinds=OF_OPTIMIZERS, before=never)
def replay_kwns4(player: Player) -> Iterator[Compared]:
    """psgd_torch's `KWNS4`, which tosses its coins for each group."""
    return replay_optimizer(player, METHODS["kwns4"], {"lr_params": "lr"}, by_group=True)


@family("class_KronNewton", kinds=OF_OPTIMIZERS, before=if_scaled)
@family("class_DenseNewton", kinds=OF_OPTIMIZERS, before=all_but_q)
@family("class_LRAWhiten", "class_LRANewton", kinds=OF_OPTIMIZERS, before=all_but_the_diagonal)
def replay_class(player: Player) -> Iterator[Compared]:
    """psgd_torch's other optimizers; the last word of the family is the class."""
    title = player.case["family"].removeprefix("class_")
    method = next(method_class for method_class in METHODS.values() if method_class.title == title)
    return replay_optimizer(player, method, {"lr_params": "lr"})


@family("jax_xmat_hessian", kinds=OF_JAX, flagged=True)
@family("jax_xmat", "jax_readme", kinds=OF_JAX)
def replay_jax_xmat(player: Player) -> Iterator[Compared]:
    """psgd_jax's `xmat`."""
    return replay_optimizer(player, METHODS["xmat"], MAPPED | {"learning_rate": "lr"}, late=True)


@family("jax_lra_hessian", kinds=OF_JAX, flagged=True)
@family("jax_lra", kinds=OF_JAX)
def replay_jax_lra(player: Player) -> Iterator[Compared]:
    """psgd_jax's `low_rank_approximation`."""
    return replay_optimizer(player, METHODS["low_rank_approximation"], MAPPED | {"learning_rate": "lr"}, late=True)


# ---- running ------------------------------------------------------------------------------
def supported(case: Case) -> bool:
    """Can the core replay this case?"""
    return case["family"] in FAMILIES and (
        case["family"] != "primitive" or case["function"] in (*PRIMITIVES, "hessian_helper")
    )


def error(got: np.ndarray, want: np.ndarray, atol: float) -> float:
    """Largest difference beyond `atol`, over the largest recorded modulus; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return inf
    if not want.size:
        return 0.0
    difference = max(float(np.max(np.abs(got - want))) - atol, 0.0)
    scale = float(np.max(np.abs(want)))
    relative = difference / scale if scale else (inf if difference else 0.0)
    return relative if relative == relative else inf


def replay(case: Case, folder: Path, framework: Framework) -> Result:
    """Replay one case; `error` is the worst of all its arrays."""
    with double_precision(framework.name), np.load(folder / case["file"]) as data:
        worst, where = compared(Player(case, Data(data), framework))
    return Result(case["file"].removesuffix(".npz"), case["family"], worst, case["rtol"], where)


def compared(player: Player) -> tuple[float, str]:
    """The worst error of a case, and its array."""
    case, names = player.case, set[str]()
    worst, where = 0.0, ""
    for name, got, want in player.family.replay(player):
        this = error(got, want.astype(got.dtype), case.get("atol", 0.0))
        names.add(name)
        if this >= worst:
            worst, where = this, name
    if not where:
        raise ValueError(f"{case['file']} recorded nothing to compare with")
    kinds = () if player.family.kinds is None else RESULTS  # whose parameters are given
    left = [x for x in player.data if x.split("/")[0] in kinds and x not in names and "/0/" not in x]
    if left:
        raise ValueError(f"{left[0]} was recorded, but nothing was computed to compare with it")
    return worst, where


def cases(folder: Path) -> list[Case]:
    """All cases of a folder, in its order; ValueError where its index is none."""
    return golden_cases.cases(folder, supported)
