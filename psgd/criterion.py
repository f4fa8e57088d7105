"""The criteria: which pair (v, h) a preconditioner is fitted to, and how h is damped.

Whitening: h is a gradient (or its momentum), v is random, E v v^H = I, and independent of it; P whitens h.
Newton:    h = H v is a Hessian-vector product; P approaches |H|^-1.

A preconditioner that knows E T2 over v needs no v in whitening (`Pair.v` is None); the others get the damping noise as
their probe, so that damping and probe are one draw.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from psgd._xp import eps, namespace, number, plus, times
from psgd.arrays import Scalar, Tensor

Damping = Callable[..., Tensor]  # (x, e, amount, unit) -> x damped


class Pair(NamedTuple):
    """What a preconditioner is fitted to: P h = v in the mean.

    Args:
        h: damped, in the shape of the tensor, divided by `unit`.
        v: the probe, in the same shape, not divided; None to take the expectation over it.
        unit: 0-d, what h has still to be multiplied by.
    """

    h: Tensor
    v: Tensor | None
    unit: Scalar | float = 1.0


def relative(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x + (amount + eps |x|) e [psgd_torch]: never below rounding, without which unseen directions grow without end.

    Args:
        x: gradient or H v, any shape, divided by `unit`.
        e: noise with E e e^H = I, in the shape of x; read only.
        amount: lambda, the damping, in the units of the gradient itself.
        unit: what x was divided by, so that amount is divided by it too.

    Returns: a tensor of the shape of x. eps is the machine epsilon of its dtype.
    """
    return plus(plus(x, amount / unit, e), eps(x), times(namespace(x).abs(x), e), donate=True)


def proportional(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x + amount mean|x| e [psgd_jax kron].

    Args, Returns: as of `relative`, but that amount is a share of mean|x|, so that the unit plays no part.
    """
    return plus(x, amount * (namespace(x).linalg.vector_norm(x, ord=1) / prod(x.shape)), e)


def undamped(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x itself [psgd_jax `affine`, `xmat`, `low_rank_approximation`]. Args, Returns: as of `relative`."""
    return x


def whitening(
    probed: bool,
    g: Tensor,
    e: Tensor,
    amount: Scalar | float,
    damping: Damping = relative,
    unit: Scalar | float = 1.0,
) -> Pair:
    """The pair that whitens g: (v, h) = (None, g damped by e), or (e, g damped by e) where a probe must be drawn.

    Args:
        probed: does the preconditioner need v, rather than the expectation over it?
        g: gradient or momentum, in the shape that the preconditioner sees, divided by `unit`.
        e: noise with E e e^H = I, in the shape of g.
        amount: lambda, the damping.
        damping: the rule that adds it.
        unit: 0-d, what g was divided by.

    Source: psgd_torch `update_precond_kron_whiten_*`, of which EQ takes its damping noise as the probe.
    """
    return Pair(damping(g, e, number(amount, g), unit), e if probed else None, unit)


def newton(
    v: Tensor, h: Tensor, e: Tensor, amount: Scalar | float, damping: Damping = relative, unit: Scalar | float = 1.0
) -> Pair:
    """The Newton pair, to which P fits the inverse of the Hessian: (v, h damped by noise e that is independent of v).

    Args:
        v: the probe, in the shape of h.
        h: H v, the product with the Hessian, divided by `unit`.
        e, amount, damping, unit: as of `whitening`.

    Source: psgd_torch `update_precond_kron_newton_*`.
    """
    return Pair(damping(h, e, number(amount, h), unit), v, unit)
