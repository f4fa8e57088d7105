"""The methods of quad_torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from psgd.geometry import GEOMETRIES, OF_HERMITIAN_Q, Geometry
from psgd.hyperparameters import NOISES, RATES, SCALES, Method, is_positive, keeping, method, setting, skewest
from psgd.kron import DenseRule, Kronecker
from psgd.recipe import Recipe, Schedule
from psgd.scaling import Clip, InitialScale
from psgd.schedule import from_first, inverse_root, periodic
from psgd.shapes import merge
from psgd.spectral import NormBound


@dataclass(frozen=True, kw_only=True)
class QuadTorch(Method):
    """What the two optimizers of quad_torch share: whitening of the momentum, merged to a matrix, at every step.

    One automatic scale serves all tensors, and every factor is multiplied by all of it, so that with it a vector starts
    at P = 1/rms(g) and a matrix at 1/rms(g)^2, as in quad_torch. Numbers that are no hyperparameters here (norm bound,
    RMS clip 1.1, gain 1/5, beta_L 0.95, timescale, floor, period) are fixed in quad_torch.
    """

    geometry: ClassVar[Geometry]
    # Of quad_torch 0.4, its last release, which has no `preconditioner_init_scale`.
    positional = (
        "lr",
        "lr_style",
        "momentum",
        "weight_decay",
        "max_size_dense",
        "max_skew_dense",
        "preconditioner_lr",
        "noise_scale",
        "dtype",
    )

    weight_decay: float = setting(
        0.1, "decoupled weight decay: p loses the learning rate times weight_decay of itself each step", "[0, inf)"
    )
    lr_style: str | None = setting(
        "adam",
        '"adam" divides the direction by 5, so that Adam\'s learning rates fit; None does not',
        kind="name",
        names=lambda: ("adam", None),
    )
    momentum: float = setting(0.95, "weight of the past in the average of gradients", "[0, 1)")
    max_size_dense: float = setting(16384, "longest axis that gets a dense factor", "[1, inf]", "integer")
    max_skew_dense: float = skewest()
    preconditioner_lr: float = setting(
        0.7, "first step size of the factors; falls as 1/sqrt(1 + step/10000) to 0.3, its floor", RATES
    )
    preconditioner_init_scale: float | None = setting(
        None, "first scale of each factor; None takes it from the first gradients", SCALES
    )
    noise_scale: float = setting(1e-9, "noise added to what is whitened, times a random sign", NOISES)
    dtype: Any = setting(None, "dtype of all state, or its name; None is the parameter's", kind="dtype")
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                self.geometry,
                DenseRule(self.max_size_dense, self.max_skew_dense, min_ndim=2),
                NormBound(probes=4, products=6, offset=1e-9),
                split=False,
                keep_p=self.keep_p,
            ),
            layout=merge,
            momentum=is_positive(self.momentum),
            whiten="momentum",
            balance_last=False,
            initial_scale=InitialScale(power=2),
            clip=Clip(rms=1.1),
            gain=0.2 if self.lr_style == "adam" else 1.0,
            dtype=self.dtype,
        )

    def schedule(self) -> Schedule:
        return Schedule(
            averaging=from_first,
            momentum=self.momentum,
            rate=lambda xp, step: inverse_root(xp, self.preconditioner_lr, step, timescale=10_000, floor=0.3),
            beta_lipschitz=0.95,
            damping=self.noise_scale,
            balance=periodic(100),
            seed=self.seed,
        )


@method("procrustes", "Procrustes", "quad_torch `Procrustes`")
class Procrustes(QuadTorch):
    """Whitening by dense factors kept nearly Hermitian by rotations (geometry Q0.5EQ1.5)."""

    geometry = replace(GEOMETRIES["Q0.5EQ1.5"], root=OF_HERMITIAN_Q)


@method("quad", "QUAD", "quad_torch `QUAD`")
class Quad(QuadTorch):
    """Whitening by Hermitian factors moved from both sides (geometry QUAD)."""

    geometry = GEOMETRIES["QUAD"]
