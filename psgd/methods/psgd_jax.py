"""The methods of psgd_jax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from psgd import criterion, lra, xmat
from psgd.geometry import GEOMETRIES, inverse_gram, mean_dear
from psgd.hyperparameters import RANKS, RATES, SCALES, Method, is_positive, keeping, method, past, precise, setting
from psgd.kron import DenseRule, Kronecker, by_terms, by_triangle
from psgd.lra import LRA
from psgd.recipe import Recipe, Schedule
from psgd.scaling import Clip, InitialScale
from psgd.schedule import Annealed, at, coin, corrected, early, evenly, nesterov
from psgd.shapes import matrix, matrix_order
from psgd.spectral import NormBound

NORM_BOUND = NormBound(probes=0, products=2)  # psgd_jax `_norm_lower_bound`


def order_of_psgd_jax(*of_one: str) -> tuple[str, ...]:
    """The published order of the arguments of the functions with a coin. of_one: those that only one function has."""
    before = ("lr", "preconditioner_update_probability", "b1", "nesterov", "weight_decay", "mask")
    after = ("precond_lr", "precond_init_scale", "update_global_norm_clip", "step_normalizer_order", "seed")
    return (*before, *of_one, *after, "mu_dtype", "precision")


@method("kron", "Kron", "psgd_jax `kron`")
class KronJax(Method):
    """Whitening of tensors of any order by triangular factors (geometry EQ), fitted more and more rarely."""

    positional = (
        "lr",
        "b1",
        "weight_decay",
        "weight_decay_mask",
        "preconditioner_update_probability",
        "max_size_triangular",
        "min_ndim_triangular",
        "memory_save_mode",
        "momentum_into_precond_update",
        "preconditioner_lr",
        "preconditioner_init_scale",
        "mu_dtype",
        "precond_dtype",
        "precond_update_precision",
        "precond_grads_precision",
        "scanned_layers",
        "lax_map_scanned_layers",
        "lax_map_batch_size",
    )

    b1: float = past()
    preconditioner_update_probability: Any = setting(
        Annealed(),
        "share of the steps that fit, at even distances; a number, or a function of the step such as "
        "`precond_update_prob_schedule` gives",
        "(0, 1]",
        scheduled=True,
    )
    max_size_triangular: float = setting(8192, "longest axis that gets a dense factor", "[0, inf]", "integer")
    min_ndim_triangular: int = setting(2, "fewest axes of a tensor that gets dense factors", "[0, inf)", "integer")
    memory_save_mode: str | None = setting(
        None,
        'axes that stay diagonal: None, "one_diag" (the longest, the last of equals) or "all_diag"',
        kind="name",
        names=lambda: (None, "one_diag", "all_diag"),
    )
    momentum_into_precond_update: bool = setting(True, "whiten the momentum; False whitens the gradient", kind="flag")
    preconditioner_lr: float = setting(0.1, "step size of the factors", RATES)
    preconditioner_init_scale: float = setting(1.0, "first scale of Q", SCALES)
    mu_dtype: Any = setting(None, "dtype in which the momentum is kept; None is the parameter's", kind="dtype")
    precond_dtype: Any = setting(
        None, "dtype in which the factors are kept; None is the parameter's, at least float32", kind="dtype"
    )
    precond_update_precision: str | None = precise("tensorfloat32", "fit the factors")
    precond_grads_precision: str | None = precise(None, "apply the factors")
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                GEOMETRIES["EQ"],
                DenseRule(self.max_size_triangular, inf, self.min_ndim_triangular, self.memory_save_mode),
                NORM_BOUND,
                keep_p=self.keep_p,
            ),
            momentum=is_positive(self.b1),
            whiten="momentum" if self.momentum_into_precond_update else "gradient",
            damping=criterion.proportional,
            balance_last=False,
            clip=Clip(rms=1.1),  # fixed in psgd_jax
            widens_half=True,
            momentum_dtype=self.mu_dtype,
            factor_dtype=self.precond_dtype,
            fit_precision=self.precond_update_precision,
            apply_precision=self.precond_grads_precision,
        )

    def schedule(self) -> Schedule:
        return Schedule(
            averaging=corrected,
            momentum=self.b1,
            rate=lambda xp, step: self.preconditioner_lr,
            beta_lipschitz=0.0,
            damping=2.0**-11.5,  # the square root of float32's epsilon, fixed in psgd_jax
            fit=evenly(self.preconditioner_update_probability),
            balance=coin("balance", 0.01),  # fixed in psgd_jax
            counts=True,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PsgdJax(Method):
    """What psgd_jax's methods with a coin share: whitening of the gradient, a bounded step, two normalisers."""

    mask_name = "mask"
    positional = order_of_psgd_jax()

    lr: float = setting(0.01, "learning rate", "[0, inf)")
    preconditioner_update_probability: Any = setting(
        1.0, "probability of a fit, by one coin a step; the first two steps always fit", "(0, 1]", scheduled=True
    )
    b1: float = past()
    nesterov: bool = setting(False, "look one step ahead with the average", kind="flag")
    precond_lr: Any = setting(0.1, "step size of the factors", RATES, scheduled=True)
    precond_init_scale: float | None = setting(None, "first scale of Q; None takes it from the first gradients", SCALES)
    update_global_norm_clip: float | None = setting(
        None, "largest length of the direction over all tensors; None is no limit", "(0, inf)"
    )
    step_normalizer_order: str = setting(
        "2nd",
        'what a step of the factors is divided by: the norm of both terms of its residual ("2nd") or of their '
        'difference ("1st")',
        kind="name",
        names=lambda: ("1st", "2nd"),
    )
    seed: int | None = setting(  # type: ignore[assignment]
        None, "seed of the noise; None is 0", "[0, 4294967295]", "integer", structural=False
    )
    mu_dtype: Any = setting(None, "dtype in which the momentum is kept; None is the parameter's", kind="dtype")
    precision: str | None = precise("tensorfloat32", "fit and apply the factors")

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all methods with a coin have."""
        return {
            "momentum": is_positive(self.b1),
            "has_max_norm": self.update_global_norm_clip is not None,
            "widens_half": True,
            "momentum_dtype": self.mu_dtype,
            "fit_precision": self.precision,
            "apply_precision": self.precision,
        }

    def schedule(self) -> Schedule:
        return Schedule(
            averaging=nesterov if self.nesterov else corrected,
            momentum=self.b1,
            rate=lambda xp, step: at(self.precond_lr, step),
            beta_lipschitz=0.0,
            damping=0.0,
            # All three numbers are fixed in psgd_jax.
            fit=early(2, coin("fit", self.preconditioner_update_probability)),
            balance=coin("balance", 0.01),
            side=coin("side", 0.5),
            counts=True,
            max_norm=inf if self.update_global_norm_clip is None else self.update_global_norm_clip,
            seed=0 if self.seed is None else self.seed,
        )


@method("affine", "Affine", "psgd_jax `affine`")
class Affine(PsgdJax):
    """Whitening of matrices, tensors as the most square of them, by a triangular factor on either side."""

    positional = order_of_psgd_jax("max_size_triangular", "max_skew_triangular")

    max_size_triangular: float = setting(4096, "longest side that gets a dense factor", "[0, inf]", "integer")
    max_skew_triangular: float = setting(
        128, "a side is dense if it is at most this many times as long as the other", "[0, inf]", structural=True
    )
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                replace(GEOMETRIES["EQ"], expected=inverse_gram, probed=mean_dear),
                DenseRule(self.max_size_triangular, self.max_skew_triangular),
                NORM_BOUND,
                by_triangle if self.step_normalizer_order == "1st" else by_terms,
                keep_p=self.keep_p,
            ),
            order=matrix_order,
            layout=matrix,
            damping=criterion.undamped,
            initial_scale=InitialScale(power=2, shared=False),
            **self.shared(),
        )


@method("xmat", "XMat", "psgd_jax `xmat`")
class XMatJax(PsgdJax):
    """Whitening of all parameters as one vector, by a diagonal and an antidiagonal."""

    def recipe(self) -> Recipe:
        normaliser = xmat.by_difference if self.step_normalizer_order == "1st" else xmat.by_squares
        return Recipe(
            preconditioner=xmat.XShaped(normaliser),
            joint=True,
            damping=criterion.undamped,
            initial_scale=InitialScale(power=2),
            **self.shared(),
        )


@method("low_rank_approximation", "LowRankApproximation", "psgd_jax `low_rank_approximation`")
class LraJax(PsgdJax):
    """Whitening of all parameters as one vector, by a low-rank preconditioner."""

    also = "lra"
    positional = order_of_psgd_jax("uvd_rank_of_approximation")

    uvd_rank_of_approximation: int = setting(
        10, "rank; 0 is a diagonal preconditioner; of n parameters in all at most n - 1", RANKS, "integer"
    )

    def recipe(self) -> Recipe:
        normaliser = lra.BY_RESIDUAL if self.step_normalizer_order == "1st" else lra.BY_TERMS
        return Recipe(
            preconditioner=LRA(
                self.uvd_rank_of_approximation, normaliser, lra.aligned_if_long, lra.spread_by_rank, capped=True
            ),
            joint=True,
            damping=criterion.undamped,
            balance_last=False,
            initial_scale=InitialScale(power=2),
            **self.shared(),
        )
