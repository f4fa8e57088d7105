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

Damping = Callable[..., Tensor]  # (x, noise, amount, the unit of x) -> x damped


class Pair(NamedTuple):
    """h: damped, the shape of the tensor, in units of a number. v: the same shape, or None to take the expectation over
    it."""

    h: Tensor
    v: Tensor | None
    unit: Scalar | float = 1.0


def relative(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x + (amount + eps |x|) e [psgd_torch]: never below rounding, without which unseen directions grow without end."""
    return plus(plus(x, amount / unit, e), eps(x), times(namespace(x).abs(x), e), donate=True)


def proportional(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x + amount mean|x| e [psgd_jax kron]."""
    return plus(x, amount * (namespace(x).linalg.vector_norm(x, ord=1) / prod(x.shape)), e)


def undamped(x: Tensor, e: Tensor, amount: Scalar | float, unit: Scalar | float = 1.0) -> Tensor:
    """x itself [psgd_jax affine]."""
    return x


def whitening(
    probed: bool,
    g: Tensor,
    e: Tensor,
    amount: Scalar | float,
    damping: Damping = relative,
    unit: Scalar | float = 1.0,
) -> Pair:
    """The pair that whitens g: (None, g damped by e), or (e, g damped by e) where a probe must be seen."""
    return Pair(damping(g, e, number(amount, g), unit), e if probed else None, unit)


def newton(
    v: Tensor, h: Tensor, e: Tensor, amount: Scalar | float, damping: Damping = relative, unit: Scalar | float = 1.0
) -> Pair:
    """The pair that inverts the Hessian: (v, h damped by fresh noise e)."""
    return Pair(damping(h, e, number(amount, h), unit), v, unit)
