"""The methods of psgd_torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any

from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import NOISES, RANKS, SCALES, Method, is_positive, keeping, method, setting, skewest
from psgd.kron import DenseRule, Kronecker
from psgd.lra import LRA
from psgd.recipe import Recipe, Schedule
from psgd.scaling import Clip
from psgd.schedule import When, capped_average, coin, never, unfitted
from psgd.shapes import squeeze
from psgd.spectral import TraceBound


def geometry_name() -> Any:
    """The hyperparameter `dQ`: a registered geometry; "Q0p5EQ1p5", as psgd_torch also writes, is Q0.5EQ1.5."""
    return setting("Q0.5EQ1.5", "the geometry", kind="name", names=lambda: tuple(GEOMETRIES))


def amplitudes() -> Any:
    """The hyperparameter `grad_clip_max_amps`."""
    return setting((2.0, 10.0), "largest RMS, then largest entry of the direction of a tensor", kind="pair")


def longest() -> Any:
    """The hyperparameter `preconditioner_max_size`."""
    return setting(inf, "longest axis that gets a dense factor", "[0, inf]", "integer")


def exactness() -> Any:
    """The hyperparameter `exact_hessian_vector_product`."""
    doc = "products with the Hessian by differentiating twice; False takes differences of two gradients"
    return setting(True, doc, kind="flag")


def step_bound() -> Any:
    """The hyperparameter `grad_clip_max_norm`."""
    return setting(inf, "largest length of the direction over all tensors", "(0, inf]")


@dataclass(frozen=True, kw_only=True)
class PsgdTorch(Method):
    """What the methods of psgd_torch share: a capped average, a coin, running Lipschitz estimates, relative damping."""

    momentum: float = setting(0.0, "weight of the past in the average of gradients, at most", "[0, 1)")
    preconditioner_update_probability: float = setting(1.0, "probability of a fit, by one coin a step", "(0, 1]")
    lr_preconditioner: float = setting(0.1, "step size of the factors", "(0, 1)")
    betaL: float = setting(0.9, "weight of the past in the Lipschitz estimates of the factors", "[0, 1)")
    damping: float = setting(1e-9, "noise added to what is fitted, beside one rounding of it", NOISES)
    preconditioner_init_scale: float | None = setting(
        None, "first scale of Q; None takes it from what is fitted first", SCALES
    )

    def balance(self) -> When:
        """The steps at which factors are balanced."""
        return never

    def schedule(self) -> Schedule:
        return Schedule(
            averaging=capped_average,
            momentum=self.momentum,
            rate=lambda xp, step: self.lr_preconditioner,
            beta_lipschitz=self.betaL,
            damping=self.damping,
            fit=coin("fit", self.preconditioner_update_probability),
            balance=self.balance(),
            side=coin("side", 0.5),  # fixed in psgd_torch: U or V moves, with equal probability
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Whitening(PsgdTorch):
    """What the whitening methods of psgd_torch share: gradient or momentum is whitened, the direction bounded."""

    whiten_grad: bool = setting(True, "whiten the gradient; False whitens the momentum", kind="flag")
    update_preconditioner_first: bool = setting(True, "fit before preconditioning, or after", kind="flag")
    grad_clip_max_amps: tuple[float, float] = amplitudes()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.whiten_grad and not is_positive(self.momentum):
            raise ValueError(f"{self.name}: whiten_grad=False whitens the momentum; give momentum > 0 with it")

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all whitening methods have."""
        return {
            "momentum": is_positive(self.momentum),
            "whiten": "gradient" if self.whiten_grad else "momentum",
            "fit_first": self.update_preconditioner_first,
            "clip": Clip(*self.grad_clip_max_amps),
        }


@dataclass(frozen=True, kw_only=True)
class Newton(PsgdTorch):
    """What the Newton methods of psgd_torch share: a pair (v, H v) at every fit, and a bounded step."""

    lr: float = setting(0.01, "learning rate", "[0, inf)")
    grad_clip_max_norm: float = step_bound()
    exact_hessian_vector_product: bool = exactness()

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all Newton methods have."""
        return {
            "newton": True,
            "momentum": is_positive(self.momentum),
            "has_max_norm": not isinstance(self.grad_clip_max_norm, Real) or self.grad_clip_max_norm < inf,
        }

    def schedule(self) -> Schedule:
        base = super().schedule()
        # As published: a preconditioner that takes its first scale from a pair is fitted to the first one there is.
        fit = unfitted(base.fit) if self.preconditioner_init_scale is None else base.fit
        return replace(base, fit=fit, counts=True, max_norm=self.grad_clip_max_norm)


@dataclass(frozen=True, kw_only=True)
class OfAxes(PsgdTorch):
    """A factor for each axis of each tensor, in any of the registered geometries."""

    complex_parameters = True

    dQ: str = geometry_name()
    preconditioner_max_size: float = longest()
    preconditioner_max_skew: float = skewest()
    keep_p: bool = keeping()

    def balance(self) -> When:
        # The probability is fixed in psgd_torch. A geometry that balances before each fit needs no coin.
        return never if GEOMETRIES[self.dQ].balance_first else coin("balance", 0.01)

    def kronecker(self) -> Kronecker:
        """The preconditioner."""
        dense = DenseRule(self.preconditioner_max_size, self.preconditioner_max_skew)
        return Kronecker(GEOMETRIES[self.dQ], dense, keep_p=self.keep_p)


@method("kron_whiten", "KronWhiten", "psgd_torch `KronWhiten`")
class KronWhiten(OfAxes, Whitening):
    """Whitening of tensors of any order, complex ones too, in any of the registered geometries."""

    def recipe(self) -> Recipe:
        return Recipe(preconditioner=self.kronecker(), layout=squeeze, **self.shared())


@method("kron_newton", "KronNewton", "psgd_torch `KronNewton`")
class KronNewton(Newton, OfAxes):
    """The inverse Hessian of tensors of any order, complex ones too, in any of the registered geometries."""

    def recipe(self) -> Recipe:
        return Recipe(preconditioner=self.kronecker(), layout=squeeze, **self.shared())


@dataclass(frozen=True, kw_only=True)
class OfRank(PsgdTorch):
    """A low-rank preconditioner of all parameters."""

    rank_of_approximation: int = setting(10, "rank; 0 is a diagonal preconditioner", RANKS, "integer")

    def joint(self) -> dict[str, Any]:
        """The part of the recipe that says what the preconditioner is."""
        return {"preconditioner": LRA(self.rank_of_approximation), "joint": True}


@method("lra_whiten", "LRAWhiten", "psgd_torch `LRAWhiten`")
class LRAWhiten(OfRank, Whitening):
    """Whitening of all parameters as one vector, by a low-rank preconditioner."""

    def recipe(self) -> Recipe:
        return Recipe(**self.joint(), **self.shared())


@method("lra_newton", "LRANewton", "psgd_torch `LRANewton`")
class LRANewton(Newton, OfRank):
    """The inverse Hessian of all parameters as one vector, by a low-rank preconditioner."""

    def recipe(self) -> Recipe:
        return Recipe(**self.joint(), **self.shared())


@method("dense_newton", "DenseNewton", "psgd_torch `DenseNewton`")
class DenseNewton(Newton):
    """The inverse Hessian of all parameters as one vector, by a matrix, in any of the registered geometries."""

    dQ: str = geometry_name()

    def recipe(self) -> Recipe:
        kind = Kronecker(GEOMETRIES[self.dQ], DenseRule(max_skew=inf), TraceBound())
        return Recipe(preconditioner=kind, joint=True, **self.shared())


@method("kwns4", "KWNS4", "psgd_torch `KWNS4`")
class Kwns4(Whitening):
    """Whitening of tensors of any order in half precision (geometry Q0.5EQ1.5), with weight decay."""

    lr: float = setting(2e-4, "learning rate", "[0, inf)")
    weight_decay: float = setting(0.05, "weight decay", "[0, inf)")
    decoupled_weight_decay: bool = setting(
        True,
        "p loses the learning rate times weight_decay of itself; False adds weight_decay * p to the gradient",
        kind="flag",
    )
    momentum: float = setting(0.9, "weight of the past in the average of gradients, at most", "[0, 1)")
    whiten_grad: bool = setting(False, "whiten the gradient; False whitens the momentum", kind="flag")
    lr_preconditioner: float = setting(0.5, "step size of the factors", "(0, 1)")
    preconditioner_max_size: float = longest()
    preconditioner_max_skew: float = skewest()
    preconditioner_init_scale: float | None = setting(1.0, "first scale of Q", SCALES)
    preconditioner_dtype: Any = setting("bfloat16", "dtype of all state; None is the parameter's", kind="dtype")
    resync_every: int = setting(1_000_000, "has no effect: ranks cannot drift apart here", "[1, inf)", "integer")
    keep_p: bool = keeping()

    def balance(self) -> When:
        return coin("balance", 0.01)  # fixed in psgd_torch

    def recipe(self) -> Recipe:
        dense = DenseRule(self.preconditioner_max_size, self.preconditioner_max_skew)
        return Recipe(
            preconditioner=Kronecker(GEOMETRIES["Q0.5EQ1.5"], dense, keep_p=self.keep_p),
            layout=squeeze,
            dtype=self.preconditioner_dtype,
            decoupled=self.decoupled_weight_decay,
            **self.shared(),
        )
